/**
 * What a model would look like cut in every way worth having on this machine, before anything is loaded: units, bytes and KV room of each worker, and the speed that the
 * speed model predicts. Says when one worker or replicas would serve better than a split. Pure: facts and measured numbers in, a report out.
 */
import type { ModelFacts } from '../../kernels/model-file/model-facts.ts';
import { sliceOf } from '../../kernels/model-file/slice.ts';
import {
  buildProgram,
  cutModel,
  CutError,
  unitsOfModel,
  vectorsSent,
  type CutShares,
  type KvType,
  type ModelCut,
  type RankUnits,
} from '../../kernels/programs/index.ts';
import type { ActivationType, KvSpec, Program, Range } from '../../kernels/programs/program.ts';
import { cutForShares } from './model-plan.ts';
import { predictSpeed, type MachineSpeed, type PlacementLoad, type Prediction } from './speed-model.ts';

export interface PlannerOptions {
  facts: ModelFacts;
  tensorParallel: CutShares;
  pipelineParallel: CutShares;
  bits: Program['bits'];
  activations: ActivationType;
  kvType: KvType;
  wire: keyof typeof wireBytes;
  contextTokensMax: number | null;
  blockTokens: number;
  /** Of each worker. */
  kvCacheBytes: number;
  machine: MachineSpeed;
  /** Memory that may be used for weights and K/V, all workers together. */
  memoryBytes: number;
  /** Tokens in the context of each sequence, for the prediction. */
  contextTokens: number;
  /** Bytes of one KV block on this shard. */
  kvBytesPerBlock(program: Program, blockTokens: number): number;
}

/** Bytes of a value on its way between workers. */
const wireBytes = { f32: 4, bf16: 2, q8: 34 / 32 };

/** One worker of a placement. */
export interface WorkerPlan {
  stage: number;
  rank: number;
  layers: Range;
  units: RankUnits;
  kvHeads: number;
  /** Blocks of the model file that it fetches and holds. */
  weightBytes: number;
  kvBytesPerToken: number;
  /** That `--kv-cache-bytes` holds on this worker. */
  kvTokens: number;
}

export interface PlacementPlan {
  /** `tp 2:1 pp 1`, for people. */
  name: string;
  /** As `--tp` and `--pp` would have it. */
  tp: string;
  pp: string;
  replicas: number;
  /** Workers of all replicas. */
  workers: number;
  bits: Program['bits'];
  /** Why bits are `free`: they were asked to be, or activations are rounded on their way. */
  freedBy: ('--bits' | '--wire')[];
  /** Of one replica. */
  shards: WorkerPlan[];
  /** Largest of a worker. */
  weightBytesMax: number;
  /** KV room of one replica: the least any of its workers holds. */
  kvTokens: number;
  /** Weights and K/V of everything. */
  memoryBytes: number;
  fits: boolean;
  oneStream: Prediction;
  eightStreams: Prediction;
}

export interface PlanReport {
  model: { name: string; architecture: string; layers: number; weightBytes: number };
  units: { attention: number; feedForward: number; vocabulary: number };
  activations: ActivationType;
  kv: Pick<KvSpec, 'key' | 'value'>;
  contextTokensMax: number;
  /** The placement that was asked for. */
  asked: PlacementPlan;
  /** It and the others, in the order of their size. */
  placements: PlacementPlan[];
  advice: string[];
}

const streamsMany = 8;
/** A difference below this is within what a prediction can tell. */
const clearly = 1.05;
const stagesWorthHaving = 2;

