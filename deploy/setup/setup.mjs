/**
 * Sets a clone up: packages, TypeScript build, native addon, nats-server, default model. Uses Node's own modules only, may be run again or
 * interrupted at any time; what is already there and unchanged is kept. `--only build` stops after the builds.
 */
import { existsSync, mkdirSync, readFileSync, rmSync, statfsSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { builtCudaPart, setUpCudaPart } from './cuda-part.mjs';
import { obtainNatsServer } from './nats-server.mjs';
import { cacheDirectory, root } from './paths.mjs';
import { line, mebibytes, runSteps } from './progress.mjs';
import { runCommand, SetupError } from './run-command.mjs';
import { contentDigest, stampMatches, writeStamp } from './stamp.mjs';

const nodeFloor = [20, 15];

function checkNode() {
  const [major, minor] = process.versions.node.split('.').map(Number);
  if (major < nodeFloor[0] || (major === nodeFloor[0] && minor < nodeFloor[1]))
    throw new SetupError(
      `Node ${process.versions.node} is too old: ${nodeFloor.join('.')} or later is needed`,
      'install Node 20 LTS or later',
    );
  mkdirSync(cacheDirectory(), { recursive: true });
  const free = statfsSync(root);
  if (free.bavail * free.bsize < 300 * 1048576)
    throw new SetupError(
      `only ${mebibytes(free.bavail * free.bsize)} free on the disk of ${root}: about 900 MiB are needed`,
      'free some disk space',
    );
}

async function installPackages(note) {
  const lock = contentDigest(root, ['package.json', 'package-lock.json', '.npmrc']);
  const stamp = join(root, 'node_modules', '.shardmesh-stamp');
  if (stampMatches(stamp, lock)) return 'up to date';
  note('npm ci');
  const install = (...more) =>
    runCommand('npm', ['ci', '--no-audit', '--no-fund', '--loglevel=error', ...more], {
      cwd: root,
      env: { ONNXRUNTIME_NODE_INSTALL: 'skip' },
    });
  const { code, output } = await install();
  // Without a network the cache of npm may still hold every package.
  const offline = code !== 0 && code !== 127 && (await install('--offline')).code === 0;
  if (code !== 0 && !offline) {
    if (existsSync(join(root, 'node_modules', 'typescript')) && existsSync(join(root, 'node_modules', 'nats')))
      return `npm ci failed, the packages that are there are used: ${output.trim().split('\n').at(-1)}`;
    throw new SetupError(
      `npm ci failed:\n${output.trim().split('\n').slice(-8).join('\n')}`,
      'npm ci   (needs the npm registry, or a filled npm cache: npm ci --offline)',
    );
  }
  writeStamp(stamp, lock);
  return offline ? 'installed by npm ci from its cache' : 'installed by npm ci';
}

async function buildTypeScript(note) {
  const sources = contentDigest(
    root,
    ['coordinator', 'shard-worker', 'protocol', 'kernels', 'deploy', 'tsconfig.json', 'tsconfig.build.json', 'package-lock.json'],
    (path) => /\.(ts|json)$/.test(path),
  );
  const stamp = join(root, 'dist', '.stamp');
  if (stampMatches(stamp, sources)) return 'up to date';
  note('tsc');
  const tsc = createRequire(join(root, 'package.json')).resolve('typescript/bin/tsc');
  const { code, output } = await runCommand(process.execPath, [tsc, '-p', 'tsconfig.build.json'], { cwd: root });
  if (code !== 0)
    throw new SetupError(`TypeScript build failed:\n${output.trim().split('\n').slice(0, 12).join('\n')}`, 'npm run types');
  writeStamp(stamp, sources);
  return 'built';
}

async function buildAddon(note) {
  const sources = contentDigest(root, ['kernels'], (path) =>
    /(\.(h|hpp|c|cc|cpp|inl|cu|cuh)|CMakeLists\.txt|\.cmake)$/.test(path),
  );
  const cuda = builtCudaPart();
  const digest = cuda ? `${sources} with its CUDA part` : sources;
  const stamp = join(root, 'build', '.stamp');
  if (existsSync(join(root, 'build', 'shardmesh.node')) && stampMatches(stamp, digest)) return 'up to date';
  const remedy = 'apt-get install cmake g++   (CMake >= 3.20 and a C++20 compiler: gcc >= 11 or clang >= 14)';
  if ((await runCommand('cmake', ['--version'])).code !== 0)
    throw new SetupError('cmake was not found; the native addon is built from source', remedy);
  const compiler = process.env.CXX ?? 'c++';
  if ((await runCommand(compiler, ['--version'])).code !== 0)
    throw new SetupError(`no C++ compiler (${compiler}) was found; the native addon is built from source`, remedy);
  const options = ['-DCMAKE_BUILD_TYPE=Release', `-DSHARDMESH_CUDA=${cuda ?? ''}`];
  const configure = await runCommand('cmake', ['-S', 'kernels', '-B', 'build', ...options], { cwd: root });
  if (configure.code !== 0) {
    rmSync(join(root, 'build', 'CMakeCache.txt'), { force: true });
    throw new SetupError(
      `cmake could not configure the native addon:\n${configure.output.trim().split('\n').slice(-12).join('\n')}`,
      remedy,
    );
  }
  const build = await runCommand('cmake', ['--build', 'build', '-j', String(availableParallelism()), '--target', 'shardmesh'], {
    cwd: root,
    onLine: (text) => note(text),
  });
  if (build.code !== 0)
    throw new SetupError(
      `the native addon could not be built:\n${build.output.trim().split('\n').slice(-20).join('\n')}`,
      `cmake --build build   in ${root}`,
    );
  writeStamp(stamp, digest);
  return cuda ? 'built, with its CUDA part' : 'built';
}

async function obtainModel(note) {
  const load = async (path) => import(pathToFileURL(join(root, 'dist', path)).href);
  const { obtainModel: obtain, defaultModel } = await load('kernels/model-file/download.js');
  const started = Date.now();
  const { source, bytes } = await obtain(defaultModel, {
    onProgress: ({ source: from, bytesDone, bytesTotal }) =>
      note(
        `${defaultModel} from ${from}: ${mebibytes(bytesDone)} of ${mebibytes(bytesTotal)}, ${((Date.now() - started) / 1000).toFixed(0)} s`,
      ),
  });
  return `${defaultModel}, ${mebibytes(bytes)}, from ${source}`;
}

/** One set-up at a time in a clone: a second one waits for the first. */
async function withLock(run) {
  const lock = join(root, '.setup-lock');
  for (let waited = 0; ; waited++) {
    try {
      writeFileSync(lock, String(process.pid), { flag: 'wx' });
      break;
    } catch {
      const owner = Number(existsSync(lock) ? readFileSync(lock, 'utf8') : 0);
      let alive = false;
      try {
        if (owner > 0) alive = process.kill(owner, 0);
      } catch {
        alive = false;
      }
      if (!alive) rmSync(lock, { force: true });
      else {
        if (waited === 0) line(`another set-up (pid ${owner}) is at work in this clone, waiting for it`);
        await new Promise((resolve) => setTimeout(resolve, 500));
      }
    }
  }
  const release = () => rmSync(lock, { force: true });
  process.once('exit', release);
  try {
    await run();
  } finally {
    process.off('exit', release);
    release();
  }
}

/** @param {{ only?: 'build' }} options */
export async function setUp(options = {}) {
  checkNode();
  await withLock(async () => {
    let cudaPart;
    const builds = [
      { name: 'TypeScript', run: buildTypeScript },
      { name: 'CUDA kernels', run: () => (cudaPart = setUpCudaPart()) },
      { name: 'native addon', run: async (note) => (await cudaPart, buildAddon(note)) },
    ];
    const groups = [[{ name: 'packages', run: installPackages }]];
    if (options.only === 'build') groups.push(builds);
    else groups.push([...builds, { name: 'nats-server', run: obtainNatsServer }], [{ name: 'default model', run: obtainModel }]);
    await runSteps(groups);
  });
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const only = process.argv.includes('--only') ? process.argv[process.argv.indexOf('--only') + 1] : undefined;
  setUp({ only }).catch((error) => {
    line(`set-up failed: ${error instanceof SetupError ? error.message : error.stack}`);
    process.exitCode = 1;
  });
}
