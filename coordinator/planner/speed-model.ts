/**
 * Predicts tokens/s of a placement from a handful of measured numbers. Pure: no clock, no machine, no model file.
 *
 *   step of a stage   = bytes read by its slowest rank / speed of its cores  +  2 reductions a layer (none when one rank holds the stage)
 *   one stream        = 1 / (sum of all stages + one hop after each stage + fixed cost): a token needs the token before it
 *   several streams   = micro-batches fill the stages; the slowest stage sets the pace, and one stream's way round is the least a round takes
 *
 * Bytes read are the matrices of a rank, once a step whatever the number of tokens, and the K/V of every token's context. Decode is bound by them.
 */

/** Speed of the products on this machine at one number of threads and of tokens in a step. */
export interface KernelSpeed {
  threads: number;
  tokens: number;
  /** Bytes of matrices (as in the model file) over the time of the step, all threads together. */
  bytesPerSecond: number;
}

/** Cost of moving bytes between two ranks. */
export interface LinkSpeed {
  /** An empty message, one way, up to the moment the receiver goes on. */
  seconds: number;
  bytesPerSecond: number;
}

export interface MachineSpeed {
  cores: number;
  /** At least one point. */
  kernels: readonly KernelSpeed[];
  link: LinkSpeed;
  /** A step's time that depends neither on bytes nor on the split: sampling, hand-over. */
  stepSeconds: number;
  /** Added to every exchange when workers outnumber cores, for then one has to be scheduled in. */
  wakeSeconds: number;
}

/** What one rank reads in a step. */
export interface RankLoad {
  /** Bytes of matrices. */
  matrixBytes: number;
  kvBytesPerToken: number;
  /** Vectors of the hidden size that it sends in the two reductions of a layer. */
  vectors: readonly [number, number];
}

export interface StageLoad {
  layers: number;
  ranks: readonly RankLoad[];
}

/** A placement as the model sees it: who reads what. */
export interface PlacementLoad {
  hiddenSize: number;
  /** Of one value in a reduction or a hidden state on its way. */
  wireBytes: number;
  stages: readonly StageLoad[];
}

export interface Workload {
  /** Sequences that decode at the same time. */
  streams: number;
  /** Tokens in the context of each. */
  contextTokens: number;
}

export interface Prediction {
  /** Output tokens of all streams together. */
  tokensPerSecond: number;
  /** Time of one token of one stream. */
  tokenSeconds: number;
  /** Share of a round that is spent in reductions and hops, 0..1. */
  linkShare: number;
}

/**
 * @param replicas  meshes like this one beside each other on the same machine; streams are dealt out evenly, cores too
 * @throws {RangeError} a placement without ranks, a workload without streams, no measured speed
 */
export function predictSpeed(load: PlacementLoad, machine: MachineSpeed, workload: Workload, replicas = 1): Prediction {
  const workersOfOne = load.stages.reduce((sum, stage) => sum + stage.ranks.length, 0);
  if (workersOfOne === 0 || load.stages.some((stage) => stage.ranks.length === 0))
    throw new RangeError('a placement needs at least one rank in every stage');
  if (workload.streams < 1 || replicas < 1) throw new RangeError('at least one stream and one replica are needed');
  const busyReplicas = Math.min(replicas, workload.streams);
  const streams = Math.ceil(workload.streams / replicas);
  const microBatches = Math.min(load.stages.length, streams);
  const tokens = Math.ceil(streams / microBatches);
  const shared: Sharing = { workers: workersOfOne * replicas, busyReplicas, microBatches };

  const stages = load.stages.map((stage) =>
    stageTime(stage, load.hiddenSize * load.wireBytes, machine, { ...workload, tokens }, shared),
  );
  const hops =
    load.stages.length === 1
      ? 0
      : load.stages.length * exchange(machine, shared.workers, tokens * load.hiddenSize * load.wireBytes);
  const wayRound = sum(stages.map((stage) => stage.compute + stage.link)) + hops + machine.stepSeconds;
  const slowest = Math.max(...stages.map((stage) => stage.compute + stage.link)) + machine.stepSeconds;
  const round = Math.max(wayRound, microBatches * slowest);
  const link = sum(stages.map((stage) => stage.link)) + hops;
  return {
    tokensPerSecond: workload.streams / round,
    tokenSeconds: round,
    linkShare: Math.min(1, link / round),
  };
}

