/**
 * What the native addon offers, as types. `index.ts` is the facade that loads it. Nothing here knows NATS, gRPC or messages: frames that must
 * leave the host go out through a callback and come in through `deliver`.
 */
import type { Program } from './programs/program.ts';

export type Isa = 'amx' | 'avx512' | 'avx2' | 'portable';
export type ExecutorKind = 'cpu' | 'cuda' | 'reference' | 'reference-f32';

/** `bf16` rounds to nearest even; `q8` takes 34 bytes for 32 values. */
export type WireType = 'f32' | 'bf16' | 'q8';

export interface CpuFeatures {
  model: string;
  isas: Isa[];
  /** Logical cores this process may run on. */
  cores: number[];
  hugePages: 'always' | 'madvise' | 'never' | 'unknown';
}

export interface CudaCard {
  name: string;
  /** 80: compute capability 8.0. */
  sm: number;
  memoryBytes: number;
  multiprocessors: number;
  /** Of its memory, a second, by clock and bus; 0: unknown. */
  bandwidthBytes: number;
  /** Most that it may take; 0: unknown. */
  powerWatts: number;
  /** Version of the driver; empty: unknown. */
  driver: string;
}

/** The card that an executor of kind `cuda` would use, or why there is none, in one line. */
export type CudaFacts = { card: CudaCard; absent: null } | { card: null; absent: string };

export interface BuildInfo {
  version: string;
  compiler: string;
  /** Digest of everything that could change a bit (arithmetic version). Two workers whose values differ must not share a placement. */
  arithmetic: string;
}

export interface ExecutorOptions {
  kind: ExecutorKind;
  /** For `cpu`; `null` takes the best the machine has. */
  isa: Isa | null;
  program: Program;
  /** Logical cores the compute threads are pinned to, one thread each; empty: `threads` threads, not pinned. */
  cores: number[];
  threads: number;
  /** False when more ranks than cores share the host: waits go to the futex at once. */
  spin: boolean;
  /** Multiple of 16. */
  blockTokens: number;
  kvBlocks: number;
  stepTokensMax: number;
  /** Sequence slots; slot ids are below this. */
  sequencesMax: number;
  /** `onStep` is not called, except for traced steps; `totals` counts them all. Absent: false. */
  quietSteps?: boolean;
  /** Ranks of every stage, in order; absent: every stage has as many as the program's own. Links are laid out by it. */
  ranksPerStage?: number[];
  /** How reductions and hidden states travel, the same on all ranks of the mesh; absent: as they are. */
  wire?: WireType;
  /** Bytes of room in front of the payload of each frame that leaves, in the same memory, for a header; absent: 0. */
  frameGap?: number;
  /** For `cuda`: what `shardmesh tune` wrote for cards of this host; absent: what is built in. It changes no bit. */
  cudaTuning?: string;
}

/** Largest number of blocks that fits, before anything is allocated. */
export interface KvSizing {
  bytesPerBlock: number;
}

export interface SlotSampling {
  temperature: number;
  topP: number;
  /** 0: off. */
  topK: number;
  minP: number;
  seed: bigint;
  choice: number;
  repetitionPenalty: number;
  presencePenalty: number;
  frequencyPenalty: number;
  /** Token id, bias pairs. */
  logitBias: [number, number][];
  /** Best tokens whose log-probability is returned with each output, 0..20; `null`: not even the sampled token's. */
  logprobs: number | null;
}

/** Opens a sequence slot. Penalties count these tokens: prompt for repetition, output for all three. */
export interface SlotOpen {
  slot: number;
  sampling: SlotSampling;
  promptTokens: Int32Array;
  outputTokens: Int32Array;
}

/** One output row of a step, before it is put into numbers. */
export interface OutputRow {
  /** Row of the step (0..T-1). */
  row: number;
  /** Token id whose log-probability is wanted instead of a sample (prompt log-probabilities); `null`: sample. */
  score: number | null;
  /** Ids that must not be sampled in this position (end tokens below min_tokens). */
  banned: readonly number[];
}

/**
 * One micro-batch. Rows of one sequence are adjacent and ascending in position. Arrays are copied before `submit` returns.
 */
