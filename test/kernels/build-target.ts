import { execFile } from 'node:child_process';
import { existsSync, mkdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

const run = promisify(execFile);
const sourceDir = fileURLToPath(new URL('.', import.meta.url));
const buildDir = fileURLToPath(new URL('../../build/kernel-tests', import.meta.url));

const built = new Map<string, Promise<string>>();

/**
 * Builds one executable of test/kernels/CMakeLists.txt and returns its path; once a test file, whoever asks. Test files that run at the same time share one build
 * folder: flock(1) lets one build after the other, and the second finds its objects made.
 *
 * @throws the compiler's messages when it does not build
 */
export function buildKernelTarget(target: string): Promise<string> {
  const building = built.get(target) ?? build(target);
  built.set(target, building);
  return building;
}

async function build(target: string): Promise<string> {
  mkdirSync(buildDir, { recursive: true });
  const lock = `${buildDir}.lock`;
  const configure = ['cmake', '-S', sourceDir, '-B', buildDir, '-DCMAKE_BUILD_TYPE=Release'];
  const commands = [['cmake', '--build', buildDir, '--target', target, '-j', '2']];
  // A folder that is configured does so again by itself where it must.
  if (!existsSync(`${buildDir}/Makefile`) && !existsSync(`${buildDir}/build.ninja`)) commands.unshift(configure);
  for (const command of commands) await run('flock', [lock, ...command], { maxBuffer: 64 * 1024 * 1024 });
  return `${buildDir}/${target}`;
}
