import { execFile } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

const run = promisify(execFile);
const sourceDir = fileURLToPath(new URL('.', import.meta.url));
const buildDir = fileURLToPath(new URL('../../build/kernel-tests', import.meta.url));

/**
 * Builds one executable of test/kernels/CMakeLists.txt and returns its path. Test files that run at the same time share one build folder: flock(1) lets one
 * build after the other, and the second finds its objects made.
 *
 * @throws the compiler's messages when it does not build
 */
export async function buildKernelTarget(target: string): Promise<string> {
  mkdirSync(buildDir, { recursive: true });
  const lock = `${buildDir}.lock`;
  const commands = [
    ['cmake', '-S', sourceDir, '-B', buildDir, '-DCMAKE_BUILD_TYPE=Release'],
    ['cmake', '--build', buildDir, '--target', target, '-j', '2'],
  ];
  for (const command of commands) await run('flock', [lock, ...command], { maxBuffer: 64 * 1024 * 1024 });
  return `${buildDir}/${target}`;
}
