/**
 * `npm run build:cuda`: the CUDA part of the addon as the set-up makes it (cuda-part.mjs), and beside it, in build/cuda, what runs on a machine with a card: test programs,
 * exported programs and the benchmark. Prints what each kernel takes of a multiprocessor. `--all` builds every architecture from sm_80 to sm_120, and PTX for later ones.
 */
import { readFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { allArchitectures, buildCudaPart, cudaBuild, cudaCmake, resourceFile, usualArchitectures } from './cuda-part.mjs';
import { root } from './paths.mjs';
import { line } from './progress.mjs';
import { runCommand, SetupError } from './run-command.mjs';
import { setUp } from './setup.mjs';
import { contentDigest, stampMatches, writeStamp } from './stamp.mjs';

/** What a machine with a card needs: test programs, benchmark, exported programs, and the script that runs them. */
export const cardFolder = join(cudaBuild, 'card');
const stamp = join(cudaBuild, '.card-stamp');

/** Programs for card/, whose test programs read them without Node. */
async function exportPrograms() {
  const loader = pathToFileURL(join(root, 'test/integration/helpers/typescript-loader.mjs')).href;
  const args = ['--import', loader, 'test/gpu/export-programs.ts', join(cardFolder, 'programs')];
  const { code, output } = await runCommand(process.execPath, args, { cwd: root });
  if (code !== 0) throw new SetupError(`the programs for the card's tests could not be exported:\n${output.trim()}`);
}

/** Builds the part and the card's folder, or keeps what was built of the same sources. */
export async function buildCuda({ architectures = null } = {}) {
  const rebuilt = await buildCudaPart({ architectures });
  const digest = contentDigest(root, ['kernels', 'test/gpu', 'test/kernels'], (path) =>
    /\.(h|cpp|cu|cuh|sh|py)$|CMakeLists\.txt$|(exported|small)-models?\.ts$|programs\/.*\.ts$/.test(path),
  );
  if (!rebuilt && stampMatches(stamp, digest)) return;
  await cudaCmake(['--build', cudaBuild, '-j', String(availableParallelism())]);
  await exportPrograms();
  writeStamp(stamp, digest);
}

async function main() {
  await buildCuda({ architectures: process.argv.includes('--all') ? allArchitectures : usualArchitectures });
  line('architecture  registers  stack  spilled  kernel');
  for (const k of JSON.parse(readFileSync(resourceFile, 'utf8')))
    line(
      `${k.architecture.padEnd(12)}  ${String(k.registers).padStart(9)}  ${String(k.stackBytes).padStart(5)}  ${String(k.spillBytes).padStart(7)}  ${k.kernel}`,
    );
  await setUp({ only: 'build' });
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  main().catch((error) => {
    line(`build:cuda failed: ${error instanceof SetupError ? error.message : error.stack}`);
    process.exitCode = 1;
  });
}
