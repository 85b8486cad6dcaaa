/**
 * The CUDA part of the addon: kernels and what stands between them and the runtime, as an archive in build/cuda. The set-up builds it where nvcc is found; without one, with an
 * old one, or with SHARDMESH_CUDA=off the addon does without and knows no executor `cuda`. What ptxas says each kernel takes is kept beside it.
 */
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { root } from './paths.mjs';
import { firstThatRuns, runCommand, SetupError } from './run-command.mjs';
import { contentDigest, stampMatches, writeStamp } from './stamp.mjs';

const nvccFloor = [12, 8];
export const usualArchitectures = '80-real;90-real';
export const allArchitectures = '80;86-real;89-real;90-real;100-real;120-real'; // 80 without "-real" carries PTX as well
export const cudaBuild = join(root, 'build', 'cuda');
export const resourceFile = join(cudaBuild, 'resources.json');
const stamp = join(cudaBuild, '.part-stamp');
/** The sources that could not be compiled: they are not tried again. */
const failureStamp = join(cudaBuild, '.part-failed');

/** Everything that the part is compiled from: an addon of other headers must not link it. */
const sources = () =>
  contentDigest(
    root,
    ['kernels/cuda', 'kernels/include', 'kernels/reference'],
    (path) => /\.(h|cu|cuh|cpp)$|CMakeLists\.txt$/.test(path) && !/cuda_device\w*\.(h|cpp)$|reference\/.*\.cpp$/.test(path),
  );
const stampOf = (architectures) => `${sources()} ${architectures}`;

/** { command, version: [13, 0] } of the first nvcc there is, or null. */
async function findNvcc() {
  const places = [process.env.CUDACXX, 'nvcc', join(process.env.CUDA_HOME ?? '/usr/local/cuda', 'bin', 'nvcc')];
  const found = await firstThatRuns(places.filter(Boolean).map((command) => [command]));
  if (!found) return null;
  const match = /release (\d+)\.(\d+)/.exec((await runCommand(found[0], ['--version'])).stdout);
  return match ? { command: found[0], version: [Number(match[1]), Number(match[2])] } : null;
}

/** Why there is no CUDA part here and what would help, as [reason, remedy]; null: there can be one. */
function unfit(nvcc) {
  const remedy = 'install the CUDA toolkit 12.8 or later, or set CUDACXX to its nvcc';
  if (!nvcc) return ['nvcc was not found', remedy];
  const [major, minor] = nvcc.version;
  if (major < nvccFloor[0] || (major === nvccFloor[0] && minor < nvccFloor[1]))
    return [`nvcc ${nvcc.version.join('.')} is too old: ${nvccFloor.join('.')} or later is needed`, remedy];
  return null;
}

/** The kernels of a log of `ptxas -v`: name, architecture, registers, bytes of stack and spills. */
function parseResources(log) {
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
  const { code, stdout } = await runCommand('/bin/sh', [
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

/** cmake with these arguments; resolves to what it printed. */
export async function cudaCmake(args) {
  const { code, stdout } = await runCommand('/bin/sh', ['-c', 'exec cmake "$@" 2>&1', 'cmake', ...args], { cwd: root });
  if (code !== 0)
    throw new SetupError(
      `cmake ${args[0] === '-S' ? 'could not configure' : 'could not build'} the CUDA kernels:\n${stdout.trim().split('\n').slice(-20).join('\n')}`,
    );
  return stdout;
}

/**
 * Builds the part, or keeps that of the same sources and architectures.
 * @param architectures  CMake's list; null: those it was last built for, else sm_80 and sm_90
 * @returns whether it was built
 */
export async function buildCudaPart({ architectures = null } = {}) {
  const nvcc = await findNvcc();
  const reason = unfit(nvcc);
  if (reason) throw new SetupError(...reason);
  const kept = existsSync(stamp) ? readFileSync(stamp, 'utf8').split(' ')[1] : undefined;
  const wanted = architectures ?? kept ?? usualArchitectures;
  if (builtCudaPart() && stampMatches(stamp, stampOf(wanted))) return false;
  mkdirSync(cudaBuild, { recursive: true });
  for (const file of [stamp, failureStamp, resourceFile]) rmSync(file, { force: true });
  await cudaCmake([
    '-S',
    'test/gpu',
    '-B',
    cudaBuild,
    `-DCMAKE_CUDA_COMPILER=${nvcc.command}`,
    `-DCMAKE_CUDA_ARCHITECTURES=${wanted}`,
  ]);
  // From the start, so that the log has every kernel; -Otarget keeps the lines of one file together.
  const jobs = String(availableParallelism());
  const log = await cudaCmake([
    '--build',
    cudaBuild,
    '--clean-first',
    '--target',
    'shardmesh_cuda',
    '-j',
    jobs,
    '--',
    '-Otarget',
  ]);
  const kernels = parseResources(log);
  const names = await readableNames(log);
  if (names?.length === kernels.length) kernels.forEach((kernel, i) => (kernel.kernel = names[i]));
  writeFileSync(resourceFile, JSON.stringify(kernels, null, 1));
  writeStamp(stamp, stampOf(wanted));
  return true;
}

/** The folder to link, or null: never built, or built from other sources. */
export function builtCudaPart() {
  if (process.env.SHARDMESH_CUDA === 'off') return null;
  const there = ['kernels/libshardmesh_cuda.a', 'libcudart_static.a'].every((file) => existsSync(join(cudaBuild, file)));
  return there && existsSync(stamp) && readFileSync(stamp, 'utf8').startsWith(`${sources()} `) ? cudaBuild : null;
}

/** The step of the set-up: never fails, since the addon can do without. Resolves to what it did. */
export async function setUpCudaPart() {
  if (process.env.SHARDMESH_CUDA === 'off') return 'left out (SHARDMESH_CUDA=off)';
  if (builtCudaPart()) return 'up to date';
  const reason = unfit(await findNvcc());
  if (reason) return `left out: ${reason[0]}`;
  const failed = 'left out: nvcc could not compile them (`npm run build:cuda` says why)';
  if (stampMatches(failureStamp, sources())) return failed;
  try {
    await buildCudaPart();
    return 'built';
  } catch (error) {
    if (!(error instanceof SetupError)) throw error;
    writeStamp(failureStamp, sources());
    return failed;
  }
}
