/**
 * Frames larger than a NATS message travel as chunks: each is a frame of its own with the same header but for `length`, `offset` and `crc32`, so that
 * losing, repeating or swapping chunks is seen and harmless.
 */
import { FrameError } from './errors.ts';
import { frameHeaderBytes, sealFrame, type Frame, type FrameHeader } from './frame-codec.ts';
import { frameLimits } from './limits.ts';

/**
 * Cuts one payload into frames of at most `chunkBytesMax` payload bytes, in order.
 * @param payloadBytesMax  most bytes of one message on the transport, header included
 */
export function* encodeFrameChunks(header: FrameHeader, payload: Uint8Array, payloadBytesMax: number): Generator<Buffer> {
  const chunkBytes = Math.min(frameLimits.chunkBytesMax, payloadBytesMax - frameHeaderBytes);
  if (chunkBytes < frameLimits.chunkBytesMin)
    throw new FrameError('length', `messages of ${payloadBytesMax} bytes are too small for chunks of frames`);
  const total = payload.length;
  let offset = 0;
  do {
    const length = Math.min(chunkBytes, total - offset);
    const frame = Buffer.allocUnsafe(frameHeaderBytes + length);
    frame.set(payload.subarray(offset, offset + length), frameHeaderBytes);
    sealFrame(frame, header, { offset, total });
    yield frame;
    offset += length;
  } while (offset < total);
}

interface PartialFrame {
  epoch: number;
  rows: number;
  dtype: string;
  bytes: Uint8Array;
  received: number;
  /** Length by offset of the chunks that are here. */
  chunks: Map<number, number>;
}

/**
 * Joins chunks to whole frames, for one receiver. Memory is bounded: beyond the limits the oldest incomplete frame is dropped, and its step will fail
 * by its deadline.
 */
export class FrameAssembler {
  readonly #partial = new Map<string, PartialFrame>();
  readonly #framesMax: number;
  readonly #bytesMax: number;
  #bytes = 0;
  #dropped = 0;

  constructor(
    limits: { framesMax: number; bytesMax: number } = {
      framesMax: frameLimits.partialFramesMax,
      bytesMax: frameLimits.partialBytesMax,
    },
  ) {
    this.#framesMax = limits.framesMax;
    this.#bytesMax = limits.bytesMax;
  }

  /** Incomplete frames dropped to stay within the limits. */
  get dropped(): number {
    return this.#dropped;
  }

  get pendingBytes(): number {
    return this.#bytes;
  }

  /**
   * @returns the whole frame once its last chunk is here (at once when it was never cut), else null
   * @throws {FrameError} `chunk`: contradicts earlier chunks of the same frame, which is then dropped
   */
  add(chunk: Frame): Frame | null {
    if (chunk.payload.length === chunk.total) return chunk;
    const last = chunk.offset + chunk.payload.length === chunk.total;
    if (!last && chunk.payload.length < frameLimits.chunkBytesMin)
      throw new FrameError('chunk', `chunk of ${chunk.payload.length} bytes is below the least of ${frameLimits.chunkBytesMin}`);
    const key = `${chunk.placement}.${chunk.epoch}.${chunk.step}.${chunk.kind}.${chunk.operation}.${chunk.subtree}.${chunk.source.stage}.${chunk.source.rank}`;
    const partial = this.#partial.get(key) ?? this.#begin(key, chunk);
    if (partial.bytes.length !== chunk.total || partial.rows !== chunk.rows || partial.dtype !== chunk.dtype)
      this.#refuse(
        key,
        `chunk at ${chunk.offset} belongs to a payload of ${chunk.total} bytes, earlier ones to ${partial.bytes.length}`,
      );
    const length = partial.chunks.get(chunk.offset);
    if (length !== undefined) {
      if (length !== chunk.payload.length)
        this.#refuse(key, `chunk at ${chunk.offset} came with ${length} and ${chunk.payload.length} bytes`);
      return null;
    }
    partial.chunks.set(chunk.offset, chunk.payload.length);
    partial.bytes.set(chunk.payload, chunk.offset);
    partial.received += chunk.payload.length;
    if (partial.received < chunk.total) return null;
    if (!contiguous(partial)) this.#refuse(key, `chunks overlap in a payload of ${chunk.total} bytes`);
    this.#forget(key);
    return { ...chunk, offset: 0, payload: partial.bytes };
  }

  /** Drops incomplete frames of epochs before this one. */
  forgetBefore(epoch: number): void {
    for (const [key, partial] of this.#partial) if (partial.epoch < epoch) this.#forget(key);
  }

  #begin(key: string, chunk: Frame): PartialFrame {
    if (chunk.total > this.#bytesMax)
      throw new FrameError('chunk', `payload of ${chunk.total} bytes is over the room of ${this.#bytesMax}`);
    while (this.#partial.size >= this.#framesMax || this.#bytes + chunk.total > this.#bytesMax) {
      const oldest = this.#partial.keys().next();
      if (oldest.done) break;
      this.#forget(oldest.value);
      this.#dropped++;
    }
    const partial: PartialFrame = {
      epoch: chunk.epoch,
      rows: chunk.rows,
      dtype: chunk.dtype,
      bytes: new Uint8Array(chunk.total),
      received: 0,
      chunks: new Map(),
    };
    this.#partial.set(key, partial);
    this.#bytes += chunk.total;
    return partial;
  }

  #forget(key: string): void {
    const partial = this.#partial.get(key);
    if (!partial) return;
    this.#partial.delete(key);
    this.#bytes -= partial.bytes.length;
  }

  #refuse(key: string, message: string): never {
    this.#forget(key);
    throw new FrameError('chunk', message);
  }
}

function contiguous(partial: PartialFrame): boolean {
  let end = 0;
  for (const offset of [...partial.chunks.keys()].sort((a, b) => a - b)) {
    if (offset !== end) return false;
    end = offset + (partial.chunks.get(offset) ?? 0);
  }
  return end === partial.bytes.length;
}