export interface StepInput {
  /** Ascending within an epoch, from 1. */
  step: number;
  /** [T] token id, or -1: the token that step `tokenSteps[row]` sampled for the row's slot. */
  tokenIds: Int32Array;
  tokenSteps: Int32Array;
  /** [T] absolute position. */
  positions: Int32Array;
  /** [T] index into `slots`. */
  rowSequence: Int32Array;
  /** [S] */
  slots: Int32Array;
  /** [S + 1] offsets into `blockTables`. */
  blockTableOffsets: Int32Array;
  /** Block ids of each sequence from position 0. */
  blockTables: Int32Array;
  /** [row, token to score or -1, count of banned ids, ...those] of each output row: `outputNumbers` of `index.ts`. */
  outputs: Int32Array;
  /** A wait inside this step that lasts longer than this fails the step (per wait, not for the step). */
  waitTimeoutMs: number;
  /** Its end need not be told of before that of the next step: one wake-up of the event loop for both. Default: it is. */
  resultWaits?: boolean;
}

export interface OutputResult {
  slot: number;
  /** Sampled id, or the scored id. */
  token: number;
  /** log-probability of `token`; `null` when not asked for. Exact fp32 value. */
  logprob: number | null;
  top: { token: number; logprob: number }[];
}

export interface StepTimings {
  /** Microseconds on the compute thread: whole step, waiting in collectives, waiting for the stage before, sampling. */
  totalUs: number;
  collectiveUs: number;
  receiveUs: number;
  sampleUs: number;
  /** Idle time before the step began, since the step before it ended; by the device's own clock where it had the step already then. */
  idleUs: number;
}

export interface StepDone {
  step: number;
  /** Empty on every worker but rank 0 of the last stage. */
  outputs: OutputResult[];
  timings: StepTimings;
  /** On the compute thread, CLOCK_MONOTONIC. */
  beganUs: number;
  endedUs: number;
  /** Null unless traced. */
  spans: StepSpans | null;
}

/** What the compute thread did in a traced step: [index into `names`, began, ended] of each action and of each wait inside one, microseconds. */
export interface StepSpans {
  names: string[];
  values: Float64Array;
}

/** Sums over all steps that were done. */
export interface StepTotals {
  steps: number;
  /** Of the epoch that runs, or ran last. */
  lastStep: number;
  timings: StepTimings;
}

/**
 * Steps of up to `rows` rows as graphs of kernels: nodes of each piece between two actions of the host, how many edges between them let a kernel start while the one before it
 * runs, how many steps took them, and how many of those the device had before the host knew the result of the step in front of them.
 */
export interface GraphFacts {
  rows: number;
  nodes: number[];
  programmaticEdges: number[];
  steps: number;
  stepsBehind: number;
}

/** A frame of the mesh between ranks: reductions, gathers, hidden states, sampled ids. Same fields as the wire header. */
export type FrameKind = 'reduce' | 'rows' | 'logits' | 'hidden' | 'tokens';

export interface NativeFrame {
  kind: FrameKind;
  step: number;
  /** Index of the operation in the program, the same on all ranks of a stage (`reduce`, `rows`, `logits`); 0 for `hidden` and `tokens`. */
  operation: number;
  /** Number of the piece: rows of a large step travel in several frames, each holding all of the sender's subtrees for its rows. 0 when there is one. */
  subtree: number;
  source: PeerAddress;
  rows: number;
  payload: Uint8Array;
}

export interface PeerAddress {
  stage: number;
  rank: number;
}

/**
 * How this worker reaches one peer. `shm`: attach to the peer's segment. `peer`: that too, and reductions read the peer's memory on its card or in a memory file of the
 * host, without frames; then all ranks of the stage do so. `card`: the same for executors of this process on one card, which do each step together there. `tcp`: the connection that the last `NativeTcp.meet` made. `host`: frames leave through
 * `onFrame`, come in through `deliver`.
 */
export type PeerLink =
  | ({ peer: PeerAddress; driver: 'shm' } & SegmentInfo)
  | ({ peer: PeerAddress; driver: 'peer'; memory: PeerMemoryLink; epoch: number } & SegmentInfo)
  | ({ peer: PeerAddress; driver: 'card'; epoch: number } & SegmentInfo)
  | { peer: PeerAddress; driver: 'tcp' }
  | { peer: PeerAddress; driver: 'host' };

