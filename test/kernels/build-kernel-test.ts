import { execFileSync } from 'node:child_process';
import { existsSync, mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

/**
 * Builds one executable of test/kernels/CMakeLists.txt (incremental) and returns its path. Test files run in parallel processes, so the build folder is
 * locked while one of them configures or builds.
 *
 * @throws {Error} with the compiler's output when the build fails
 */
export function buildKernelTest(target: string): string {
  const source = fileURLToPath(new URL('.', import.meta.url));
  const build = join(source, '../../build/kernel-tests');
  mkdirSync(build, { recursive: true });
  const locked = (command: string[]) => {
    execFileSync('flock', [join(build, 'lock'), ...command], { stdio: 'pipe', encoding: 'utf8' });
  };
  if (!existsSync(join(build, 'CMakeCache.txt'))) locked(['cmake', '-S', source, '-B', build, '-DCMAKE_BUILD_TYPE=Release']);
  locked(['cmake', '--build', build, '--target', target, '-j', '2']);
  return join(build, target);
}
