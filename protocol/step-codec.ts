/**
 * Step plans and step results as bytes: what crosses the broker for every step. Fixed little-endian words instead of MessagePack, so that neither side spends
 * more on them than a few microseconds; what is rare (the full data of a new sequence) stays MessagePack inside.
 *
 *   plans    mark kind count:u16, then each plan:
 *              placement:16 bytes  epoch step opened:u32 (bytes of MessagePack, 0: none) closed:u32 sequences:u32 resultWaits:u32 (0, 1)  waitTimeoutMs:f64  [opened] [closed:u32 ...]
 *              each sequence: slot position tokens:u32 (0: one row, see `after`) after newBlocks:u32 outputs:u32  [token ...] [block ...]
 *                each output: row score+1 (0: sample) banned:u32 [token ...]
 *   result   mark kind 0:u16  placement epoch step  totalUs collectiveUs receiveUs sampleUs idleUs:f64  outputs:u32
 *              each output: slot token candidates:u32 (times 2, plus 1 when there is a log-probability)  [logprob:f64]  [token:u32 logprob:f64 ...]
 *
 * The first byte is one that MessagePack never uses, so a receiver knows which of the two it has.
 */
import { ProtocolError } from './errors.ts';
import { idFromBytes, writeIdBytes } from './ids.ts';
import { messageLimits, stepLimits } from './limits.ts';
import { pack, unpack } from './pack.ts';
import type { PlannedOutput, PlannedSequence, SequenceOpen, StepOutput, StepPlan, StepPlans, StepResult } from './step-plan.ts';

export const stepMark = 0xc1;
const plansKind = 1;
const resultKind = 2;
const idBytes = 16;

/** Bytes of a message whose fields have been checked. */
export function packStep(message: StepPlans | StepResult): Uint8Array {
  writer.begin();
  if (message.type === 'step_plans') writePlans(message.plans);
  else writeResult(message);
  return writer.end();
}

/** Fields have their widths and counts fit the bytes; whether they are within their limits is for the caller to check. @throws {ProtocolError} */
export function unpackStep(bytes: Uint8Array): StepPlans | StepResult {
  const reader = new Reader(bytes);
  const kind = reader.word();
  const count = kind >>> 16;
  let message: StepPlans | StepResult;
  if ((kind & 0xffff) === ((plansKind << 8) | stepMark)) {
    const plans: StepPlan[] = [];
    for (let i = 0; i < count; i++) plans.push(readPlan(reader));
    message = { type: 'step_plans', plans };
  } else if (kind === ((resultKind << 8) | stepMark)) {
    message = readResult(reader);
  } else {
    throw new ProtocolError('byte 0', `not a message: kind 0x${kind.toString(16)} of a step message is not known`);
  }
  reader.end();
  return message;
}

// ------------------------------------------------------------------------------------------------------------------ plans

function writePlans(plans: readonly StepPlan[]): void {
  writer.word((plans.length << 16) | (plansKind << 8) | stepMark);
  for (const plan of plans) {
    const opened = plan.opened.length === 0 ? null : pack(plan.opened);
    writer.id(plan.placement);
    writer.word(plan.epoch);
    writer.word(plan.step);
    writer.word(opened?.length ?? 0);
    writer.word(plan.closed.length);
    writer.word(plan.sequences.length);
    writer.word(plan.resultWaits ? 1 : 0);
    writer.double(plan.waitTimeoutMs);
    if (opened !== null) writer.bytes(opened);
    writer.words(plan.closed);
    for (const sequence of plan.sequences) writeSequence(sequence);
  }
}

function readPlan(reader: Reader): StepPlan {
  const placement = reader.id();
  const epoch = reader.word();
  const step = reader.word();
  const openedBytes = reader.word();
  const closedCount = reader.word();
  const sequenceCount = reader.count(24);
  const resultWaits = reader.flag();
  const waitTimeoutMs = reader.double();
  const opened = openedBytes === 0 ? [] : (unpack(reader.bytes(openedBytes)) as SequenceOpen[]);
  const closed = reader.words(closedCount);
  const sequences: PlannedSequence[] = [];
  for (let i = 0; i < sequenceCount; i++) sequences.push(readSequence(reader));
  return { type: 'step_plan', placement, epoch, step, opened, closed, sequences, waitTimeoutMs, resultWaits };
}

function writeSequence({ slot, position, tokens, after, newBlocks, outputs }: PlannedSequence): void {
  writer.word(slot);
  writer.word(position);
  writer.word(tokens?.length ?? 0);
  writer.word(after);
  writer.word(newBlocks.length);
  writer.word(outputs.length);
  if (tokens !== null) writer.words(tokens);
  writer.words(newBlocks);
  for (const { row, score, banned } of outputs) {
    writer.word(row);
    writer.word(score === null ? 0 : score + 1);
    writer.word(banned.length);
    writer.words(banned);
  }
}

