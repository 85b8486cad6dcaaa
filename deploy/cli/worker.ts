/** `shardmesh worker`: one shard worker, until it is told to stop. */
import { Command } from 'commander';
import { existsSync, mkdirSync, readFileSync } from 'node:fs';
import { availableParallelism, cpus, totalmem } from 'node:os';
import { dirname } from 'node:path';
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
  'enroll' | 'advertise' | 'nats' | 'credentials' | 'executor' | 'cores' | 'localModel' | 'logLevel'
>;

export function workerCommand(): Command {
  const command = new Command('worker').description(
    'Runs one shard worker. It joins the mesh of its credentials and does what the coordinator assigns.',
  );
  addOptions(command, ['enroll', 'advertise', 'nats', 'credentials', 'executor', 'cores', 'noLocalModel', 'logLevel']);
  return command
    .addHelpText(
      'after',
      `
Examples:
  shardmesh worker --enroll TOKEN                                     first start on another host; the token is what shardmesh enroll prints
  shardmesh worker                                                    every later start there
  shardmesh worker --credentials mesh/worker-1.json --cores 0-3       on the coordinator's host, with credentials of shardmesh keys
  shardmesh worker --executor cuda                                    computes on this host's NVIDIA card (README: which models, and what was tried)
`,
    )
    .action(async (values: WorkerValues) => runWorker(values));
}

async function runWorker({
  enroll: token,
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
  const credentials = { ...readCredentials(file), ...(nats ? { url: nats } : {}) };
  if (credentials.role !== 'worker' || credentials.worker === null)
    throw new ShardmeshError('config_invalid', `${file} holds the credentials of a ${credentials.role}, not of a worker`);
  const { tls } = credentials;
  if (tls && daysLeft(tls.certificate, Date.now()) < 0)
    throw new ShardmeshError('config_invalid', `the certificate in ${file} has expired (or the clock here is wrong); ${renewal}`);
  const log = createLog({ level: logLevel, name: `worker ${credentials.worker.slice(0, 6)}` });
  const warnOfExpiry = (): void => {
    const days = tls ? daysLeft(tls.certificate, Date.now()) : expiryWarningDays;
    if (days < expiryWarningDays) log.warn({ file, days, remedy: renewal }, 'certificate_expires');
  };
  warnOfExpiry();
  setInterval(warnOfExpiry, expiryEveryMs).unref();
  const listener = { ...(await ownAddress(credentials.url, advertise)), tls };
  const addon = loadAddon();
  const features = addon.cpuFeatures();
  const cuda = executor === 'cuda' ? addon.cudaFacts() : null;
  if (cuda?.absent) throw new ShardmeshError('card_absent', `--executor cuda: ${cuda.absent}`);

  const [transport, frameTransport] = await Promise.all([
    connectNats({ credentials, name: `worker-${credentials.worker}`, patienceMs: 30_000 }),
    connectNats({ credentials, name: `worker-${credentials.worker}-frames`, patienceMs: 30_000 }),
  ]);
  let stopping = false;
  const stop = async (code: number): Promise<void> => {
    if (stopping) return;
    stopping = true;
    const forced = setTimeout(() => process.exit(code), 2_500);
    forced.unref();
    await worker.close().catch(() => undefined);
    process.exit(code);
  };
  const worker = await ShardWorker.start({
    credentials,
    addon,
    transport,
    frameTransport,
    cores: cores ?? [],
    threads: cores?.length ?? availableParallelism(),
    cudaTuning: cuda ? readTuning(defaultCacheDirectory()) : null,
    listener,
    facts: {
      hostId: hostId(),
      pid: process.pid,
      cpuModel: features.model || (cpus()[0]?.model ?? 'unknown'),
      isa: features.isas[0] ?? 'portable',
      cores: cores?.length ?? availableParallelism(),
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
          caller: credentials.worker ?? '',
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
  // Started by `serve`: it decides when this ends, and when that process is gone, however it went, so is this one.
  process.on('message', (message) => void (message === stopMessage && stop(0)));
  process.once('disconnect', () => process.exit(workerExit.lostParent));
  for (const signal of ['SIGTERM', 'SIGINT'] as const) process.on(signal, () => void (process.channel ? undefined : stop(0)));
  await new Promise(() => undefined);
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