interface Sharing {
  workers: number;
  busyReplicas: number;
  microBatches: number;
}

function stageTime(
  stage: StageLoad,
  vectorBytes: number,
  machine: MachineSpeed,
  { tokens, contextTokens }: { tokens: number; contextTokens: number },
  shared: Sharing,
): { compute: number; link: number } {
  // Cores that read memory at the same time share it: all ranks of a stage, stages with a micro-batch of their own, replicas.
  const busyStages = shared.microBatches;
  const threads = Math.max(1, Math.floor(machine.cores / shared.workers));
  const busyWorkers = stage.ranks.length * busyStages * shared.busyReplicas;
  const perWorker = kernelSpeed(machine.kernels, Math.min(machine.cores, busyWorkers * threads), tokens) / busyWorkers;
  const bytes = Math.max(...stage.ranks.map((rank) => rank.matrixBytes + tokens * contextTokens * rank.kvBytesPerToken));
  return { compute: bytes / perWorker, link: reductionTime(stage, tokens * vectorBytes, machine, shared.workers) };
}

/** Two reductions a layer. Everybody reads everybody's vectors, so the sum of what the others send counts. */
function reductionTime(stage: StageLoad, vectorBytes: number, machine: MachineSpeed, workers: number): number {
  if (stage.ranks.length === 1) return 0;
  const fewest = (index: 0 | 1): number => Math.min(...stage.ranks.map((rank) => rank.vectors[index]));
  const total = (index: 0 | 1): number => sum(stage.ranks.map((rank) => rank.vectors[index]));
  return (
    stage.layers * sum(([0, 1] as const).map((index) => exchange(machine, workers, (total(index) - fewest(index)) * vectorBytes)))
  );
}

/** One message of `bytes`. */
function exchange({ link, cores, wakeSeconds }: MachineSpeed, workers: number, bytes: number): number {
  return link.seconds + bytes / link.bytesPerSecond + (workers > cores ? wakeSeconds : 0);
}

/**
 * Bytes of matrices a second at any number of threads and tokens, from the measured points: straight lines between them, in speed over threads (through the origin
 * below the least one measured) and in time over tokens. Beyond the most threads measured it stays what it was; beyond the most tokens the line goes on.
 */
export function kernelSpeed(points: readonly KernelSpeed[], threads: number, tokens: number): number {
  const threadCounts = [...new Set(points.map((point) => point.threads))].sort((a, b) => a - b);
  const [least] = threadCounts;
  const most = threadCounts.at(-1);
  if (least === undefined || most === undefined) throw new RangeError('no kernel speed was measured');
  const at = (count: number): number =>
    speedOverTokens(
      points.filter((point) => point.threads === count),
      tokens,
    );
  if (threads <= least) return (at(least) * threads) / least;
  if (threads >= most) return at(most);
  const above = threadCounts.find((count) => count >= threads) ?? most;
  const below = threadCounts.findLast((count) => count <= threads) ?? least;
  if (above === below) return at(above);
  return at(below) + ((at(above) - at(below)) * (threads - below)) / (above - below);
}

/** Seconds a byte grow with the tokens of a step; @param points of one number of threads */
function speedOverTokens(points: readonly KernelSpeed[], tokens: number): number {
  const sorted = [...points].sort((a, b) => a.tokens - b.tokens);
  const upper = sorted.findIndex((point) => point.tokens >= tokens);
  const right = sorted[upper === -1 ? sorted.length - 1 : Math.max(upper, 1)] ?? sorted[0];
  const left = right ? sorted[sorted.indexOf(right) - 1] : undefined;
  if (!right) throw new RangeError('no kernel speed was measured');
  if (!left || left.tokens === right.tokens) return right.bytesPerSecond;
  // More tokens never make a step faster: noise must not extrapolate to nothing.
  const growth = Math.max(0, left.bytesPerSecond / right.bytesPerSecond - 1) / (right.tokens - left.tokens);
  return left.bytesPerSecond / (1 + growth * Math.max(0, tokens - left.tokens));
}

const sum = (values: readonly number[]): number => values.reduce((total, value) => total + value, 0);
