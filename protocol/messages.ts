/**
 * Every control message of the mesh, as a union on `type`. Decoded and checked once, at the edge (`message-codec.ts`).
 * Life of a placement: join -> assign -> shard_ready (all) -> connect -> connected (all) -> step_plans / step_result ... -> next epoch or release.
 */
import type { LinkDriver, Placement } from './placement.ts';
import type { StepPlans, StepResult } from './step-plan.ts';
import type { CpuUse } from './trace.ts';

export interface WorkerFacts {
  /** Same value = same host and same process namespace: shared memory is possible. */
  hostId: string;
  pid: number;
  cpuModel: string;
  isa: string;
  cores: number;
  memoryBytes: number;
  /** What computes here; `auto`: whatever the coordinator says. */
  executor: string;
  /** The card of a `cuda` worker. */
  device: {
    name: string;
    sm: number;
    memoryBytes: number;
    multiprocessors: number;
    /** Of its memory, a second; 0: unknown. */
    bandwidthBytes: number;
    /** Most that it may take; 0: unknown. */
    powerWatts: number;
    /** Empty: unknown. */
    driver: string;
  } | null;
  /** `BuildInfo.arithmetic`: workers that differ must not share a placement. */
  arithmetic: string;
  /** host:port of the worker's gRPC server (links). */
  grpcAddress: string;
  /** host:port of the worker's sealed tcp links; empty where it has none. */
  tcpAddress: string;
  /** Products a second per core, measured at start (bytes/s of 4-bit weights at one token), for the planner. */
  weightBytesPerSecond: number;
}

/** Worker -> coordinator, on `reg`: at start, and whenever it finds itself unknown. */
export interface Join {
  type: 'join';
  worker: string;
  protocolMin: number;
  protocolMax: number;
  /** Highest epoch this worker has seen, so that epochs never go backwards. */
  epochSeen: number;
  facts: WorkerFacts;
}

/** Worker -> coordinator, every 500 ms, never late because of a long step. */
export interface Heartbeat {
  type: 'heartbeat';
  worker: string;
  /** What the worker believes; the coordinator asks it to join again where this is not what it knows. */
  state: 'idle' | 'loading' | 'ready' | 'connected' | 'failed' | 'draining';
  epoch: number;
  stepDone: number;
  plansQueued: number;
  rssBytes: number;
  stats: WorkerStats;
}

/** Sums since the worker loaded its shard, or of its links since it started; a bubble ratio is idle / (idle + busy) of a difference. */
export interface WorkerStats {
  steps: number;
  busyUs: number;
  idleUs: number;
  collectiveUs: number;
  receiveUs: number;
  framesOut: number;
  bytesOut: number;
  staleFrames: number;
  corruptFrames: number;
}

/** Everything a worker needs to build its program and get its slice. Tensor data never travels here. */
export interface Assign {
  type: 'assign';
  placement: Placement;
  stage: number;
  rank: number;
  /** Model description: hyper-parameters and tensor directory (`ModelFacts` of kernels/model-file), as the sender's JSON. */
  model: string;
  /** sha256 of the model file, and the sha256 this shard's slice must have. */
  sourceSha256: string;
  sliceSha256: string;
  /** Path that may exist on the worker's host; otherwise the slice is fetched from `weightsAddress` (gRPC). */
  modelPath: string;
  weightsAddress: string;
  executor: string;
  isa: string | null;
  cores: number[];
  spin: boolean;
  blockTokens: number;
  /** 0: as many as `kvCacheBytes` holds. */
  kvBlocks: number;
  kvCacheBytes: number;
  bits: 'exact' | 'per-kind' | 'free';
  activations: 'int8' | 'int16';
  kvType: 'auto' | 'int8' | 'f16-int8' | 'f16';
  contextTokensMax: number;
  stepTokensMax: number;
  sequencesMax: number;
}

export interface LoadProgress {
  type: 'load_progress';
  worker: string;
  epoch: number;
  bytesDone: number;
  bytesTotal: number;
  /** `disk`: the model file on this host; `cache`: the slice cache; `coordinator`: fetched. */
  source: 'disk' | 'cache' | 'coordinator';
}