/** Sums over all epochs. `corrupt`: frames that did not open, each of which ended its connection; `refused`: callers that were not let in. */
export interface TcpCounters {
  framesOut: number;
  bytesOut: number;
  framesIn: number;
  bytesIn: number;
  corrupt: number;
  refused: number;
}

export interface TcpMeeting {
  self: PeerAddress;
  epoch: number;
  /** 32 bytes that the workers of this epoch share and nobody else knows. */
  key: Uint8Array;
  /** `address`: host:port of the peer's endpoint. */
  peers: { peer: PeerAddress; address: string }[];
  timeoutMs: number;
}

/** The listening socket of a worker, and the connections of the current epoch. Frames never come to JavaScript. */
export interface NativeTcp {
  readonly port: number;
  /** One sealed connection with each peer, for the next `NativeExecutor.connect`. Rejects naming the peers that did not come. One meeting at a time. */
  meet(meeting: TcpMeeting): Promise<void>;
  counters(): TcpCounters;
  /** Ends a meeting that is going on. Idempotent. */
  close(): void;
}

/** Own outbound segment: an anonymous memory file that peers on this host open through /proc/<pid>/fd/<fd>. Nothing to unlink, nothing left by SIGKILL. */
export interface SegmentInfo {
  pid: number;
  fd: number;
  bytes: number;
}

/** Where the ranks of a stage may read this executor's sums: `handle` exports memory of its card to other processes (CUDA IPC, 64 bytes in hexadecimal), `fd` is a memory file. */
export interface PeerMemoryInfo {
  pid: number;
  bytes: number;
  handle: string | null;
  fd: number | null;
  /** UUID of the card that writes it, in hexadecimal. */
  card: string;
}

/** With the place that all ranks of a stage use: `card` needs the handle, `host` the memory file. */
export interface PeerMemoryLink extends PeerMemoryInfo {
  place: 'card' | 'host';
}

export interface ExecutorCallbacks {
  onStep(done: StepDone): void;
  onFrame(destination: PeerAddress, frame: NativeFrame): void;
  /**
   * The step failed: deadline of a wait or a lost connection (the peer is named in the message), non-finite value, abort. The executor takes no further step until
   * `connect`; after `device_lost` no executor of this process has a device any more.
   */
  onStepFailed(
    step: number,
    code: 'wait_timeout' | 'link_lost' | 'non_finite' | 'aborted' | 'device_lost' | 'internal',
    message: string,
    peer: PeerAddress | null,
  ): void;
}

export interface WeightReport {
  /** Largest relative error of the repack against the file's own values; 0 when exact. */
  repackError: number;
  bytes: number;
}

export interface NativeExecutor {
  readonly isa: string;
  readonly bytes: number;
  /** One line on how it computes, for people; empty: nothing to say. */
  readonly note: string;
  /** Raw blocks of the slice `program.weights[index]`, rows in order. Repacks off the event loop; `data` must not change until the promise is settled. */
  loadWeight(index: number, data: Uint8Array): Promise<WeightReport>;
  /** Checksum of the rope tables, compared when a worker joins. */
  tablesChecksum(): string;
  /** Makes a fresh outbound segment for a new epoch. Any earlier segment and its peers are let go. */
  openSegment(): SegmentInfo;
  /** Null: it has none; its sums leave as frames. The same for every epoch. */
  peerMemory(): PeerMemoryInfo | null;
  /** Attaches to peers; must cover every rank of the own stage, of the stage before, of the stage after, and (last stage) of stage 0. Clears slots, KV contents and failures. `tcp`: where peers of that driver are met. */
  connect(peers: PeerLink[], tcp?: NativeTcp): void;
  openSlots(slots: SlotOpen[]): void;
  closeSlots(slots: number[]): void;
  /** Queues a step; steps run in order on the compute threads without returning to JavaScript between them. */
  submit(step: StepInput): void;
  /** A frame of the host driver that arrived; the bytes are copied. False: nobody wants it (unknown peer, wrong kind, late, twice, too many waiting). */
  deliver(frame: NativeFrame): boolean;
  totals(): StepTotals;
  /** While no step runs. Empty where the executor has no graphs. */
  graphs(): GraphFacts[];
  /** From the next step on, every action and every wait is recorded (`StepDone.spans`), or none. */
  trace(on: boolean): void;
  /** Fails the running and queued steps. Resolves when the compute threads are idle. */
  abort(reason: string): Promise<void>;
  /** Ends the compute threads and frees everything. Idempotent; anything else throws afterwards. */
  dispose(): Promise<void>;
}

