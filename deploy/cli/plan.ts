/** `shardmesh plan`: how a model would be cut, what each worker would hold, and how fast that would be, before anything is loaded. */
import { Command } from 'commander';
import { availableParallelism } from 'node:os';
import { measureMessage, measureWake, serviceCost } from '../../coordinator/planner/measure-host.ts';
import { measureKernels, measureReduction, type MeasuredKernels } from '../../coordinator/planner/measure-speed.ts';
import {
  kvBytesPerBlock,
  planPlacements,
  threeDigits,
  type PlacementPlan,
  type PlanReport,
} from '../../coordinator/planner/placement-planner.ts';
import type { LinkSpeed, MachineSpeed } from '../../coordinator/planner/speed-model.ts';
import { findNatsServer } from '../../coordinator/mesh/nats-server.ts';
import { startBroker } from '../../coordinator/mesh/broker.ts';
import { loadAddon, type Addon, type CudaFacts } from '../../kernels/index.ts';
import { defaultCacheDirectory } from '../../kernels/model-file/cache-directory.ts';
import type { ModelFacts } from '../../kernels/model-file/model-facts.ts';
import { openModel } from '../../kernels/model-file/model-file.ts';
import { ShardmeshError } from '../../protocol/errors.ts';
import type { Range } from '../../kernels/programs/program.ts';
import { newMeshId, newPlacementId, newWorkerId } from '../../protocol/ids.ts';
import { findModel } from './find-model.ts';
import { measureGrpc, measureNats, type LinkMeasurement } from './measure-links.ts';
import { addOptions, type OptionValues } from './options.ts';
import { serveOptions } from './serve.ts';
import { table } from './table.ts';

/** Tokens in the context of each sequence in a prediction. */
const contextTokens = 256;

/** What is taken where it cannot be measured, or is not worth the time: 4-bit weights on one core of a server, shared memory. */
const assumed = {
  bytesPerSecondOfCore: 10e9,
  shm: { seconds: 2e-6, bytesPerSecond: 4e9 },
  stepSeconds: 200e-6,
} as const;

/** A number of the prediction: where it comes from. */
interface Basis {
  what: string;
  value: string;
  source: 'measured' | 'assumed';
}

export function planCommand(): Command {
  const command = new Command('plan').description(
    'Says how a model would be cut, what each worker would hold and how fast it would be, before anything is loaded.',
  );
  // Every option of `serve` is taken, so that a command line can be tried by changing one word.
  return addOptions(command, [...serveOptions, 'json'])
    .addHelpText(
      'after',
      `
Examples:
  shardmesh plan                                      the default model on this machine
  shardmesh plan --tp 3:2:1 --model model.gguf        three unequal shards
  shardmesh plan --tp 2 --pp 2 --link grpc --json
`,
    )
    .action(async (values: OptionValues) => plan(values));
}

async function plan(values: OptionValues): Promise<void> {
  const { facts } = await openModel(await findModel(values.model), { cacheDirectory: defaultCacheDirectory() });
  const addon = addonOrNull();
  const { machine, basis } = await measureMachine(values, facts, addon);
  const report = planPlacements({
    facts,
    tensorParallel: values.tp,
    pipelineParallel: values.pp,
    bits: values.bits,
    activations: values.activations,
    kvType: values.kvType,
    wire: values.wire,
    contextTokensMax: values.contextTokensMax ?? null,
    blockTokens: values.blockTokens,
    kvCacheBytes: values.kvCacheBytes,
    machine,
    memoryBytes: process.availableMemory(),
    contextTokens,
    kvBytesPerBlock: (program, blockTokens) =>
      addon ? addon.kvBytesPerBlock(program, blockTokens) : kvBytesPerBlock(program.kv, blockTokens),
  });
  if (wasBusy(machine))
    report.advice.push(
      'all cores together were slower than one: other programs were at work while this was measured, ask again when the machine is idle',
    );
  const text = values.json
    ? JSON.stringify({ ...report, basis }, null, 2)
    : planText(report, basis, values.blockTokens).join('\n');
  process.stdout.write(`${text}\n`);
}

function addonOrNull(): Addon | null {
  try {
    return loadAddon();
  } catch {
    return null;
  }
}

/** Why there is no prediction for a card, and what its facts alone say. */
export function noPlanForCards(cuda: CudaFacts | null, { tensors }: Pick<ModelFacts, 'tensors'>): string {
  const reason =
    '--executor cuda: plan predicts from measured speeds, and no speed of our kernels on a card is known (kernels/cuda/MEASURED.md)';
  if (!cuda?.card) return `${reason}; here there is none anyway: ${cuda?.absent ?? 'the native addon is not built'}`;
  const { name, bandwidthBytes } = cuda.card;
  if (bandwidthBytes === 0) return reason;
  const bytes = tensors.reduce((sum, tensor) => sum + tensor.bytes, 0);
  return `${reason}; ${name} reads ${(bandwidthBytes / 1e9).toFixed(0)} GB/s by its own facts, so no token of this model takes less than ${((bytes / bandwidthBytes) * 1e3).toPrecision(2)} ms on it`;
}