/** @throws {ShardmeshError} `placement_impossible`: what was asked for cannot be cut */
export function planPlacements(options: PlannerOptions): PlanReport {
  const { facts, machine, tensorParallel, pipelineParallel } = options;
  const units = unitsOfModel(facts);
  const asked = placementPlan(
    options,
    cutForShares(facts, { ...options, contextTokensMax: options.contextTokensMax }),
    { tp: sharesText(tensorParallel), pp: sharesText(pipelineParallel) },
    1,
  );
  const others: PlacementPlan[] = [];
  for (let replicas = 1; replicas <= machine.cores; replicas++)
    for (let pp = 1; pp <= stagesWorthHaving; pp++)
      for (let tp = 1; tp * pp * replicas <= machine.cores; tp++) {
        // Replicas of a split come after the replicas of a whole: only worth a line when a whole does not fit.
        if (replicas > 1 && tp * pp > 1) continue;
        const cut = cutOrNull(facts, tp, pp);
        if (cut) others.push(placementPlan(options, cut, { tp: String(tp), pp: String(pp) }, replicas));
      }
  const known = others.find((one) => one.replicas === 1 && one.tp === asked.tp && one.pp === asked.pp);
  const placements = known ? others.map((one) => (one === known ? asked : one)) : [asked, ...others];
  const [first] = asked.shards;
  return {
    model: {
      name: facts.name,
      architecture: facts.architecture,
      layers: facts.layers,
      weightBytes: facts.tensors.reduce((sum, tensor) => sum + tensor.bytes, 0),
    },
    units: { attention: units.attention.units, feedForward: units.feedForward.units, vocabulary: units.vocabulary.units },
    activations: options.activations,
    kv: kvTypes(programOf(options, cutForShares(facts, options), 0, 0)),
    contextTokensMax: first ? Math.min(facts.contextTokensMax, options.contextTokensMax ?? facts.contextTokensMax) : 0,
    asked,
    placements,
    advice: advice(options, asked, placements),
  };
}

/** Null: the model has too few units for so many ranks, or too few layers. */
function cutOrNull(facts: ModelFacts, tp: number, pp: number): ModelCut | null {
  try {
    return cutModel(unitsOfModel(facts), { count: tp, parts: null }, { count: pp, parts: null });
  } catch (error) {
    if (error instanceof CutError) return null;
    throw error;
  }
}

const sharesText = ({ count, parts }: CutShares): string => parts?.join(':') ?? String(count);

const programOf = (options: PlannerOptions, cut: ModelCut, stage: number, rank: number): Program => {
  const { facts, bits, activations, kvType, contextTokensMax } = options;
  return buildProgram(facts, cut, { stage, rank, bits, activations, kvType, contextTokensMax });
};

const kvTypes = ({ kv: { key, value } }: Program): PlanReport['kv'] => ({ key, value });

function placementPlan(
  options: PlannerOptions,
  cut: ModelCut,
  { tp, pp }: { tp: string; pp: string },
  replicas: number,
): PlacementPlan {
  const { facts, blockTokens, kvCacheBytes, machine, contextTokens, wire } = options;
  const units = unitsOfModel(facts);
  const shards: WorkerPlan[] = [];
  let bits = 'exact' as PlacementPlan['bits'];
  const freedBy: PlacementPlan['freedBy'] = [];
  const load: PlacementLoad = {
    hiddenSize: facts.hiddenSize,
    wireBytes: wireBytes[wire],
    stages: cut.stages.map(({ layers, ranks }, stage) => ({
      layers: layers.to - layers.from,
      ranks: ranks.map((rankUnits, rank) => {
        const program = programOf(options, cut, stage, rank);
        if (program.bits !== 'exact') bits = program.bits;
        const { entries, bytes } = sliceOf(program, facts);
        const matrixBytes = entries.reduce(
          (sum, entry) => sum + (program.weights[entry.weight]?.use === 'matrix' ? entry.bytes : 0),
          0,
        );
        const bytesPerBlock = options.kvBytesPerBlock(program, blockTokens);
        shards.push({
          stage,
          rank,
          layers,
          units: rankUnits,
          kvHeads: program.kv.heads,
          weightBytes: bytes,
          kvBytesPerToken: bytesPerBlock / blockTokens,
          kvTokens: Math.floor(kvCacheBytes / bytesPerBlock) * blockTokens,
        });
        return { matrixBytes, kvBytesPerToken: bytesPerBlock / blockTokens, vectors: vectorsSent(units, rankUnits) };
      }),
    })),
  };
  if (bits === 'free') freedBy.push('--bits');
  if (wire !== 'f32' && shards.length > 1) {
    bits = 'free';
    freedBy.push('--wire');
  }
  const memoryBytes = replicas * shards.reduce((sum, shard) => sum + shard.weightBytes + kvCacheBytes, 0);
  const predict = (streams: number): Prediction => predictSpeed(load, machine, { streams, contextTokens }, replicas);
  return {
    name: `${replicas > 1 ? `${replicas} replicas of ` : ''}tp ${tp} pp ${pp}`,
    tp,
    pp,
    replicas,
    workers: shards.length * replicas,
    bits,
    freedBy,
    shards,
    weightBytesMax: Math.max(...shards.map((shard) => shard.weightBytes)),
    kvTokens: Math.min(...shards.map((shard) => shard.kvTokens)),
    memoryBytes,
    fits: memoryBytes <= options.memoryBytes,
    oneStream: predict(1),
    eightStreams: predict(streamsMany),
  };
}