/** Where the other ranks of a stage may read a worker's sums: memory of its card, exported (CUDA IPC, 64 bytes in hexadecimal), and a memory file of its host. */
export interface PeerMemory {
  pid: number;
  bytes: number;
  handle: string | null;
  fd: number | null;
  /** UUID of its card in hexadecimal. */
  card: string;
}

/** Shard loaded, digest right, outbound segment open. */
export interface ShardReady {
  type: 'shard_ready';
  worker: string;
  epoch: number;
  sliceSha256: string;
  tablesChecksum: string;
  kvBlocks: number;
  bytesFetched: number;
  loadMs: number;
  segment: { pid: number; fd: number; bytes: number } | null;
  /** Null: its executor does not reduce by itself. */
  peerMemory: PeerMemory | null;
}

export interface Connect {
  type: 'connect';
  placement: string;
  epoch: number;
  kvBlocks: number;
  /** Known to the workers of this epoch only: 32 bytes in hexadecimal that seal the tcp links. */
  linkKey: string;
  peers: {
    stage: number;
    rank: number;
    worker: string;
    hostId: string;
    grpcAddress: string;
    tcpAddress: string;
    segment: { pid: number; fd: number; bytes: number } | null;
    driver: LinkDriver;
    /** With driver `peer`: which memory, the same place for all ranks of the stage; else null. */
    memory: (PeerMemory & { place: 'card' | 'host' }) | null;
  }[];
}

export interface Connected {
  type: 'connected';
  worker: string;
  epoch: number;
}

/** A worker cannot go on: load failed, step failed. `peer`: the worker it waited for, when that is the reason. */
export interface WorkerFailed {
  type: 'worker_failed';
  worker: string;
  epoch: number;
  step: number;
  code: string;
  message: string;
  peer: string | null;
}

/** Coordinator -> worker: forget this placement (weights may stay cached), stop steps of epochs up to this one. */
export interface Release {
  type: 'release';
  epoch: number;
}

/** Coordinator -> worker, at its join and whenever there is one more: workers whose access was taken away. Streams with them end, none is taken from them. */
export interface Revoked {
  type: 'revoked';
  workers: string[];
}

/** Coordinator -> worker: send `join` again. */
export interface Rejoin {
  type: 'rejoin';
}

/** Coordinator -> worker: finish what is in flight, then leave. Worker -> coordinator: `leaving`. */
export interface Drain {
  type: 'drain';
}
export interface Leaving {
  type: 'leaving';
  worker: string;
}

/** Measured by the asked worker against a peer: echo of `bytes` over a link driver. */
export interface Probe {
  type: 'probe';
  id: number;
  peer: string;
  grpcAddress: string;
  driver: 'grpc' | 'nats';
  bytes: number;
  rounds: number;
}
export interface ProbeResult {
  type: 'probe_result';
  id: number;
  worker: string;
  peer: string;
  roundTripUs: number[];
  error: string | null;
}

/** Coordinator -> worker: tell your clock; begin to record spans (and tell it); stop, and send what was recorded. */
export interface Trace {
  type: 'trace';
  id: number;
  action: 'clock' | 'start' | 'stop';
}
export interface TraceClock {
  type: 'trace_clock';
  id: number;
  worker: string;
  /** Monotonic microseconds. */
  atUs: number;
}
/** A part of what was recorded; `spans` as `protocol/trace.ts` says, start counted from `baseUs`. */
export interface TraceSpans {
  type: 'trace_spans';
  id: number;
  worker: string;
  baseUs: number;
  names: string[];
  spans: number[];
  dropped: number;
  /** CPU time while it was taken; only the last part has it. */
  cpu: CpuUse | null;
}

export type WorkerMessage =
  | Join
  | Heartbeat
  | LoadProgress
  | ShardReady
  | Connected
  | WorkerFailed
  | Leaving
  | ProbeResult
  | TraceClock
  | TraceSpans
  | StepResult;
export type CoordinatorMessage = Assign | Connect | Release | Revoked | Rejoin | Drain | Probe | Trace | StepPlans;
export type Message = WorkerMessage | CoordinatorMessage;