/** Measures what can be measured in about a second. */
async function measureMachine(
  values: OptionValues,
  facts: ModelFacts,
  addon: Addon | null,
): Promise<{ machine: MachineSpeed; basis: Basis[] }> {
  const basis: Basis[] = [];
  if (values.executor === 'cuda') throw new ShardmeshError('config_invalid', noPlanForCards(addon?.cudaFacts() ?? null, facts));
  const cores = values.cores ?? addon?.cpuFeatures().cores ?? Array.from({ length: availableParallelism() }, (_, core) => core);
  let kernels: MeasuredKernels | null = null;
  let reduction: LinkSpeed | null = null;
  if (addon) {
    const options = {
      addon,
      facts,
      kind: values.executor === 'reference' ? ('reference' as const) : ('cpu' as const),
      isa: values.isa === 'auto' ? null : values.isa,
      activations: values.activations,
      kvType: values.kvType,
      cores,
      // The reference is some hundred times slower.
      ...(values.executor === 'reference' ? { sampleBytesMax: 1024 ** 2 } : {}),
    };
    kernels = await measureKernels(options);
    if (values.link === 'auto' || values.link === 'shm') reduction = await measureReduction(options);
    if (values.link === 'tcp') reduction = await measureReduction(options, 'tcp');
  }
  for (const { threads, tokens, bytesPerSecond } of kernels?.points ?? [])
    basis.push({
      what: `weights, ${threads} ${threads === 1 ? 'core' : 'cores'}, ${tokens} ${tokens === 1 ? 'token' : 'tokens'} a step`,
      value: `${(bytesPerSecond / 1e9).toFixed(2)} GB/s (${kernels?.isa})`,
      source: 'measured',
    });
  if (!kernels)
    basis.push({
      what: 'weights, each core',
      value: `${assumed.bytesPerSecondOfCore / 1e9} GB/s (the native addon is not built: npm run build)`,
      source: 'assumed',
    });
  const wakeSeconds = await measureWake();
  const link = await linkSpeed(values, reduction, wakeSeconds, basis);
  basis.push({
    what: 'sampling and hand-over, a step',
    value: microseconds(kernels?.stepSeconds ?? assumed.stepSeconds),
    source: kernels ? 'measured' : 'assumed',
  });
  const messageSeconds = await measureMessage();
  basis.push({ what: 'until a sleeping worker runs', value: microseconds(wakeSeconds), source: 'measured' });
  basis.push({ what: 'CPU of a message, for coordinator and broker', value: microseconds(messageSeconds), source: 'measured' });
  basis.push({ what: 'context of each sequence', value: `${contextTokens} tokens`, source: 'assumed' });
  return {
    basis,
    machine: {
      cores: cores.length,
      hostCores: availableParallelism(),
      kernels: kernels?.points ?? [
        { threads: 1, tokens: 1, bytesPerSecond: assumed.bytesPerSecondOfCore },
        { threads: cores.length, tokens: 1, bytesPerSecond: assumed.bytesPerSecondOfCore * cores.length },
      ],
      link,
      stepSeconds: kernels?.stepSeconds ?? assumed.stepSeconds,
      wakeSeconds,
      service: serviceCost(messageSeconds),
    },
  };
}

/** Whether the measured points say that something else took the cores. */
function wasBusy({ cores, kernels }: MachineSpeed): boolean {
  const speed = (threads: number): number =>
    kernels.find((point) => point.threads === threads && point.tokens === 1)?.bytesPerSecond ?? 0;
  return cores > 1 && speed(cores) < speed(1);
}

async function linkSpeed(
  values: OptionValues,
  reduction: LinkSpeed | null,
  wakeSeconds: number,
  basis: Basis[],
): Promise<LinkSpeed> {
  const say = (name: string, link: LinkSpeed, source: Basis['source']): LinkSpeed => {
    basis.push({
      what: `one exchange over ${name}`,
      value: `${microseconds(link.seconds)} and ${(link.bytesPerSecond / 1e9).toFixed(1)} GB/s`,
      source,
    });
    return link;
  };
  // Both ends send at once, each through its event loop: the CPU of a round trip, which was measured inside one process. Between processes the event loop
  // sleeps until the compute thread has a frame for it, then until the peer's frame is there, and the compute thread until the event loop brings that.
  const exchangeOf = ({ roundTripUs, bytesPerSecond }: LinkMeasurement): LinkSpeed => ({
    seconds: roundTripUs / 1e6 + 3 * wakeSeconds,
    bytesPerSecond,
  });
  if (values.link === 'grpc') return say('gRPC, loopback', exchangeOf(await measureGrpc()), 'measured');
  if (values.link === 'nats') return say('NATS, loopback', exchangeOf(await measurePrivateNats()), 'measured');
  if (values.link === 'tcp' && reduction) return say('sealed tcp, loopback', reduction, 'measured');
  return reduction ? say('shared memory', reduction, 'measured') : say('shared memory', assumed.shm, 'assumed');
}

