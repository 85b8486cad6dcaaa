/** `shardmesh worker`: one shard worker, until it is told to stop. */
import { Command } from 'commander';
import { availableParallelism, cpus, totalmem } from 'node:os';
import { stopMessage } from '../../coordinator/mesh/worker-processes.ts';
import { createLog } from '../../coordinator/observe/log.ts';
import { loadAddon } from '../../kernels/index.ts';
import { defaultCacheDirectory } from '../../kernels/model-file/cache-directory.ts';
import { readCredentials } from '../../protocol/credentials.ts';
import { ShardmeshError } from '../../protocol/errors.ts';
import { connectNats } from '../../protocol/nats-transport.ts';
import { hostId } from '../../shard-worker/host-id.ts';
import { openSlice } from '../../shard-worker/weights/slice-source.ts';
import { ShardWorker } from '../../shard-worker/worker.ts';
import { addOptions, type OptionValues } from './options.ts';

type WorkerValues = Pick<OptionValues, 'nats' | 'credentials' | 'cores' | 'localModel' | 'logLevel'>;

const exitLostParent = 70;

export function workerCommand(): Command {
  const command = new Command('worker').description(
    'Runs one shard worker. It joins the mesh of its credentials and does what the coordinator assigns.',
  );
  addOptions(command, ['nats', 'credentials', 'cores', 'noLocalModel', 'logLevel']);
  return command
    .addHelpText('after', '\nExample:\n  shardmesh worker --nats nats://127.0.0.1:4222 --credentials worker-1.json --cores 0-3\n')
    .action(async (values: WorkerValues) => runWorker(values));
}

async function runWorker({ nats, credentials: file, cores, localModel, logLevel }: WorkerValues): Promise<void> {
  if (!file)
    throw new ShardmeshError(
      'config_invalid',
      'shardmesh worker needs --credentials FILE (made by `shardmesh keys` or by `serve`)',
    );
  const credentials = { ...readCredentials(file), ...(nats ? { url: nats } : {}) };
  if (credentials.role !== 'worker' || credentials.worker === null)
    throw new ShardmeshError('config_invalid', `${file} holds the credentials of a ${credentials.role}, not of a worker`);
  const log = createLog({ level: logLevel, name: `worker ${credentials.worker.slice(0, 6)}` });
  const addon = loadAddon();
  const features = addon.cpuFeatures();

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
    facts: {
      hostId: hostId(),
      pid: process.pid,
      cpuModel: features.model || (cpus()[0]?.model ?? 'unknown'),
      isa: features.isas[0] ?? 'portable',
      cores: cores?.length ?? availableParallelism(),
      memoryBytes: totalmem(),
      executor: 'cpu',
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
        fetch: { server: assign.weightsAddress, secret: credentials.secret, caller: credentials.worker ?? '' },
        onProgress,
        signal,
      }),
    onFatal: (error) => {
      log.error({ message: error.message }, 'fatal');
      void stop(1);
    },
    log: (level, name, fields) => log[level](fields, name),
    logSteps: log.isLevelEnabled('debug'),
  });
  // Started by `serve`: it decides when this ends, and when that process is gone, however it went, so is this one.
  process.on('message', (message) => void (message === stopMessage && stop(0)));
  process.once('disconnect', () => process.exit(exitLostParent));
  for (const signal of ['SIGTERM', 'SIGINT'] as const) process.on(signal, () => void (process.channel ? undefined : stop(0)));
  await new Promise(() => undefined);
}
