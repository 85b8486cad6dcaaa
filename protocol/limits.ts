/** Every limit of the mesh, in one place. What arrives is checked against these before anything is allocated in proportion to it. */

const KiB = 1024;
const MiB = 1024 * KiB;

/** Spoken by this build. A release reads the versions between min and max. */
export const protocolVersionMin = 1;
export const protocolVersionMax = 1;

/** HTTP, from the outermost bound inward. */
export const httpLimits = {
  bodyBytesMax: 4 * MiB,
  headerBytesMax: 16 * KiB,
  headersTimeoutMs: 10_000,
  bodyTimeoutMs: 30_000,
  jsonDepthMax: 64,
  choicesMax: 8,
  promptsMax: 16,
  messagesMax: 2_048,
  logprobsMax: 20,
  logitBiasMax: 1_024,
  stopStringsMax: 16,
  stopStringCharactersMax: 256,
  stopTokenIdsMax: 256,
  modelNamePattern: /^[A-Za-z0-9._-]{1,96}$/,
  userCharactersMax: 256,
  waitingRequestsMax: 256,
  requestTimeoutMs: 600_000,
  streamBufferBytesMax: 256 * KiB,
  streamBufferTokensMax: 1_024,
  slowReaderTimeoutMs: 30_000,
  keepAliveCommentMs: 10_000,
} as const;

/** Chat templates come from model files: untrusted code. */
export const templateLimits = {
  sourceCharactersMax: 256 * KiB,
  stepsMax: 200_000,
  outputBytesMax: MiB,
  depthMax: 64,
} as const;

/** Shape of a mesh. A model has at most 16 units and each rank holds at least one. */
export const meshLimits = {
  stagesMax: 64,
  ranksMax: 16,
  workersMax: 256,
  /** Revoked workers whose certificates are not over yet. */
  revokedMax: 4_096,
  layersMax: 1_024,
  unitsMax: 1 << 20,
  coresMax: 1_024,
} as const;

/** Steps and sequences. */
export const stepLimits = {
  epochMax: 0xffff_ffff,
  stepMax: 0xffff_ffff,
  sequencesMax: 1_024,
  stepTokensMax: 16_384,
  contextTokensMax: 1 << 20,
  blocksMax: 1 << 24,
  blockTokensMin: 16,
  blockTokensMax: 1_024,
  /** Of one message: above this a table is split over several steps. */
  newBlocksMax: 1 << 16,
  vocabularyMax: 1 << 20,
  bannedMax: 1_024,
  waitTimeoutMsMax: 600_000,
} as const;

/** NATS messages. Bounded by the broker's payload limit; the model description is the only long field. */
export const messageLimits = {
  /** `max_payload` of the private broker; a server that says less is obeyed. */
  payloadBytesMax: MiB,
  modelCharactersMax: 768 * KiB,
  pathCharactersMax: 4_096,
  textCharactersMax: 4_096,
  nameCharactersMax: 256,
  addressCharactersMax: 280,
  probeBytesMax: 4 * MiB,
  probeRoundsMax: 10_000,
} as const;

/** Frames between ranks. */
export const frameLimits = {
  /** Payload of one frame on a gRPC stream: 4,096 tokens of 4,096 features in fp32. */
  payloadBytesMax: 64 * MiB,
  /** Payload of one chunk on NATS; a chunk and its header stay below `max_payload`. */
  chunkBytesMax: 512 * KiB,
  /** Of every chunk but the last, so that a payload has a bounded number of them. */
  chunkBytesMin: KiB,
  rowsMax: 1 << 20,
  /** Frames of one source that may be incomplete at a time (chunks missing), and bytes they may hold together. */
  partialFramesMax: 64,
  partialBytesMax: 128 * MiB,
} as const;

/** gRPC. */
export const grpcLimits = {
  /** A frame, its header, and room. */
  messageBytesMax: 64 * MiB + 4 * KiB,
  /** A part of a weight slice. */
  weightPartBytes: MiB,
  weightRequestBytesMax: MiB,
  streamsMax: 100,
  keepaliveTimeMs: 1_000,
  keepaliveTimeoutMs: 2_000,
} as const;

/** A trace: spans are kept in memory while it is taken, and travel in parts. */
export const traceLimits = {
  millisecondsMax: 30_000,
  /** Of one process; about 100 bytes each in the finished file. */
  spansMax: 500_000,
  spansPerMessageMax: 8_000,
  namesMax: 256,
  clockRounds: 9,
  answerTimeoutMs: 5_000,
} as const;

/** Enrollment of workers on other hosts. */
export const enrollmentLimits = {
  minutesMax: 15,
  /** Tokens that may be open at a time, and that are remembered once they are not, for a better answer than "unknown". */
  openTokensMax: 64,
  rememberedTokensMax: 256,
  /** Wrong secrets for one token before it is void. */
  attemptsMax: 5,
  /** Of one address, and addresses that are heard at all. */
  requestsPerMinuteMax: 20,
  addressesPerMinuteMax: 256,
  bodyBytesMax: 8 * KiB,
  connectionsMax: 32,
  timeoutMs: 10_000,
} as const;

/** Timers of the control plane, milliseconds. Clocks are monotonic. */
export const meshTimers = {
  heartbeatMs: 500,
  suspectMs: 1_500,
  deadMs: 3_000,
  stepTimeoutMsMin: 2_000,
  pingIntervalMs: 1_000,
  pingOutMax: 2,
  connectTimeoutMs: 2_000,
  reconnectMinMs: 100,
  reconnectMaxMs: 250,
  drainMs: 10_000,
  transportCloseMs: 5_000,
} as const;
