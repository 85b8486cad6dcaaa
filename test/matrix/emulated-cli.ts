/**
 * This build with an addon that runs on emulated hardware, laid out as a project of its own, so that unchanged processes run it: `shardmesh_emulated` has the avx512
 * and amx kernel sets where the processor has no AVX-512 or AMX (test/kernels/emulated_avx512.h), `shardmesh_cuda_emulated` the CUDA executor (test/kernels/simt).
 * Only the least deadline of a step differs: an emulated card takes seconds for what a card takes a millisecond.
 */
import { cpSync, mkdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { buildKernelTarget } from '../kernels/build-target.ts';

/** @returns the command line's main file */
export async function emulatedCli(target: 'shardmesh_emulated' | 'shardmesh_cuda_emulated'): Promise<string> {
  const root = fileURLToPath(new URL('../..', import.meta.url));
  const addon = `${await buildKernelTarget(target)}.node`;
  const project = join(root, 'build', `project-of-${target}`);
  rmSync(project, { recursive: true, force: true });
  mkdirSync(join(project, 'build'), { recursive: true });
  for (const name of ['package.json', 'dist']) cpSync(join(root, name), join(project, name), { recursive: true });
  symlinkSync(join(root, 'node_modules'), join(project, 'node_modules'));
  cpSync(addon, join(project, 'build', 'shardmesh.node'));
  const limits = join(project, 'dist', 'protocol', 'limits.js');
  const text = readFileSync(limits, 'utf8');
  if (!text.includes('stepTimeoutMsMin: 2_000')) throw new Error(`${limits} has no stepTimeoutMsMin of 2_000 to make longer`);
  writeFileSync(limits, text.replace('stepTimeoutMsMin: 2_000', 'stepTimeoutMsMin: 20_000'));
  return join(project, 'dist', 'deploy', 'cli', 'main.js');
}
