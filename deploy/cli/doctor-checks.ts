/** What `shardmesh doctor` looks at: one function a check. Each looks, changes nothing that stays, and says what to do about what it found. */
import { execFile } from 'node:child_process';
import { accessSync, constants, mkdirSync, readFileSync, statfsSync } from 'node:fs';
import { createServer } from 'node:net';
import { totalmem } from 'node:os';
import { connect } from 'nats';
import { promisify } from 'node:util';
import { startBroker } from '../../coordinator/mesh/broker.ts';
import { findNatsServer } from '../../coordinator/mesh/nats-server.ts';
import { buildCommand, loadAddon, type CpuFeatures, type CudaFacts } from '../../kernels/index.ts';
import { readTuning, tunedAt } from '../../kernels/cuda/tuning.ts';
import { defaultCacheDirectory } from '../../kernels/model-file/cache-directory.ts';
import { catalogue } from '../../kernels/model-file/catalogue.ts';
import { cachedModel } from '../../kernels/model-file/download.ts';
import { newMeshId, newPlacementId, newWorkerId } from '../../protocol/ids.ts';
import { connectNats } from '../../protocol/nats-transport.ts';
import { parseVersion, compareVersions, serverAdvice } from '../../protocol/nats-version.ts';
import { measureGrpc, measureNats, type LinkMeasurement } from './measure-links.ts';

export interface Finding {
  status: 'ok' | 'warn' | 'fail';
  value: string;
  /** What to do; absent when all is well. */
  remedy?: string;
}

export interface Check {
  what: string;
  run(): Promise<Finding> | Finding;
}

export interface DoctorOptions {
  /** Name in the catalogue or path. */
  model: string;
  port: number;
}

const ok = (value: string): Finding => ({ status: 'ok', value });
const warn = (value: string, remedy: string): Finding => ({ status: 'warn', value, remedy });
const fail = (value: string, remedy: string): Finding => ({ status: 'fail', value, remedy });

const GiB = 1024 ** 3;
const MiB = 1024 ** 2;
const gibibytes = (bytes: number): string => `${(bytes / GiB).toFixed(1)} GiB`;
const toolsRemedy = 'apt-get install cmake g++   (CMake 3.20 or later, gcc 11 or clang 14 or later)';

export const nodeFloor = '20.15.0';

export function checkNode(version: string): Finding {
  return compareVersions(version, nodeFloor) >= 0
    ? ok(version)
    : fail(`${version}, ${nodeFloor} or later is needed`, 'install Node 20 LTS or later');
}

export function checkPlatform(platform: string, arch: string): Finding {
  const value = `${platform} ${arch}`;
  if (platform === 'linux' && arch === 'x64') return ok(value);
  return warn(`${value}: this version is tested on Linux x86-64 only`, 'run `npm test` here, and report what fails');
}

/** @param output  of `c++ --version`; null when there is none. @param built  whether the addon is there: then a compiler is only for changes */
export function checkCompiler(output: string | null, built: boolean): Finding {
  const missing = built ? warn : fail;
  if (output === null) return missing('no C++ compiler found', toolsRemedy);
  const [first = ''] = output.split('\n');
  const version = parseVersion(first);
  const floor = /clang/i.test(first) ? 14 : 11;
  if (version && version[0] < floor) return missing(`${first}: version ${floor} or later is needed`, toolsRemedy);
  return ok(first.trim());
}

export function checkCmake(output: string | null, built: boolean): Finding {
  const missing = built ? warn : fail;
  if (output === null) return missing('not found', toolsRemedy);
  const version = parseVersion(output)?.join('.') ?? 'unknown';
  return compareVersions(output, '3.20.0') >= 0 ? ok(version) : missing(`${version}, 3.20 or later is needed`, toolsRemedy);
}

export function checkCpu({ model, isas, cores }: CpuFeatures): Finding {
  const value = `${model}, ${cores.length} ${cores.length === 1 ? 'core' : 'cores'}, ${isas.join(', ')}`;
  return isas.some((isa) => isa !== 'portable')
    ? ok(value)
    : warn(value, 'neither AVX2 nor AVX-512 VNNI here: the answer is the same, ten times slower or more');
}

/** A machine without a card is as good as any: it is only told. */
export function checkCuda({ card, absent }: CudaFacts, tuned: string | null): Finding {
  if (!card) return ok(`none: ${absent}`);
  const { name, sm, multiprocessors, memoryBytes, bandwidthBytes, powerWatts, driver } = card;
  const known = [
    `${name}, sm_${sm}, ${multiprocessors} multiprocessors, ${gibibytes(memoryBytes)}`,
    bandwidthBytes > 0 ? `${(bandwidthBytes / 1e9).toFixed(0)} GB/s` : null,
    powerWatts > 0 ? `${powerWatts.toFixed(0)} W` : null,
    driver ? `driver ${driver}` : null,
    tuned ? `tuned ${tuned}` : 'not tuned (shardmesh tune)',
  ];
  return ok(known.filter((part) => part !== null).join(', '));
}

