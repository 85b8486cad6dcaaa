/**
 * `npm run build:cuda`: builds the CUDA kernels, their device and their test programs into build/cuda, prints what each kernel takes of a multiprocessor, and builds the
 * addon again, now with `--executor cuda`. Not part of `npm start` and `npm test`: it takes minutes, and most machines have no nvcc; both keep what it has built as long as
 * its sources do not change. `--all` builds every architecture from sm_80 to sm_120, and PTX for later ones.
 */
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { cudaBuild, noteCudaPart } from './cuda-part.mjs';
import { root } from './paths.mjs';
import { line } from './progress.mjs';
import { runCommand, SetupError } from './run-command.mjs';
import { setUp } from './setup.mjs';
import { contentDigest, stampMatches, writeStamp } from './stamp.mjs';

const nvccFloor = [12, 8];
const usual = '80-real;90-real';
const all = '80;86-real;89-real;90-real;100-real;120-real'; // 80 without "-real" carries PTX as well
export const resourceFile = join(cudaBuild, 'resources.json');
/** What a machine with a card needs: test programs, benchmark, exported programs, and the script that runs them. */
export const cardFolder = join(cudaBuild, 'card');

/** `release 13.0, V13.0.88` → [13, 0]; null when there is no nvcc. */
export async function nvccVersion() {
  const { code, stdout } = await runCommand(process.env.CUDACXX ?? 'nvcc', ['--version']);
  const match = code === 0 ? /release (\d+)\.(\d+)/.exec(stdout) : null;
  return match ? [Number(match[1]), Number(match[2])] : null;
}

/** The kernels of a log of `ptxas -v`: name, architecture, registers, bytes of stack and spills. */
export function parseResources(log) {
  const kernels = [];
  for (const text of log.split('\n')) {
    const entry = /Compiling entry function '(\w+)' for '(sm_\d+\w*)'/.exec(text);
    if (entry) kernels.push({ kernel: entry[1], architecture: entry[2], registers: null, stackBytes: null, spillBytes: null });
    const last = kernels.at(-1);
    const stack = /(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads/.exec(text);
    if (last && last.stackBytes === null && stack)
      Object.assign(last, { stackBytes: Number(stack[1]), spillBytes: Number(stack[2]) + Number(stack[3]) });
    const used = /Used (\d+) registers/.exec(text);
    if (last && last.registers === null && used) last.registers = Number(used[1]);
  }
  return kernels;
}

/** `_ZN…linear_decode_kernelINS0_6FormatILi4E…` → `linear_decode_kernel<…>`, by c++filt; the mangled names where there is none. */
async function readableNames(log) {
  const from = join(cudaBuild, 'ptxas.log');
  writeFileSync(from, log);
  const { code, stdout } = await runCommand('sh', [
    '-c',
    'grep -o "function \'[A-Za-z0-9_]*\'" "$0" | cut -d"\'" -f2 | c++filt',
    from,
  ]);
  if (code !== 0) return null;
  return stdout
    .trim()
    .split('\n')
    .map((name) =>
      name
        .replace(/^void /, '')
        .replace(/shardmesh::cuda::|\(anonymous namespace\)::/g, '')
        .replace(/\(Scales\)/g, 'scales ')
        .replace(/\((?!anonymous).*$/, ''),
    );
}

/** Programs for card/, whose test programs read them without Node. */
async function exportPrograms() {
  const loader = pathToFileURL(join(root, 'test/integration/helpers/typescript-loader.mjs')).href;
  const args = ['--import', loader, 'test/gpu/export-programs.ts', join(cardFolder, 'programs')];
  const { code, output } = await runCommand(process.execPath, args, { cwd: root });
  if (code !== 0) throw new SetupError(`the programs for the card's tests could not be exported:\n${output.trim()}`);
}

/** @returns the kernels and what they take, of this build or an unchanged one */
export async function buildCuda({ architectures = usual } = {}) {
  const version = await nvccVersion();
  if (!version || version[0] < nvccFloor[0] || (version[0] === nvccFloor[0] && version[1] < nvccFloor[1]))
    throw new SetupError(
      version ? `nvcc ${version.join('.')} is too old: ${nvccFloor.join('.')} or later is needed` : 'nvcc was not found',
      'install the CUDA toolkit 12.8 or later, or set CUDACXX to its nvcc',
    );
  const stamp = join(cudaBuild, '.stamp');
  const digest = `${architectures} ${contentDigest(root, ['kernels', 'test/gpu', 'test/kernels'], (path) => /\.(h|cpp|cu|cuh|sh|py)$|CMakeLists\.txt$|(exported|small)-models?\.ts$|programs\/.*\.ts$/.test(path))}`;
  if (stampMatches(stamp, digest)) return JSON.parse(readFileSync(resourceFile, 'utf8'));
  mkdirSync(cudaBuild, { recursive: true });
  // From the start, so that the log has every kernel; -Otarget keeps the lines of one file together.
  const steps = [
    ['-S', 'test/gpu', '-B', cudaBuild, `-DCMAKE_CUDA_ARCHITECTURES=${architectures}`],
    ['--build', cudaBuild, '--clean-first', '-j', String(availableParallelism()), '--', '-Otarget'],
  ];
  let log = '';
  for (const args of steps) {
    const { code, stdout } = await runCommand('sh', ['-c', 'exec cmake "$@" 2>&1', 'cmake', ...args], { cwd: root });
    if (code !== 0)
      throw new SetupError(
        `cmake ${args[0] === '-S' ? 'could not configure' : 'could not build'} the CUDA kernels:\n${stdout.trim().split('\n').slice(-20).join('\n')}`,
      );
    log = stdout;
  }
  await exportPrograms();
  const kernels = parseResources(log);
  const names = await readableNames(log);
  if (names?.length === kernels.length) kernels.forEach((kernel, i) => (kernel.kernel = names[i]));
  writeFileSync(resourceFile, JSON.stringify(kernels, null, 1));
  writeStamp(stamp, digest);
  noteCudaPart();
  return kernels;
}

async function main() {
  const kernels = await buildCuda({ architectures: process.argv.includes('--all') ? all : usual });
  line('architecture  registers  stack  spilled  kernel');
  for (const k of kernels)
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
