/**
 * This build with its avx512 kernel set on emulated instructions (test/kernels/emulated_avx512.h), laid out as a project of its own, so that unchanged
 * processes of `serve` run it where the processor has no AVX-512.
 */
import { cpSync, mkdirSync, rmSync, symlinkSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { buildKernelTarget } from '../kernels/build-target.ts';

/** @returns the command line's main file */
export async function emulatedCli(): Promise<string> {
  const root = fileURLToPath(new URL('../..', import.meta.url));
  const addon = `${await buildKernelTarget('shardmesh_emulated')}.node`;
  const project = join(root, 'build', 'emulated-avx512');
  rmSync(project, { recursive: true, force: true });
  mkdirSync(join(project, 'build'), { recursive: true });
  for (const name of ['package.json', 'dist']) cpSync(join(root, name), join(project, name), { recursive: true });
  symlinkSync(join(root, 'node_modules'), join(project, 'node_modules'));
  cpSync(addon, join(project, 'build', 'shardmesh.node'));
  return join(project, 'dist', 'deploy', 'cli', 'main.js');
}