export interface NativeAddon {
  buildInfo(): BuildInfo;
  cpuFeatures(): CpuFeatures;
  /** Opens the driver, where this build has a CUDA part. */
  cudaFacts(): CudaFacts;
  kvBytesPerBlock(program: Program, blockTokens: number): number;
  createExecutor(options: ExecutorOptions, callbacks: ExecutorCallbacks): NativeExecutor;
  /** Listens. Port 0: a free one. Throws when this Node carries no OpenSSL, or the address cannot be had. */
  openTcp(host: string, port: number): NativeTcp;
}

/**
 * Single operations for tests (`kernels/binding/kernel_test.cpp` says what each takes). `set` is a kernel set by name, `auto` for the best; `parts` splits the
 * work as threads would.
 */
export interface KernelTest {
  readRows(args: KernelTestMatrix): Float32Array;
  /** [subtrees][tokens][rows] */
  linear(
    args: KernelTestMatrix & {
      activations: 'int8' | 'int16';
      x: Float32Array;
      tokens: number;
      segments: number[];
      subtrees: [first: number, count: number][];
      bias: Float32Array | null;
    },
  ): Float32Array;
  rmsNorm(
    args: KernelTestCall & { x: Float32Array; w: Float32Array; epsilon: number; width: number; tokens: number },
  ): Float32Array;
  rope(
    args: KernelTestCall & {
      x: Float32Array;
      heads: number;
      headSize: number;
      dimensions: number;
      style: 'adjacent' | 'half';
      base: number;
      scale: number;
      positions: number[];
    },
  ): Float32Array;
  gatedActivation(
    args: KernelTestCall & {
      gate: Float32Array;
      up: Float32Array;
      width: number;
      tokens: number;
      activation: 'silu' | 'gelu_tanh';
    },
  ): Float32Array;
  finishTree(
    args: KernelTestCall & {
      units: number;
      nodes: [lo: number, hi: number][];
      values: Float32Array;
      bias: Float32Array | null;
      residual: Float32Array;
      width: number;
      tokens: number;
    },
  ): Float32Array;
  /** Stores k and v of positions 0.. of one sequence, then attends from its last `rows` positions. `fill`: byte that the cache holds before. */
  attention(
    args: KernelTestCall & {
      key: 'int8' | 'f16' | 'f32';
      value: 'int8' | 'f16' | 'f32';
      heads: number;
      headSize: number;
      kvHeads: number;
      kvHead: number[];
      scale: number;
      window: number | null;
      blockTokens: number;
      blockTable: number[];
      k: Float32Array;
      v: Float32Array;
      q: Float32Array;
      rows: number;
      fill: number;
    },
  ): Float32Array;
  /** One row on its way between ranks: its bytes, what a receiver takes from them, and the length of a tcp frame that holds it. */
  wire(args: { type: WireType; x: Float32Array }): { bytes: Uint8Array; values: Float32Array; tcpBytes: number };
  /** Our own functions; `gumbel` takes token ids, under a fixed key. */
  elementary(args: { name: 'exp' | 'log' | 'gumbel' | 'sin' | 'cos'; x: Float32Array }): Float32Array;
  /** The token sampled at each position of [from, to), from the same logits and state. */
  sample(args: {
    logits: Float32Array;
    positions: [from: number, to: number];
    temperature: number;
    topP: number;
    topK: number;
    minP: number;
    seed: bigint;
    choice: number;
    repetition: number;
    presence: number;
    frequency: number;
    bias: [token: number, bias: number][];
    prompt: number[];
    output: number[];
    banned: number[];
  }): Int32Array;
  /** Log-probability of `token`, then (id, log-probability) pairs of the `top` best. */
  score(args: { logits: Float32Array; token: number; top: number }): Float32Array;
}

export interface KernelTestCall {
  set: string;
  parts: number;
}

/** Columns [from, from + columns) of `rows` rows; `data` holds the blocks that cover them. */
export interface KernelTestMatrix extends KernelTestCall {
  type: string;
  rows: number;
  from: number;
  columns: number;
  data: Uint8Array;
}
