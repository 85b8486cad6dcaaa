/** `shardmesh worker`: one shard worker, or several that share a card, until it is told to stop. */
import { Command } from 'commander';
import { existsSync, mkdirSync, readFileSync } from 'node:fs';
import { availableParallelism, cpus, totalmem } from 'node:os';
import { dirname } from 'node:path';
import { coreShares } from '../../coordinator/mesh/core-shares.ts';
import { workerExit } from '../../coordinator/mesh/worker-exit.ts';
import { stopMessage } from '../../coordinator/mesh/worker-processes.ts';
import { createLog } from '../../coordinator/observe/log.ts';
import { loadAddon } from '../../kernels/index.ts';
import { readTuning } from '../../kernels/cuda/tuning.ts';
import { defaultCacheDirectory } from '../../kernels/model-file/cache-directory.ts';
import { isLoopback, ownAddressTowards, parseAddress, type Address } from '../../protocol/addresses.ts';
import { readCredentials, writeCredentials } from '../../protocol/credentials.ts';
import { ShardmeshError } from '../../protocol/errors.ts';
import { connectNats } from '../../protocol/nats-transport.ts';
import { coordinatorName, daysLeft, expiryWarningDays } from '../../protocol/tls.ts';
import { enroll } from '../../shard-worker/enroll.ts';
import { hostId } from '../../shard-worker/host-id.ts';
import { openSlice } from '../../shard-worker/weights/slice-source.ts';
import { ShardWorker } from '../../shard-worker/worker.ts';
import { defaultWorkerFile } from './config-directory.ts';
import { addOptions, type Advertised, type OptionValues } from './options.ts';

type WorkerValues = Pick<
  OptionValues,
  'enroll' | 'also' | 'advertise' | 'nats' | 'credentials' | 'executor' | 'cores' | 'localModel' | 'logLevel'
>;

export function workerCommand(): Command {
  const command = new Command('worker').description(
    'Runs one shard worker. It joins the mesh of its credentials and does what the coordinator assigns.',
  );
  addOptions(command, ['enroll', 'advertise', 'nats', 'credentials', 'also', 'executor', 'cores', 'noLocalModel', 'logLevel']);
  return command
    .addHelpText(
      'after',
      `
Examples:
  shardmesh worker --enroll TOKEN                                     first start on another host; the token is what shardmesh enroll prints
  shardmesh worker                                                    every later start there
  shardmesh worker --credentials mesh/worker-1.json --cores 0-3       on the coordinator's host, with credentials of shardmesh keys
  shardmesh worker --executor cuda                                    computes on this host's NVIDIA card (README: which models, and what was tried)
  shardmesh worker --executor cuda --credentials 1.json --also 2.json   two ranks in one process, which share the card
`,
    )
    .action(async (values: WorkerValues) => runWorker(values));
}

async function runWorker({
  enroll: token,
  also = [],
  advertise,
  nats,
  credentials: named,
  executor,
  cores,
  localModel,
  logLevel,
}: WorkerValues): Promise<void> {
  const file = named ?? defaultWorkerFile();
  if (token !== undefined) await enrollHere(token, file);
  else if (named === undefined && !existsSync(file))
    throw new ShardmeshError(
      'config_invalid',
      "shardmesh worker needs --enroll TOKEN (printed by `shardmesh enroll` on the coordinator's host) or --credentials FILE (made by `shardmesh keys`)",
    );
  if (also.length > 0 && executor !== 'cuda')
    throw new ShardmeshError('config_invalid', '--also is for workers that share a card and needs --executor cuda');
  const all = [file, ...also].map((one) => workerCredentials(one, nats, logLevel));
  if (new Set(all.map(({ worker }) => worker)).size < all.length)
    throw new ShardmeshError('config_invalid', '--also names the credentials of a worker that this process is already');
  const addon = loadAddon();
  const features = addon.cpuFeatures();
  const cuda = executor === 'cuda' ? addon.cudaFacts() : null;
  if (cuda?.absent) throw new ShardmeshError('card_absent', `--executor cuda: ${cuda.absent}`);

  let stopping = false;
  const workers: ShardWorker[] = [];
  const stop = async (code: number): Promise<void> => {
    if (stopping) return;
    stopping = true;
    const forced = setTimeout(() => process.exit(code), 2_500);
    forced.unref();
    await Promise.all(workers.map((worker) => worker.close().catch(() => undefined)));
    process.exit(code);
  };
  const available = cores ?? Array.from({ length: availableParallelism() }, (_, core) => core);
  const shares = all.length > 1 ? coreShares(available, all.length) : null;
  const start = async ({ credentials, worker: id, log }: (typeof all)[number], index: number): Promise<void> => {
    const { tls } = credentials;
    const own = shares?.[index] ?? (all.length > 1 ? [] : (cores ?? []));
    const threads = own.length || Math.max(1, Math.floor(available.length / all.length));
    const address = await ownAddress(credentials.url, advertise);
    // Each listens for gRPC at its port and for tcp links at the next.
    const listener = { ...address, port: address.port && address.port + 2 * index, tls };
    const [transport, frameTransport] = await Promise.all([
      connectNats({ credentials, name: `worker-${id}`, patienceMs: 30_000 }),
      connectNats({ credentials, name: `worker-${id}-frames`, patienceMs: 30_000 }),
    ]);
    const worker = await ShardWorker.start({
      credentials,
      addon,
      transport,
      frameTransport,
      cores: own,
      threads,
      cudaTuning: cuda ? readTuning(defaultCacheDirectory()) : null,
      listener,
      facts: {
        hostId: hostId(),
        pid: process.pid,
        cpuModel: features.model || (cpus()[0]?.model ?? 'unknown'),
        isa: features.isas[0] ?? 'portable',
        cores: threads,
        memoryBytes: totalmem(),
        executor,
        device: cuda?.card ?? null,
        arithmetic: addon.buildInfo().arithmetic,
        weightBytesPerSecond: 0,
      },
      openSlice: (assign, facts, program, onProgress, signal) =>
        openSlice({
          facts,
          program,
          sliceSha256: assign.sliceSha256,
          modelPath: localModel ? assign.modelPath : '',
          cacheDirectory: defaultCacheDirectory(),
          fetch: {
            server: assign.weightsAddress,
            secret: credentials.secret,
            tls: tls && { identity: tls, serverName: coordinatorName(credentials.mesh) },
            caller: id,
          },
          onProgress,
          signal,
        }),
      onFatal: (error) => {
        log.error({ message: error.message }, 'fatal');
        void stop(error instanceof ShardmeshError && error.code === 'card_lost' ? workerExit.cardLost : 1);
      },
      log: (level, name, fields) => log[level](fields, name),
      logSteps: log.isLevelEnabled('debug'),
    });
    workers.push(worker);
  };
  // Started by `serve`: it decides when this ends, and when that process is gone, however it went, so is this one.
  process.on('message', (message) => void (message === stopMessage && stop(0)));
  process.once('disconnect', () => process.exit(workerExit.lostParent));
  for (const signal of ['SIGTERM', 'SIGINT'] as const) process.on(signal, () => void (process.channel ? undefined : stop(0)));
  await Promise.all(all.map(start));
  await new Promise(() => undefined);
}