export function checkHugePages(mode: CpuFeatures['hugePages']): Finding {
  if (mode === 'always' || mode === 'madvise') return ok(mode);
  return warn(
    `${mode}: weights are read up to 15 % slower`,
    'echo madvise > /sys/kernel/mm/transparent_hugepage/enabled   (as root)',
  );
}

/** @param needed  weights of the model and one KV cache, 0 when the model is not there */
export function checkMemory(available: number, total: number, needed: number): Finding {
  const value = `${gibibytes(available)} of ${gibibytes(total)} available`;
  if (available < needed)
    return fail(
      `${value}, the model and its KV cache need ${gibibytes(needed)}`,
      'end other programs, lower --kv-cache-bytes, or take a smaller model',
    );
  return available < GiB ? warn(value, 'end other programs: swapped weights are slow beyond use') : ok(value);
}

export function checkDisk(available: number, folder: string): Finding {
  const value = `${gibibytes(available)} free in ${folder}`;
  if (available < 300 * MiB) return fail(value, 'free some space, or set SHARDMESH_CACHE to a folder on another disk');
  return available < GiB ? warn(value, 'a larger model may not fit; SHARDMESH_CACHE moves the cache') : ok(value);
}

/** @param samples  monotonic milliseconds, in the order they were taken. @param drift  of the wall clock against it, over `overMs` */
export function checkClock(samples: readonly number[], drift: number, overMs: number, source: string): Finding {
  const back = samples.findIndex((sample, index) => index > 0 && sample < (samples[index - 1] ?? 0));
  if (back >= 0)
    return fail(
      `the monotonic clock went back by ${((samples[back - 1] ?? 0) - (samples[back] ?? 0)).toFixed(3)} ms`,
      'every deadline hangs on it: update the kernel or the hypervisor',
    );
  const value = `monotonic${source ? `, ${source}` : ''}`;
  if (/^(acpi_pm|hpet|jiffies)$/.test(source))
    return warn(`${value} is slow to read`, 'boot with clocksource=tsc where the CPU allows it');
  if (Math.abs(drift) > 0.05 * overMs)
    return warn(
      `${value}; the wall clock moved ${drift.toFixed(1)} ms against it in ${overMs} ms`,
      'something sets the clock: check the time service',
    );
  return ok(value);
}

export function checkLink({ roundTripUs, roundTripUsP99, bytesPerSecond }: LinkMeasurement, slowUs: number): Finding {
  const value = `round trip ${roundTripUs.toFixed(0)} us (p99 ${roundTripUsP99.toFixed(0)}), ${(bytesPerSecond / MiB).toFixed(0)} MiB/s`;
  return roundTripUs <= slowUs
    ? ok(value)
    : warn(
        `${value}: slower than the ${slowUs} us usual on loopback`,
        'the machine is busy, or something filters loopback traffic; --link shm needs neither',
      );
}

async function output(command: string, args: string[]): Promise<string | null> {
  try {
    return (await promisify(execFile)(command, args, { timeout: 10_000 })).stdout;
  } catch {
    return null;
  }
}

function addonFeatures(): CpuFeatures | null {
  try {
    return loadAddon().cpuFeatures();
  } catch {
    return null;
  }
}

export function localChecks({ model, port }: DoctorOptions): Check[] {
  const cache = defaultCacheDirectory();
  const features = addonFeatures();
  const built = features !== null;
  const entry = catalogue.find((one) => one.name === model);
  return [
    { what: 'node', run: () => checkNode(process.versions.node) },
    { what: 'platform', run: () => checkPlatform(process.platform, process.arch) },
    { what: 'compiler', run: async () => checkCompiler(await output(process.env['CXX'] ?? 'c++', ['--version']), built) },
    { what: 'cmake', run: async () => checkCmake(await output('cmake', ['--version']), built) },
    { what: 'native addon', run: addon },
    ...(features
      ? [
          { what: 'cpu', run: () => checkCpu(features) },
          { what: 'huge pages', run: () => checkHugePages(features.hugePages) },
          { what: 'cuda', run: () => cudaCard(cache) },
        ]
      : []),
    {
      what: 'memory',
      run: () => checkMemory(process.availableMemory(), totalMemory(), entry ? entry.bytes + 256 * MiB : 0),
    },
    { what: 'clock', run: clock },
    { what: 'cache', run: () => cacheFolder(cache) },
    { what: 'model', run: () => modelFile(model, cache) },
    { what: 'port', run: () => portFree(port) },
    { what: 'nats-server', run: natsVersion },
    { what: 'nats permissions', run: natsPermissions },
    { what: 'grpc loopback', run: async () => checkLink(await measureGrpc(), 1_000) },
    { what: 'nats loopback', run: natsLink },
  ];
}

/** Of the machine, or what the container may have of it. */
const totalMemory = (): number => Math.min(totalmem(), process.constrainedMemory() || Infinity);