/** What a person should know before taking what they asked for. */
function advice(options: PlannerOptions, asked: PlacementPlan, placements: readonly PlacementPlan[]): string[] {
  const { machine, memoryBytes } = options;
  const lines: string[] = [];
  const rate = (prediction: Prediction): string => `${threeDigits(prediction.tokensPerSecond)} tokens/s`;
  const fitting = placements.filter((one) => one.fits);
  const whole = placements.find((one) => one.workers === 1);
  const isSplit = (one: PlacementPlan): boolean => one.shards.length > 1;
  if (!asked.fits)
    lines.push(
      `${asked.name} needs ${mebibytes(asked.memoryBytes)} for weights and KV cache, ${mebibytes(memoryBytes)} are available: lower --kv-cache-bytes, or take a smaller model`,
    );
  const shortest = options.contextTokensMax ?? options.facts.contextTokensMax;
  if (asked.kvTokens < Math.min(shortest, options.facts.contextTokensMax))
    lines.push(
      `the KV cache of ${asked.name} holds ${asked.kvTokens} tokens, one sequence of the longest context needs ${Math.min(shortest, options.facts.contextTokensMax)}: raise --kv-cache-bytes, or lower --context-tokens-max`,
    );
  if (asked.workers > machine.cores)
    lines.push(
      `${asked.workers} workers share ${machine.cores} ${machine.cores === 1 ? 'core' : 'cores'}: right, but every reduction waits for the scheduler`,
    );
  const fastest = (pick: (one: PlacementPlan) => Prediction, from: readonly PlacementPlan[]): PlacementPlan | undefined =>
    from.reduce<PlacementPlan | undefined>(
      (best, one) => (!best || pick(one).tokensPerSecond > pick(best).tokensPerSecond ? one : best),
      undefined,
    );
  const many = (one: PlacementPlan): Prediction => one.eightStreams;
  const single = (one: PlacementPlan): Prediction => one.oneStream;
  if (whole?.fits) {
    const replicas = fastest(
      many,
      fitting.filter((one) => one.replicas > 1),
    );
    const split = fastest(many, [asked, ...fitting].filter(isSplit));
    if (replicas && split && many(replicas).tokensPerSecond > many(split).tokensPerSecond)
      lines.push(
        `fits one worker: ${replicas.replicas} replicas would give more throughput than a split (${rate(many(replicas))} against ${rate(many(split))} of ${split.name}, 8 streams)`,
      );
    else if (isSplit(asked)) lines.push(`fits one worker (${mebibytes(whole.memoryBytes)} with its KV cache)`);
    for (const [what, pick] of [
      ['one stream', single],
      ['8 streams', many],
    ] as const)
      if (isSplit(asked) && pick(whole).tokensPerSecond > clearly * pick(asked).tokensPerSecond)
        lines.push(
          `one worker with all ${machine.cores} cores would be faster than ${asked.name} for ${what}: ${rate(pick(whole))} against ${rate(pick(asked))}`,
        );
  } else if (whole) {
    lines.push(
      `does not fit one worker: ${mebibytes(whole.memoryBytes)} with its KV cache, ${mebibytes(memoryBytes)} are available on this machine`,
    );
  }
  const best = fastest(
    single,
    fitting.filter((one) => one.replicas === 1),
  );
  if (best && best !== asked && best !== whole && single(best).tokensPerSecond > clearly * single(asked).tokensPerSecond)
    lines.push(
      `${best.name} would be faster than ${asked.name} for one stream: ${rate(single(best))} against ${rate(single(asked))}`,
    );
  return lines;
}

/** A prediction is not worth more digits. */
export const threeDigits = (value: number): string => String(Number(value.toPrecision(3)));

const mebibytes = (bytes: number): string => `${Math.ceil(bytes / 1024 ** 2)} MiB`;

/** As the native addon lays a block out: K and V of each token, and a scale for each that is int8. For machines where the addon is not built. */
export function kvBytesPerBlock({ layers, heads, headSize, key, value }: KvSpec, blockTokens: number): number {
  const bytesOf = (type: 'int8' | 'f16'): number => (type === 'int8' ? headSize + 4 : 2 * headSize);
  return layers * heads * blockTokens * (bytesOf(key) + bytesOf(value));
}