/** Those of one worker, with its log, which warns while its certificate ends soon. */
function workerCredentials(path: string, url: string | undefined, logLevel: WorkerValues['logLevel']) {
  const credentials = { ...readCredentials(path), ...(url ? { url } : {}) };
  const { role, worker, tls } = credentials;
  if (role !== 'worker' || worker === null)
    throw new ShardmeshError('config_invalid', `${path} holds the credentials of a ${role}, not of a worker`);
  if (tls && daysLeft(tls.certificate, Date.now()) < 0)
    throw new ShardmeshError('config_invalid', `the certificate in ${path} has expired (or the clock here is wrong); ${renewal}`);
  const log = createLog({ level: logLevel, name: `worker ${worker.slice(0, 6)}` });
  const warnOfExpiry = (): void => {
    const days = tls ? daysLeft(tls.certificate, Date.now()) : expiryWarningDays;
    if (days < expiryWarningDays) log.warn({ file: path, days, remedy: renewal }, 'certificate_expires');
  };
  warnOfExpiry();
  setInterval(warnOfExpiry, expiryEveryMs).unref();
  return { credentials, worker, log };
}

const renewal =
  'run `shardmesh enroll` where the coordinator runs, move the old file away, enroll again here, then revoke the old id there';
const expiryEveryMs = 12 * 60 * 60 * 1000;

/** Uses the token up, and writes what it gave to a new file. */
async function enrollHere(token: string, file: string): Promise<void> {
  if (existsSync(file))
    throw new ShardmeshError(
      'config_invalid',
      `${file} exists: this host is enrolled already. Leave --enroll out, or give another --credentials FILE`,
    );
  mkdirSync(dirname(file), { recursive: true, mode: 0o700 });
  const { credentials, clockAheadMs } = await enroll(token === '-' ? readFileSync(0, 'utf8').trim() : token);
  writeCredentials(file, credentials);
  process.stderr.write(`shardmesh: enrolled as worker ${credentials.worker}; its credentials are in ${file}\n`);
  if (clockAheadMs !== null)
    process.stderr.write(
      `shardmesh: the coordinator's clock is ${(clockAheadMs / 1000).toFixed(0)} s ahead of this one; certificates need clocks that agree\n`,
    );
}

/** Where other workers reach this one: the address from which it reaches the broker. */
async function ownAddress(url: string, advertise: Advertised | undefined): Promise<Address> {
  const port = advertise?.port ?? 0;
  if (advertise) return { host: advertise.host, port };
  const broker = parseAddress(url);
  if (!broker)
    throw new ShardmeshError('config_invalid', `${url} is not the address of a NATS server; nats://host:port is needed`);
  if (isLoopback(broker.host)) return { host: '127.0.0.1', port };
  try {
    return { host: await ownAddressTowards(broker), port };
  } catch (cause) {
    throw new ShardmeshError('config_invalid', `no way to ${url} from here: ${(cause as Error).message}`, { cause });
  }
}
