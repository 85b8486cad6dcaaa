/**
 * Predicts tokens/s of a placement from a handful of measured numbers. Pure: no clock, no machine, no model file.
 *
 *   step of a stage   = bytes read by its ranks, as its cores can share them / speed of those cores  +  2 reductions a layer (none when one rank holds the stage)
 *   one stream        = 1 / (sum of all stages + one hop after each stage + fixed cost + serving): a token needs the token before it
 *   several streams   = micro-batches fill the stages; the slowest stage sets the pace, and one stream's way round is the least a round takes
 *   serving           = CPU of coordinator, broker and event loops, where no core is left for it beside the threads that compute
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

/** CPU that a step takes besides computing, in all processes together. */
export interface ServiceCost {
  /** Plan, result, one token, with one worker. */
  stepSeconds: number;
  /** For each further worker. */
  workerSeconds: number;
  /** For each further sequence of the step. */
  sequenceSeconds: number;
}

export interface MachineSpeed {
  /** Cores that may compute. */
  cores: number;
  /** All cores of the machine. Coordinator, broker and event loops use those that do not compute, if there are any. */
  hostCores: number;
  /** At least one point. */
  kernels: readonly KernelSpeed[];
  link: LinkSpeed;
  /** A step's time that depends neither on bytes nor on the split: sampling, hand-over. */
  stepSeconds: number;
  /** From a message to the moment a thread that sleeps for it runs: in every hop to a stage that has nothing else to do. */
  wakeSeconds: number;
  service: ServiceCost;
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
      : load.stages.length *
        (exchange(machine, shared.workers, tokens * load.hiddenSize * load.wireBytes) + machine.wakeSeconds + coldHopSeconds);
  const service = serviceTime(
    machine,
    { workers: workersOfOne, streams, microBatches },
    Math.max(...stages.map(({ threads }) => threads)),
  );
  const wayRound = sum(stages.map((stage) => stage.compute + stage.link)) + hops + machine.stepSeconds;
  const slowest = Math.max(...stages.map((stage) => stage.compute + stage.link)) + machine.stepSeconds;
  const round = Math.max(wayRound, microBatches * slowest) + service;
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

interface StageTime {
  compute: number;
  link: number;
  /** That compute at the same time, of all stages and replicas. */
  threads: number;
}

function stageTime(
  stage: StageLoad,
  vectorBytes: number,
  machine: MachineSpeed,
  { tokens, contextTokens }: { tokens: number; contextTokens: number },
  shared: Sharing,
): StageTime {
  // Stages with a micro-batch of their own and replicas run at the same time and share cores and memory.
  const busyGroups = shared.microBatches * shared.busyReplicas;
  const threadsOfWorker = Math.max(1, Math.floor(machine.cores / shared.workers));
  const coresOfStage = Math.max(1, Math.floor(machine.cores / busyGroups));
  const ranksAtOnce = Math.min(stage.ranks.length, Math.max(1, Math.floor(coresOfStage / threadsOfWorker)));
  const threads = Math.min(machine.cores, busyGroups * ranksAtOnce * threadsOfWorker);
  const perRank = kernelSpeed(machine.kernels, threads, tokens) / (busyGroups * ranksAtOnce);
  const bytes = stage.ranks.map((rank) => rank.matrixBytes + tokens * contextTokens * rank.kvBytesPerToken);
  return {
    compute: makespan(bytes, ranksAtOnce) / perRank,
    link: reductionTime(stage, tokens * vectorBytes, machine, shared.workers),
    threads,
  };
}

/** The least time that `slots` need for jobs that are not divided: each job, largest first, goes to whoever has least (Graham's LPT rule). */
function makespan(jobs: readonly number[], slots: number): number {
  const loads = Array.from({ length: slots }, () => 0);
  for (const job of [...jobs].sort((a, b) => b - a)) {
    const least = Math.min(...loads);
    loads[loads.indexOf(least)] = least + job;
  }
  return Math.max(...loads);
}

/**
 * How much longer a round takes because coordinator, broker and event loops need the cores that compute. Threads wait for each other in every operation, so a
 * core that is taken holds all of them up, unless another is taken at the same time.
 */
function serviceTime(
  { hostCores, service }: MachineSpeed,
  { workers, streams, microBatches }: { workers: number; streams: number; microBatches: number },
  threads: number,
): number {
  if (threads < hostCores) return 0;
  const cpu =
    microBatches * (service.stepSeconds + (workers - 1) * service.workerSeconds) +
    Math.max(0, streams - microBatches) * service.sequenceSeconds;
  return cpu * Math.max(1 / hostCores, heldUp);
}

/** Share of that CPU time that holds computing up, fitted to measured placements. */
const heldUp = 0.75;

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
function exchange({ link, cores }: MachineSpeed, workers: number, bytes: number): number {
  return link.seconds + bytes / link.bytesPerSecond + (workers > cores ? crowdedSeconds : 0);
}

/**
 * With more workers than cores nobody spins, and whoever is woken waits for a core that others compute on. Fitted to placements of three and four workers on two cores of a Xeon
 * and of an EPYC, which differ little here, while a core that sleeps (`wakeSeconds`) took 10 us to wake on the one and 35 to 80 on the other.
 */
const crowdedSeconds = 75e-6;

/** What a stage loses that begins after it had nothing to do, besides being woken: caches, clock. Fitted to pipelines of two and three stages on the same machines. */
const coldHopSeconds = 250e-6;

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