function cudaCard(cache: string): Finding {
  const facts = loadAddon().cudaFacts();
  return checkCuda(facts, facts.card && tunedAt(readTuning(cache), facts.card.name));
}

function addon(): Finding {
  try {
    const { version, compiler, arithmetic } = loadAddon().buildInfo();
    return ok(`${version}, ${compiler}, ${arithmetic}`);
  } catch (error) {
    return fail((error as Error).message.split(';')[0] ?? '', buildCommand);
  }
}

async function clock(): Promise<Finding> {
  const overMs = 100;
  const samples = Array.from({ length: 1_000 }, () => performance.now());
  const wall = Date.now();
  const begin = performance.now();
  await new Promise((resolve) => setTimeout(resolve, overMs));
  const elapsed = performance.now() - begin;
  return checkClock([...samples, begin, begin + elapsed], Date.now() - wall - elapsed, overMs, clockSource());
}

function clockSource(): string {
  try {
    return readFileSync('/sys/devices/system/clocksource/clocksource0/current_clocksource', 'utf8').trim();
  } catch {
    return '';
  }
}

function cacheFolder(folder: string): Finding {
  try {
    mkdirSync(folder, { recursive: true });
    accessSync(folder, constants.W_OK);
  } catch (error) {
    return fail(`${folder}: ${(error as Error).message}`, 'make it writable, or set SHARDMESH_CACHE to a folder that is');
  }
  const { bavail, bsize } = statfsSync(folder);
  return checkDisk(bavail * bsize, folder);
}

async function modelFile(name: string, cache: string): Promise<Finding> {
  const entry = catalogue.find((one) => one.name === name);
  if (!entry) {
    try {
      accessSync(name, constants.R_OK);
      return ok(name);
    } catch {
      return fail(`${name} is neither in the catalogue nor a file that can be read`, 'shardmesh models list');
    }
  }
  return (await cachedModel(entry, cache))
    ? ok(`${name} is in the cache, sha256 right`)
    : warn(`${name} is not in the cache`, `shardmesh models pull ${name}   (${Math.ceil(entry.bytes / MiB)} MiB)`);
}

function portFree(port: number): Promise<Finding> {
  return new Promise((resolve) => {
    const server = createServer();
    server.once('error', (error: NodeJS.ErrnoException) =>
      resolve(
        warn(
          `127.0.0.1:${port}: ${error.code === 'EADDRINUSE' ? 'taken' : error.message}`,
          `ss -ltnp 'sport = :${port}' says by whom; --port takes another`,
        ),
      ),
    );
    server.listen(port, '127.0.0.1', () => server.close(() => resolve(ok(`127.0.0.1:${port} is free`))));
  });
}

async function natsVersion(): Promise<Finding> {
  try {
    const { version, source, path } = await findNatsServer();
    const advice = serverAdvice(version);
    return advice
      ? warn(`${version} at ${path}`, advice)
      : ok(`${version} (${source === 'PATH' ? 'on PATH' : 'from the cache'})`);
  } catch (error) {
    return fail((error as Error).message.split('; run')[0] ?? '', 'npm start fetches one; or apt-get install nats-server');
  }
}

/** A private server with two workers, as `serve` would start it, for as long as `use` takes. */
async function withBroker<T>(
  use: (broker: Awaited<ReturnType<typeof startBroker>>, workers: ReturnType<typeof newWorkerId>[]) => Promise<T>,
): Promise<T> {
  const workers = [newWorkerId(), newWorkerId()];
  const broker = await startBroker({
    server: await findNatsServer(),
    mesh: newMeshId(),
    workers,
    placements: [newPlacementId()],
    onEvent: () => undefined,
  });
  try {
    return await use(broker, workers);
  } finally {
    await broker.stop();
  }
}

async function natsPermissions(): Promise<Finding> {
  return withBroker(async (broker, [worker]) => {
    try {
      const anonymous = await connect({ servers: broker.url, reconnect: false, timeout: 2_000 });
      await anonymous.close();
      return fail('a client without credentials was let in', 'update nats-server (2.9.23 or later closes CVE-2023-47090)');
    } catch (error) {
      if (!/authoriz/i.test((error as Error).message)) throw error;
    }
    if (worker === undefined) throw new RangeError('no worker');
    const transport = await connectNats({ credentials: broker.credentialsOf(worker), name: 'doctor' });
    try {
      await transport.subscribe('>', () => undefined);
      return fail('a worker may read every subject', 'update nats-server');
    } catch {
      return ok('anonymous clients and foreign subjects are refused');
    } finally {
      await transport.close();
    }
  });
}

function natsLink(): Promise<Finding> {
  return withBroker(async (broker, [first, second]) => {
    if (first === undefined || second === undefined) throw new RangeError('no workers');
    return checkLink(await measureNats([broker.credentialsOf(first), broker.credentialsOf(second)]), 2_000);
  });
}