function readSequence(reader: Reader): PlannedSequence {
  const slot = reader.word();
  const position = reader.word();
  const tokenCount = reader.word();
  const after = reader.word();
  const blockCount = reader.word();
  const outputCount = reader.count(0);
  const tokens = tokenCount === 0 ? null : reader.words(tokenCount);
  const newBlocks = reader.words(blockCount);
  reader.expect(outputCount * 12);
  const outputs: PlannedOutput[] = [];
  for (let i = 0; i < outputCount; i++) {
    const row = reader.word();
    const score = reader.word();
    outputs.push({ row, score: score === 0 ? null : score - 1, banned: reader.words(reader.word()) });
  }
  return { slot, position, tokens, after, newBlocks, outputs };
}

// ------------------------------------------------------------------------------------------------------------------ results

function writeResult(result: StepResult): void {
  writer.word((resultKind << 8) | stepMark);
  writer.id(result.placement);
  writer.word(result.epoch);
  writer.word(result.step);
  writer.double(result.totalUs);
  writer.double(result.collectiveUs);
  writer.double(result.receiveUs);
  writer.double(result.sampleUs);
  writer.double(result.idleUs);
  writer.word(result.outputs.length);
  for (const { slot, token, logprob, top } of result.outputs) {
    writer.word(slot);
    writer.word(token);
    writer.word(top.length * 2 + (logprob === null ? 0 : 1));
    if (logprob !== null) writer.double(logprob);
    for (const candidate of top) {
      writer.word(candidate.token);
      writer.double(candidate.logprob);
    }
  }
}

function readResult(reader: Reader): StepResult {
  const placement = reader.id();
  const epoch = reader.word();
  const step = reader.word();
  const totalUs = reader.double();
  const collectiveUs = reader.double();
  const receiveUs = reader.double();
  const sampleUs = reader.double();
  const idleUs = reader.double();
  const outputCount = reader.count(12);
  const outputs: StepOutput[] = [];
  for (let i = 0; i < outputCount; i++) {
    const slot = reader.word();
    const token = reader.word();
    const shape = reader.word();
    const logprob = (shape & 1) === 0 ? null : reader.double();
    const candidates = shape >>> 1;
    reader.expect(candidates * 12);
    const top: StepOutput['top'] = [];
    for (let j = 0; j < candidates; j++) top.push({ token: reader.word(), logprob: reader.double() });
    outputs.push({ slot, token, logprob, top });
  }
  return { type: 'step_result', placement, epoch, step, outputs, totalUs, collectiveUs, receiveUs, sampleUs, idleUs };
}

// ------------------------------------------------------------------------------------------------------------------ words

/** One buffer for all messages, grown to the largest so far. */
class Writer {
  #bytes = new Uint8Array(1 << 14);
  #view = new DataView(this.#bytes.buffer);
  #at = 0;

  begin(): void {
    this.#at = 0;
  }

  end(): Uint8Array {
    return this.#bytes.slice(0, this.#at);
  }

  word(value: number): void {
    this.#reserve(4);
    this.#view.setUint32(this.#at, value, true);
    this.#at += 4;
  }

  words(values: readonly number[]): void {
    this.#reserve(values.length * 4);
    for (let i = 0; i < values.length; i++) this.#view.setUint32(this.#at + i * 4, values[i]!, true);
    this.#at += values.length * 4;
  }

  double(value: number): void {
    this.#reserve(8);
    this.#view.setFloat64(this.#at, value, true);
    this.#at += 8;
  }

