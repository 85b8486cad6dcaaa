/**
 * Control messages as bytes. Both directions check every field against its type and its limit: a sender's mistake is found at the sender, and what a
 * receiver gets is a `Message` to the last list entry. Inside, MessagePack; step plans and results, of which there are hundreds a second, have a form
 * of their own (`step-codec.ts`) and a quick check before the one here.
 */
import {
  boolean,
  demand,
  describe,
  id,
  integer,
  integers,
  list,
  Mismatch,
  nullable,
  oneOf,
  pair,
  pathText,
  pattern,
  real,
  record,
  text,
  unsigned64,
  type Check,
} from './checks.ts';
import { ProtocolError } from './errors.ts';
import { isId } from './ids.ts';
import { httpLimits, meshLimits, messageLimits, stepLimits, traceLimits } from './limits.ts';
import type {
  Assign,
  Connect,
  Connected,
  CoordinatorMessage,
  Drain,
  Heartbeat,
  Join,
  Leaving,
  LoadProgress,
  Message,
  PeerMemory,
  Probe,
  ProbeResult,
  Rejoin,
  Release,
  Revoked,
  ShardReady,
  Trace,
  TraceClock,
  TraceSpans,
  WorkerFacts,
  WorkerFailed,
  WorkerMessage,
  WorkerStats,
} from './messages.ts';
import type { Placement, Range, RankPlacement, StagePlacement } from './placement.ts';
import { pack, unpack } from './pack.ts';
import { isSoundPlan, isSoundResult, packStep, plansMax, stepMark, unpackStep } from './step-codec.ts';
import type {
  PlannedOutput,
  PlannedSequence,
  SamplingParams,
  SequenceOpen,
  StepOutput,
  StepPlan,
  StepPlans,
  StepResult,
} from './step-plan.ts';
import { lanes, spanNumbers, type CpuUse } from './trace.ts';

/** @throws {ProtocolError} a field is not what its type and limit say, or the whole is over `payloadBytesMax`; `path` names it */
export function encodeMessage(message: Message): Uint8Array {
  checkMessage(message);
  const bytes = message.type === 'step_plans' || message.type === 'step_result' ? packStep(message) : pack(message);
  if (bytes.length > messageLimits.payloadBytesMax) throw tooLong(bytes.length);
  return bytes;
}

/** @throws {ProtocolError} and nothing else, whatever the bytes */
export function decodeMessage(bytes: Uint8Array): Message {
  if (bytes.length > messageLimits.payloadBytesMax) throw tooLong(bytes.length);
  if (bytes[0] === stepMark) return checkMessage(unpackStep(bytes));
  const message = checkMessage(unpack(bytes));
  if (message.type === 'step_plans' || message.type === 'step_result')
    throw new ProtocolError('type', `${message.type} has a form of its own and does not travel as MessagePack`);
  return message;
}

/** What a coordinator accepts. @throws {ProtocolError} as `decodeMessage`, and for a message that only coordinators send */
export function decodeWorkerMessage(bytes: Uint8Array): WorkerMessage {
  const message = decodeMessage(bytes);
  if (isWorkerMessage(message)) return message;
  throw new ProtocolError('type', `workers do not send ${message.type}`);
}

/** What a worker accepts. @throws {ProtocolError} as `decodeMessage`, and for a message that only workers send */
export function decodeCoordinatorMessage(bytes: Uint8Array): CoordinatorMessage {
  const message = decodeMessage(bytes);
  if (isWorkerMessage(message)) throw new ProtocolError('type', `coordinators do not send ${message.type}`);
  return message;
}

const tooLong = (bytes: number): ProtocolError =>
  new ProtocolError('message', `message of ${bytes} bytes is over the limit of ${messageLimits.payloadBytesMax}`);

const isWorkerMessage = (message: Message): message is WorkerMessage => message.type in workerChecks;

function checkMessage(value: unknown): Message {
  const type: unknown = typeof value === 'object' && value !== null && 'type' in value ? value.type : undefined;
  if (typeof type !== 'string' || !Object.hasOwn(messageChecks, type))
    throw new ProtocolError('type', `unknown message type ${describe(type)}`);
  if (isSound(value as Message)) return value as Message;
  try {
    return messageChecks[type as Message['type']](value);
  } catch (error) {
    if (!(error instanceof Mismatch)) throw error;
    const path = pathText(type, error);
    throw new ProtocolError(path, `${path} ${error.message}`);
  }
}

