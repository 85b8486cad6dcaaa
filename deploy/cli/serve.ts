/** `shardmesh serve`: a coordinator, and unless `--nats` names a broker, a private broker and local workers. */
import { Command } from 'commander';
import { readFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { startCoordinator, type Coordinator } from '../../coordinator/main.ts';
import type { CoordinatorConfig } from '../../coordinator/config.ts';
import { catalogue } from '../../kernels/model-file/catalogue.ts';
import { defaultCacheDirectory } from '../../kernels/model-file/cache-directory.ts';
import { readCredentials } from '../../protocol/credentials.ts';
import { ShardmeshError } from '../../protocol/errors.ts';
import { isLoopback } from '../../protocol/addresses.ts';
import { ask } from './ask.ts';
import { defaultMeshFolder } from './config-directory.ts';
import { findModel } from './find-model.ts';
import { addOptions, meshPort, type OptionName, type OptionValues } from './options.ts';

const drainGraceMs = 10_000;
/** Signals this close together are one wish. */
const sameSignalMs = 500;

export const serveOptions: OptionName[] = [
  'model',
  'servedModelName',
  'tp',
  'pp',
  'executor',
  'isa',
  'link',
  'wire',
  'host',
  'port',
  'apiKeys',
  'nats',
  'credentials',
  'advertise',
  'mesh',
  'localWorkers',
  'oneProcess',
  'cores',
  'stepTokensMax',
  'prefillChunkMax',
  'blockTokens',
  'kvCacheBytes',
  'bits',
  'activations',
  'kvType',
  'contextTokensMax',
  'sequencesMax',
  'stepsInFlight',
  'itlTargetMs',
  'speculation',
  'noPrefixCache',
  'ask',
  'logLevel',
];

export function serveCommand(): Command {
  const command = new Command('serve').description(
    'Serves a model over HTTP (OpenAI-compatible). Without --nats everything runs locally.',
  );
  return addOptions(command, serveOptions)
    .addHelpText(
      'after',
      `
Examples:
  shardmesh serve                                     the default model on one local worker
  shardmesh serve --tp 2 --pp 2                       four local workers
  shardmesh serve --tp 3:2:1 --model model.gguf       three unequal shards
  shardmesh serve --tp 2 --executor cuda --one-process    two ranks on this host's one card
  shardmesh serve --advertise 192.0.2.1 --local-workers 1 --pp 2      one worker here, one on another host (see shardmesh enroll)
  shardmesh serve --nats nats://127.0.0.1:4222 --credentials coordinator.json --tp 2
`,
    )
    .action(async (values: OptionValues) => serve(values));
}

/** A model of the catalogue keeps its name there: names inside of files are seldom chosen for people. */
const isCatalogued = (name: string): boolean => catalogue.some((entry) => entry.name === name);

function apiKeys(file: string | undefined): string[] {
  const text = file === undefined ? (process.env['SHARDMESH_API_KEYS'] ?? '').replaceAll(',', '\n') : readFile(file);
  const keys = text
    .split('\n')
    .map((line) => line.trim())
    .filter((line) => line !== '' && !line.startsWith('#'));
  const short = keys.findIndex((key) => key.length < 16);
  if (short >= 0) throw new ShardmeshError('config_invalid', `API key ${short + 1} has fewer than 16 characters`);
  return keys;
}

function readFile(path: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch (cause) {
    throw new ShardmeshError('config_invalid', `--api-keys ${path}: ${(cause as Error).message}`, { cause });
  }
}

export async function coordinatorConfig(values: OptionValues): Promise<CoordinatorConfig> {
  const keys = apiKeys(values.apiKeys);
  if (!isLoopback(values.host) && keys.length === 0)
    throw new ShardmeshError('config_invalid', `--host ${values.host} is beyond loopback, which needs API keys: --api-keys FILE`);
  if (values.blockTokens % 16 !== 0)
    throw new ShardmeshError('config_invalid', `--block-tokens ${values.blockTokens}: a multiple of 16 is needed`);
  if (values.nats !== undefined && values.credentials === undefined)
    throw new ShardmeshError('config_invalid', '--nats needs --credentials FILE (made by `shardmesh keys`)');
  if (values.credentials !== undefined && (values.advertise ?? values.localWorkers) !== undefined)
    throw new ShardmeshError(
      'config_invalid',
      '--credentials is for a NATS server that runs already; --advertise and --local-workers are for one of our own',
    );
  if (values.advertise === undefined && values.mesh !== undefined)
    throw new ShardmeshError('config_invalid', '--mesh is for workers of other hosts and needs --advertise ADDRESS');
  const seats = values.tp.count * values.pp.count;
  if (values.localWorkers !== undefined && values.localWorkers !== seats && values.advertise === undefined)
    throw new ShardmeshError(
      'config_invalid',
      `--local-workers ${values.localWorkers}: --tp and --pp need ${seats}; workers of other hosts join with --advertise ADDRESS only`,
    );
  if (values.oneProcess && (values.executor !== 'cuda' || values.credentials !== undefined))
    throw new ShardmeshError(
      'config_invalid',
      '--one-process is for workers that serve starts on a card: it needs --executor cuda, and no --credentials',
    );
  const broker =
    values.credentials === undefined
      ? null
      : { ...readCredentials(values.credentials), ...(values.nats ? { url: values.nats } : {}) };
  if (broker && broker.role !== 'coordinator')
    throw new ShardmeshError(
      'config_invalid',
      `${values.credentials} holds the credentials of a ${broker.role}, not of a coordinator`,
    );
  return Object.freeze({
    modelPath: await findModel(values.model),
    servedModelName: values.servedModelName ?? (isCatalogued(values.model) ? values.model : null),
    tensorParallel: values.tp,
    pipelineParallel: values.pp,
    executor: values.executor === 'auto' ? 'cpu' : values.executor,
    isa: values.isa === 'auto' ? null : values.isa,
    link: values.link,
    wire: values.wire,
    http: { host: values.host, port: values.port, apiKeys: keys },
    broker,
    hosts: values.advertise
      ? {
          address: { host: values.advertise.host, port: values.advertise.port ?? meshPort },
          meshFolder: resolve(values.mesh ?? defaultMeshFolder()),
        }
      : null,
    localWorkers: values.localWorkers ?? null,
    oneProcess: values.oneProcess ?? false,
    cores: values.cores ?? null,
    stepTokensMax: values.stepTokensMax,
    prefillChunkMax: Math.min(values.prefillChunkMax ?? values.stepTokensMax, values.stepTokensMax),
    blockTokens: values.blockTokens,
    kvCacheBytes: values.kvCacheBytes,
    bits: values.bits,
    activations: values.activations,
    kvType: values.kvType,
    contextTokensMax: values.contextTokensMax ?? null,
    sequencesMax: values.sequencesMax,
    prefixCache: values.prefixCache,
    stepsInFlightMax: values.stepsInFlight ?? null,
    itlTargetMs: values.itlTargetMs ?? null,
    speculation: values.speculation === 'auto',
    cacheDirectory: defaultCacheDirectory(),
    workerModule: fileURLToPath(new URL('./main.js', import.meta.url)),
    logLevel: values.logLevel,
  } satisfies CoordinatorConfig);
}

async function serve(values: OptionValues): Promise<void> {
  const config = await coordinatorConfig(values);
  let coordinator: Coordinator | null = null;
  let stopping: Promise<void> | null = null;
  const stop = (why: string, code: number): Promise<void> => {
    stopping ??= (async () => {
      process.stderr.write(`shardmesh: ${why}: no new requests, running ones have ${drainGraceMs / 1000} s\n`);
      await coordinator?.drain(drainGraceMs);
      process.exit(code);
    })();
    return stopping;
  };
  // A second signal means now; the workers and the broker notice that their owner is gone. One Ctrl-C under npm comes twice: from the terminal to the whole
  // process group, and once more from npm, which hands on what it got.
  let firstAt = 0;
  const onSignal = (signal: string): void => {
    if (stopping) return void (performance.now() - firstAt > sameSignalMs && process.exit(1));
    firstAt = performance.now();
    void stop(signal, 0);
  };
  process.on('SIGINT', () => onSignal('SIGINT'));
  process.on('SIGTERM', () => onSignal('SIGTERM'));
  const started = performance.now();
  coordinator = await startCoordinator(config, (error) => void stop(error.message, 1));
  const tooMany = coordinator.tensorParallel * coordinator.pipelineParallel - (values.cores?.length ?? availableParallelism());
  if (!config.broker && !config.hosts && tooMany > 0)
    process.stderr.write(`shardmesh: ${tooMany} more workers than cores: right, but not fast\n`);
  await coordinator.whenReady((reason) => process.stderr.write(`shardmesh: ${reason}\n`));
  const { url, modelName, tensorParallel, pipelineParallel } = coordinator;
  process.stdout.write(`shardmesh ready ${url} model=${modelName} tp=${tensorParallel} pp=${pipelineParallel}\n`);
  process.stderr.write(`shardmesh: ready ${((performance.now() - started) / 1000).toFixed(1)} s after start\n`);
  if (values.ask)
    await ask(url, modelName, values.ask, config.http.apiKeys[0]).catch((error: unknown) =>
      process.stderr.write(`shardmesh: ${String(error)}\n`),
    );
  await new Promise(() => undefined);
}