  id(id: string): void {
    this.#reserve(idBytes);
    writeIdBytes(id, this.#bytes, this.#at);
    this.#at += idBytes;
  }

  bytes(bytes: Uint8Array): void {
    this.#reserve(bytes.length);
    this.#bytes.set(bytes, this.#at);
    this.#at += bytes.length;
  }

  #reserve(count: number): void {
    if (this.#at + count <= this.#bytes.length) return;
    const larger = new Uint8Array(Math.max(this.#at + count, 2 * this.#bytes.length));
    larger.set(this.#bytes);
    this.#bytes = larger;
    this.#view = new DataView(larger.buffer);
  }
}

const writer = new Writer();

/** Every count is held against the bytes that are left before anything is made in proportion to it. */
class Reader {
  readonly #bytes: Uint8Array;
  readonly #view: DataView;
  #at = 0;

  constructor(bytes: Uint8Array) {
    this.#bytes = bytes;
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  }

  expect(count: number): void {
    const left = this.#bytes.length - this.#at;
    if (count > left)
      throw new ProtocolError(`byte ${this.#at}`, `not a message: ends too early (${count} bytes needed, ${left} left)`);
  }

  word(): number {
    this.expect(4);
    const value = this.#view.getUint32(this.#at, true);
    this.#at += 4;
    return value;
  }

  flag(): boolean {
    const value = this.word();
    if (value > 1) throw new ProtocolError(`byte ${this.#at - 4}`, `not a message: ${value} where 0 or 1 is expected`);
    return value === 1;
  }

  /** A count of things of at least `each` bytes. */
  count(each: number): number {
    const count = this.word();
    this.expect(count * each);
    return count;
  }

  words(count: number): number[] {
    this.expect(count * 4);
    const values: number[] = [];
    for (let i = 0; i < count; i++) values.push(this.#view.getUint32(this.#at + i * 4, true));
    this.#at += count * 4;
    return values;
  }

  double(): number {
    this.expect(8);
    const value = this.#view.getFloat64(this.#at, true);
    this.#at += 8;
    return value;
  }

  id(): string {
    return knownId(this.bytes(idBytes));
  }

  bytes(count: number): Uint8Array {
    this.expect(count);
    this.#at += count;
    return this.#bytes.subarray(this.#at - count, this.#at);
  }

  end(): void {
    const left = this.#bytes.length - this.#at;
    if (left > 0) throw new ProtocolError(`byte ${this.#at}`, `not a message: ${left} bytes follow the message`);
  }
}

/** A process sees one placement nearly always: its text is kept. */
let lastIdBytes = new Uint8Array(0);
let lastId = '';
function knownId(bytes: Uint8Array): string {
  let same = lastIdBytes.length === bytes.length;
  for (let i = 0; same && i < bytes.length; i++) same = bytes[i] === lastIdBytes[i];
  if (!same) {
    lastIdBytes = bytes.slice();
    lastId = idFromBytes(bytes);
  }
  return lastId;
}

// ------------------------------------------------------------------------------------------------------------------ limits

const below = (value: number, end: number): boolean => value >>> 0 === value && value < end;
const allBelow = (values: readonly number[], end: number): boolean => {
  for (let i = 0; i < values.length; i++) if (!below(values[i]!, end)) return false;
  return true;
};

/** Step in which each slot was seen last, to find one that is planned twice. */
const seenSlots = new Uint32Array(stepLimits.sequencesMax);
let seenRound = 0;

/**
 * Whether everything of a plan but `opened` is within its limits: the checks of `message-codec.ts`, without their paths and at a tenth of the time. What fails
 * here goes there to be named.
 */
export function isSoundPlan({ epoch, step, closed, sequences, waitTimeoutMs, resultWaits }: StepPlan): boolean {
  const { sequencesMax, contextTokensMax, stepTokensMax, vocabularyMax, blocksMax, newBlocksMax, bannedMax } = stepLimits;
  if (!below(epoch, stepLimits.epochMax + 1) || !below(step, stepLimits.stepMax + 1) || step === 0) return false;
  if (!(waitTimeoutMs >= 1 && waitTimeoutMs <= stepLimits.waitTimeoutMsMax) || typeof resultWaits !== 'boolean') return false;
  if (closed.length > sequencesMax || !allBelow(closed, sequencesMax) || sequences.length > sequencesMax) return false;
  if (++seenRound > 0xffff_ffff) {
    seenSlots.fill(0);
    seenRound = 1;
  }
  let rows = 0;
  for (let i = 0; i < sequences.length; i++) {
    const { slot, position, tokens, after, newBlocks, outputs } = sequences[i]!;
    if (!below(slot, sequencesMax) || !below(position, contextTokensMax) || !below(after, stepLimits.stepMax + 1)) return false;
    if (seenSlots[slot] === seenRound) return false;
    seenSlots[slot] = seenRound;
    if (tokens === null ? after >= step : tokens.length === 0 || !allBelow(tokens, vocabularyMax)) return false;
    const sequenceRows = tokens?.length ?? 1;
    rows += sequenceRows;
    if (newBlocks.length > newBlocksMax || !allBelow(newBlocks, blocksMax)) return false;
    for (let j = 0; j < outputs.length; j++) {
      const { row, score, banned } = outputs[j]!;
      if (!below(row, sequenceRows) || (score !== null && !below(score, vocabularyMax))) return false;
      if (banned.length > bannedMax || !allBelow(banned, vocabularyMax)) return false;
    }
    if (outputs.length > stepTokensMax) return false;
  }
  return rows <= stepTokensMax;
}

/** As `isSoundPlan`, of a whole result whose outputs have no candidates. */
export function isSoundResult(result: StepResult): boolean {
  const { epoch, step, outputs } = result;
  if (!below(epoch, stepLimits.epochMax + 1) || !below(step, stepLimits.stepMax + 1) || step === 0) return false;
  for (const time of [result.totalUs, result.collectiveUs, result.receiveUs, result.sampleUs, result.idleUs])
    if (!(time >= 0 && time <= Number.MAX_SAFE_INTEGER)) return false;
  if (outputs.length > stepLimits.stepTokensMax) return false;
  for (let i = 0; i < outputs.length; i++) {
    const { slot, token, logprob, top } = outputs[i]!;
    if (!below(slot, stepLimits.sequencesMax) || !below(token, stepLimits.vocabularyMax) || logprob !== null || top.length > 0)
      return false;
  }
  return true;
}

/** Most plans of one message; together they stay far below the broker's payload limit. */
export const plansMax = 64;
export const plansBytesMax = messageLimits.payloadBytesMax / 8;