/** The quick look at what comes with every step. False: look closely. */
function isSound(message: Message): boolean {
  try {
    if (message.type === 'step_result') return isId(message.placement) && isSoundResult(message);
    if (message.type !== 'step_plans' || message.plans.length < 1 || message.plans.length > plansMax) return false;
    return message.plans.every((plan) => isId(plan.placement) && plan.opened.length === 0 && isSoundPlan(plan));
  } catch {
    // A list that is none.
    return false;
  }
}

const name = text(messageLimits.nameCharactersMax);
const message = text(messageLimits.textCharactersMax);
const path = text(messageLimits.pathCharactersMax);
const address = pattern(/^$|^[^\s/@]{1,270}:[0-9]{1,5}$/, 'host:port, or empty');
const sha256 = pattern(/^[0-9a-f]{64}$/, 'a sha256 in hexadecimal');
/** Sums and sizes: whole numbers that a double holds exactly. */
const count = integer(0, Number.MAX_SAFE_INTEGER);
/** Times and rates. */
const amount = real(0, Number.MAX_SAFE_INTEGER);
const epoch = integer(0, stepLimits.epochMax);
const step = integer(1, stepLimits.stepMax);
const version = integer(0, 0xffff);
const token = integer(0, stepLimits.vocabularyMax - 1);
const tokens = integers(stepLimits.contextTokensMax, 0, stepLimits.vocabularyMax - 1);
const slot = integer(0, stepLimits.sequencesMax - 1);
const stage = integer(0, meshLimits.stagesMax - 1);
const rank = integer(0, meshLimits.ranksMax - 1);
const process = integer(1, 0x7fff_ffff);
const linkDriver = oneOf('shm', 'peer', 'card', 'tcp', 'grpc', 'nats');
const linkKey = pattern(/^[0-9a-f]{64}$/, 'a key of 32 bytes in hexadecimal');
const type = <T extends string>(value: T): Check<T> => oneOf(value);

const range = (max: number): Check<Range> =>
  record<Range>({ from: integer(0, max), to: integer(0, max) }, (value) =>
    demand(value.from <= value.to, `runs from ${value.from} down to ${value.to}`),
  );

const segment = nullable(record<NonNullable<ShardReady['segment']>>({ pid: process, fd: integer(0, 0x7fff_ffff), bytes: count }));

const peerMemoryFields = {
  pid: process,
  bytes: count,
  handle: nullable(pattern(/^[0-9a-f]{128}$/, '64 bytes in hexadecimal')),
  fd: nullable(integer(0, 0x7fff_ffff)),
  card: pattern(/^[0-9a-f]{32}$/, '16 bytes in hexadecimal'),
};
const peerMemory = nullable(record<PeerMemory>(peerMemoryFields));
const linkMemory = nullable(
  record<NonNullable<Connect['peers'][number]['memory']>>({ ...peerMemoryFields, place: oneOf('card', 'host') }, (memory) =>
    demand(memory[memory.place === 'card' ? 'handle' : 'fd'] !== null, `has none in the place ${memory.place}`),
  ),
);

const workerFacts = record<WorkerFacts>({
  hostId: name,
  pid: process,
  cpuModel: name,
  isa: name,
  cores: integer(0, 1 << 16),
  memoryBytes: count,
  executor: name,
  device: nullable(
    record<NonNullable<WorkerFacts['device']>>({
      name,
      sm: integer(0, 9_999),
      memoryBytes: count,
      multiprocessors: integer(0, 1 << 16),
      bandwidthBytes: amount,
      powerWatts: amount,
      driver: name,
    }),
  ),
  arithmetic: name,
  grpcAddress: address,
  tcpAddress: address,
  weightBytesPerSecond: amount,
});

const workerStats = record<WorkerStats>({
  steps: count,
  busyUs: amount,
  idleUs: amount,
  collectiveUs: amount,
  receiveUs: amount,
  framesOut: count,
  bytesOut: count,
  staleFrames: count,
  corruptFrames: count,
});

const units = range(meshLimits.unitsMax);
const placement = record<Placement>({
  id,
  epoch,
  model: name,
  stages: list(
    record<StagePlacement>({
      layers: range(meshLimits.layersMax),
      ranks: list(
        record<RankPlacement>({ worker: id, attentionUnits: units, feedForwardUnits: units, vocabularyUnits: units }),
        meshLimits.ranksMax,
        1,
      ),
    }),
    meshLimits.stagesMax,
    1,
  ),
  link: oneOf('shm', 'tcp', 'grpc', 'nats', 'auto'),
  wire: oneOf('f32', 'bf16', 'q8'),
});