/** Over a broker of its own, as `serve` would start. */
async function measurePrivateNats(): Promise<LinkMeasurement> {
  const workers = [newWorkerId(), newWorkerId()] as const;
  const broker = await startBroker({
    server: await findNatsServer(),
    mesh: newMeshId(),
    workers: [...workers],
    placements: [newPlacementId()],
    onEvent: () => undefined,
  });
  try {
    return await measureNats([broker.credentialsOf(workers[0]), broker.credentialsOf(workers[1])]);
  } finally {
    await broker.stop();
  }
}

/** What `plan` prints. */
export function planText(report: PlanReport, basis: readonly Basis[], blockTokens: number): string[] {
  const { model, units, asked } = report;
  const lines = [
    `${model.name} (${model.architecture}): ${model.layers} layers, ${mebibytes(model.weightBytes)} of weights`,
    `units: ${units.attention} attention, ${units.feedForward} feed-forward, ${units.vocabulary} vocabulary; activations ${report.activations}, K ${report.kv.key}, V ${report.kv.value}; longest context ${report.contextTokensMax} tokens`,
    '',
    `${asked.name}: ${asked.workers} ${asked.workers === 1 ? 'worker' : 'workers'}, ${bitsText(asked)}`,
    ...table(
      ['worker', 'layers', 'attention', 'feed-forward', 'vocabulary', 'KV heads', 'weights', 'KV room'],
      asked.shards.map((shard) => [
        `stage ${shard.stage} rank ${shard.rank}`,
        rangeText(shard.layers),
        rangeText(shard.units.attentionUnits),
        rangeText(shard.units.feedForwardUnits),
        rangeText(shard.units.vocabularyUnits),
        String(shard.kvHeads),
        mebibytes(shard.weightBytes),
        `${shard.kvTokens} tokens`,
      ]),
    ).map(indented),
    `  KV room of the mesh: ${asked.kvTokens} tokens in blocks of ${blockTokens}, the least any worker holds`,
    '',
    'predicted output tokens/s:',
    ...table(
      ['placement', 'workers', 'weights each', 'KV room', 'bits', '1 stream', '8 streams', 'waiting for links', ''],
      report.placements.map((one) => [
        one.name,
        String(one.workers),
        mebibytes(one.weightBytesMax),
        `${one.kvTokens * one.replicas} tokens`,
        one.bits,
        threeDigits(one.oneStream.tokensPerSecond),
        threeDigits(one.eightStreams.tokensPerSecond),
        `${Math.round(100 * one.oneStream.linkShare)} %`,
        [one === asked ? '<- asked for' : '', one.fits ? '' : `needs ${mebibytes(one.memoryBytes)}: does not fit`]
          .filter(Boolean)
          .join(', '),
      ]),
    ).map(indented),
    '',
    'from:',
    ...table(
      ['', '', ''],
      basis.map(({ what, value, source }) => [what, value, source]),
    )
      .slice(1)
      .map(indented),
  ];
  return report.advice.length === 0 ? lines : [...lines, '', ...report.advice.map((line) => `note: ${line}`)];
}

const freedText = {
  '--bits':
    'what runs beside a request may change its answer, because --bits free leaves products of BF16 weights to cuBLASLt on cards',
  '--wire': 'another split may give another answer, because --wire rounds what travels between workers',
};
const bitsText = ({ bits, freedBy }: PlacementPlan): string =>
  ({
    exact: 'exact bits: any split, any executor, the same answer',
    'per-kind': 'bits per kind: the same answer on any split, as long as all workers have the same kind of executor',
    free: `bits free: ${freedBy.map((option) => freedText[option]).join('; ')}`,
  })[bits];

const indented = (line: string): string => `  ${line}`;
const rangeText = ({ from, to }: Range): string => `${from}..${to - 1}`;
const mebibytes = (bytes: number): string => `${(bytes / 1024 ** 2).toFixed(1)} MiB`;
const microseconds = (seconds: number): string => `${(seconds * 1e6).toFixed(1)} us`;