const sampling = record<SamplingParams>({
  temperature: real(0, 100),
  topP: real(0, 1),
  topK: integer(0, stepLimits.vocabularyMax),
  minP: real(0, 1),
  seed: unsigned64,
  choice: integer(0, httpLimits.choicesMax - 1),
  repetitionPenalty: real(0, 100),
  presencePenalty: real(-100, 100),
  frequencyPenalty: real(-100, 100),
  logitBias: list(pair(token, real(-1e4, 1e4)), httpLimits.logitBiasMax),
  logprobs: nullable(integer(0, httpLimits.logprobsMax)),
});

const sequenceOpen = record<SequenceOpen>({ slot, sampling, promptTokens: tokens, outputTokens: tokens });

const plannedOutput = record<PlannedOutput>({
  row: integer(0, stepLimits.stepTokensMax - 1),
  score: nullable(token),
  banned: integers(stepLimits.bannedMax, 0, stepLimits.vocabularyMax - 1),
});

const plannedSequence = record<PlannedSequence>(
  {
    slot,
    position: integer(0, stepLimits.contextTokensMax - 1),
    tokens: nullable(integers(stepLimits.stepTokensMax, 0, stepLimits.vocabularyMax - 1)),
    after: integer(0, stepLimits.stepMax),
    newBlocks: integers(stepLimits.newBlocksMax, 0, stepLimits.blocksMax - 1),
    outputs: list(plannedOutput, stepLimits.stepTokensMax),
  },
  (sequence) => {
    const rows = rowsOf(sequence);
    demand(rows > 0, 'has no rows');
    for (const { row } of sequence.outputs) demand(row < rows, `asks for row ${row} of ${rows}`);
  },
);

const rowsOf = (sequence: PlannedSequence): number => sequence.tokens?.length ?? 1;

const stepPlan = record<StepPlan>(
  {
    type: type('step_plan'),
    placement: id,
    epoch,
    step,
    opened: list(sequenceOpen, stepLimits.sequencesMax),
    closed: integers(stepLimits.sequencesMax, 0, stepLimits.sequencesMax - 1),
    sequences: list(plannedSequence, stepLimits.sequencesMax),
    waitTimeoutMs: real(1, stepLimits.waitTimeoutMsMax),
    resultWaits: boolean,
  },
  (plan) => {
    let rows = 0;
    const slots = new Set<number>();
    for (const sequence of plan.sequences) {
      rows += rowsOf(sequence);
      demand(!slots.has(sequence.slot), `plans slot ${sequence.slot} twice`);
      slots.add(sequence.slot);
      // A row whose token is what a step commits needs a step that comes before.
      demand(sequence.tokens !== null || sequence.after < plan.step, `waits in step ${plan.step} for step ${sequence.after}`);
    }
    demand(rows <= stepLimits.stepTokensMax, `has ${rows} rows, the limit is ${stepLimits.stepTokensMax}`);
  },
);

const candidate = record<{ token: number; logprob: number }>({ token, logprob: real(-1e9, 1e9) });

const stepResult = record<StepResult>({
  type: type('step_result'),
  placement: id,
  epoch,
  step,
  outputs: list(
    record<StepOutput>({
      slot,
      token,
      logprob: nullable(real(-1e9, 1e9)),
      top: list(candidate, httpLimits.logprobsMax),
    }),
    stepLimits.stepTokensMax,
  ),
  totalUs: amount,
  collectiveUs: amount,
  receiveUs: amount,
  sampleUs: amount,
  idleUs: amount,
});

type Checks<M extends Message> = { [T in M['type']]: Check<Extract<M, { type: T }>> };

const workerChecks: Checks<WorkerMessage> = {
  join: record<Join>({
    type: type('join'),
    worker: id,
    protocolMin: version,
    protocolMax: version,
    epochSeen: epoch,
    facts: workerFacts,
  }),
  heartbeat: record<Heartbeat>({
    type: type('heartbeat'),
    worker: id,
    state: oneOf('idle', 'loading', 'ready', 'connected', 'failed', 'draining'),
    epoch,
    stepDone: integer(0, stepLimits.stepMax),
    plansQueued: count,
    rssBytes: count,
    stats: workerStats,
  }),
  load_progress: record<LoadProgress>({
    type: type('load_progress'),
    worker: id,
    epoch,
    bytesDone: count,
    bytesTotal: count,
    source: oneOf('disk', 'cache', 'coordinator'),
  }),
  shard_ready: record<ShardReady>({
    type: type('shard_ready'),
    worker: id,
    epoch,
    sliceSha256: sha256,
    tablesChecksum: name,
    kvBlocks: integer(0, stepLimits.blocksMax),
    bytesFetched: count,
    loadMs: amount,
    segment,
    peerMemory,
  }),
  connected: record<Connected>({ type: type('connected'), worker: id, epoch }),
  worker_failed: record<WorkerFailed>({
    type: type('worker_failed'),
    worker: id,
    epoch,
    step: integer(0, stepLimits.stepMax),
    code: name,
    message,
    peer: nullable(id),
  }),
  leaving: record<Leaving>({ type: type('leaving'), worker: id }),
  probe_result: record<ProbeResult>({
    type: type('probe_result'),
    id: count,
    worker: id,
    peer: id,
    roundTripUs: list(amount, messageLimits.probeRoundsMax),
    error: nullable(message),
  }),
  trace_clock: record<TraceClock>({ type: type('trace_clock'), id: count, worker: id, atUs: amount }),
  trace_spans: record<TraceSpans>(
    {
      type: type('trace_spans'),
      id: count,
      worker: id,
      baseUs: amount,
      names: list(name, traceLimits.namesMax),
      spans: list(amount, traceLimits.spansPerMessageMax * spanNumbers),
      dropped: count,
      cpu: nullable(record<CpuUse>({ loopUs: amount, loopWaitUs: amount, processUs: amount })),
    },
    ({ names, spans }) => {
      demand(spans.length % spanNumbers === 0, `has ${spans.length} numbers of spans, a multiple of ${spanNumbers} is needed`);
      for (let i = 0; i < spans.length; i += spanNumbers) {
        demand(names[spans[i]!] !== undefined, `has no name ${spans[i]}`);
        demand(lanes[spans[i + 1]!] !== undefined, `has no lane ${spans[i + 1]}`);
      }
    },
  ),
  step_result: stepResult,
};

const coordinatorChecks: Checks<CoordinatorMessage> = {
  assign: record<Assign>({
    type: type('assign'),
    placement,
    stage,
    rank,
    model: text(messageLimits.modelCharactersMax),
    sourceSha256: sha256,
    sliceSha256: sha256,
    modelPath: path,
    weightsAddress: address,
    executor: name,
    isa: nullable(name),
    cores: integers(meshLimits.coresMax, 0, 0xffff),
    spin: boolean,
    blockTokens: integer(stepLimits.blockTokensMin, stepLimits.blockTokensMax),
    kvBlocks: integer(0, stepLimits.blocksMax),
    kvCacheBytes: count,
    bits: oneOf('exact', 'per-kind', 'free'),
    activations: oneOf('int8', 'int16'),
    kvType: oneOf('auto', 'int8', 'f16-int8', 'f16'),
    contextTokensMax: integer(1, stepLimits.contextTokensMax),
    stepTokensMax: integer(1, stepLimits.stepTokensMax),
    sequencesMax: integer(1, stepLimits.sequencesMax),
  }),
  connect: record<Connect>({
    type: type('connect'),
    placement: id,
    epoch,
    kvBlocks: integer(1, stepLimits.blocksMax),
    linkKey,
    peers: list(
      record<Connect['peers'][number]>({
        stage,
        rank,
        worker: id,
        hostId: name,
        grpcAddress: address,
        tcpAddress: address,
        segment,
        driver: linkDriver,
        memory: linkMemory,
      }),
      meshLimits.workersMax,
    ),
  }),
  release: record<Release>({ type: type('release'), epoch }),
  revoked: record<Revoked>({ type: type('revoked'), workers: list(id, meshLimits.revokedMax) }),
  rejoin: record<Rejoin>({ type: type('rejoin') }),
  drain: record<Drain>({ type: type('drain') }),
  probe: record<Probe>({
    type: type('probe'),
    id: count,
    peer: id,
    grpcAddress: address,
    driver: oneOf('grpc', 'nats'),
    bytes: integer(0, messageLimits.probeBytesMax),
    rounds: integer(1, messageLimits.probeRoundsMax),
  }),
  trace: record<Trace>({ type: type('trace'), id: count, action: oneOf('clock', 'start', 'stop') }),
  step_plans: record<StepPlans>({ type: type('step_plans'), plans: list(stepPlan, plansMax, 1) }),
};

const messageChecks: { [T in Message['type']]: Check<Message> } = { ...workerChecks, ...coordinatorChecks };
