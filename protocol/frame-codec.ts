/**
 * The frame: what one rank sends another. One fixed header, little-endian, then the payload. Nothing in it is an address, an offset into somebody's
 * memory or a size the receiver obeys: the receiver knows from its own plan what must come, and the header says which of those this is.
 *
 *   at  bytes  field
 *    0   4     magic       "SMFR"
 *    4   2     version     protocol version of the sender
 *    6   1     kind        reduce 1, rows 2, logits 3, hidden 4, tokens 5, probe 6, echo 7
 *    7   1     dtype       f32 1, bf16 2, q8 3, i32 4, bytes 5
 *    8  16     mesh        id
 *   24  16     placement   id
 *   40   4     epoch       of the placement; frames of older ones change nothing
 *   44   4     step        from 1 within the epoch (0 in probes)
 *   48   2     operation   index in the sender's program
 *   50   2     subtree     index among the sender's maximal subtrees (reduce), else 0
 *   52   2     stage       source: its stage
 *   54   2     rank        source: its rank
 *   56   4     rows        tokens or sequences in the payload
 *   60   4     length      bytes that follow this header
 *   64   4     offset      where they belong in the whole payload; 0 unless it was cut into chunks
 *   68   4     total       bytes of the whole payload; `length` unless it was cut
 *   72   4     reserved    0
 *   76   4     crc32       of bytes 0..75 and the payload
 *   80         payload
 */
import { crc32 } from 'node:zlib';
import { FrameError } from './errors.ts';
import { idFromBytes, isId, writeIdBytes, type Id } from './ids.ts';
import { frameLimits, protocolVersionMax, protocolVersionMin } from './limits.ts';

/** `probe` and `echo` measure a link: `echo` brings the payload of `probe` back. The others are frames of a step. */
export type FrameKind = 'reduce' | 'rows' | 'logits' | 'hidden' | 'tokens' | 'probe' | 'echo';
export type FrameDtype = 'f32' | 'bf16' | 'q8' | 'i32' | 'bytes';

export interface FrameSource {
  stage: number;
  rank: number;
}

export interface FrameHeader {
  mesh: Id;
  placement: Id;
  epoch: number;
  step: number;
  operation: number;
  subtree: number;
  kind: FrameKind;
  source: FrameSource;
  dtype: FrameDtype;
  rows: number;
}

export interface Frame extends FrameHeader {
  /** Where `payload` belongs in the whole payload of `total` bytes. A whole frame has offset 0 and `total` = its length. */
  offset: number;
  total: number;
  /** View on the decoded bytes, not a copy, at any alignment. */
  payload: Uint8Array;
}

export const frameHeaderBytes = 80;
const magic = 0x52464d53;
const crcAt = 76;

const kindCodes: Record<FrameKind, number> = { reduce: 1, rows: 2, logits: 3, hidden: 4, tokens: 5, probe: 6, echo: 7 };
const dtypeCodes: Record<FrameDtype, number> = { f32: 1, bf16: 2, q8: 3, i32: 4, bytes: 5 };
/** Payloads are whole elements: a q8 group is a scale and 32 values. */
const dtypeBytes: Record<FrameDtype, number> = { f32: 4, bf16: 2, q8: 34, i32: 4, bytes: 1 };

const byCode = <Name extends string>(codes: Record<Name, number>): (Name | undefined)[] => {
  const names: (Name | undefined)[] = [];
  for (const [name, code] of Object.entries(codes)) names[code as number] = name as Name;
  return names;
};
const kindOf = byCode(kindCodes);
const dtypeOf = byCode(dtypeCodes);

/**
 * Header and payload in one buffer.
 * @param gap  bytes in front of the payload, in the same memory, that may be written over; with `frameHeaderBytes` or more the payload stays where it is and
 *   must not change any more, else it is copied
 */
export function encodeFrame(header: FrameHeader, payload: Uint8Array, gap = 0): Buffer {
  if (gap >= frameHeaderBytes) {
    const whole = Buffer.from(payload.buffer, payload.byteOffset - frameHeaderBytes, frameHeaderBytes + payload.length);
    sealFrame(whole, header);
    return whole;
  }
  const frame = Buffer.allocUnsafe(frameHeaderBytes + payload.length);
  frame.set(payload, frameHeaderBytes);
  sealFrame(frame, header);
  return frame;
}

/** The header alone, for a sender that writes it and the payload one after the other. */
export function encodeFrameHeader(header: FrameHeader, payload: Uint8Array): Buffer {
  const bytes = Buffer.allocUnsafe(frameHeaderBytes);
  writeHeader(bytes, header, payload.length, { offset: 0, total: payload.length });
  bytes.writeUInt32LE(crc32(payload, crc32(bytes.subarray(0, crcAt))), crcAt);
  return bytes;
}

/**
 * Writes the header into the first `frameHeaderBytes` of a buffer whose payload is already in place behind them.
 * @throws {FrameError} `range`, `length`: the caller's values do not fit the header (nothing was sent yet)
 */
export function sealFrame(frame: Buffer, header: FrameHeader, chunk?: { offset: number; total: number }): void {
  const length = frame.length - frameHeaderBytes;
  if (length < 0) throw new FrameError('short', `a frame has at least ${frameHeaderBytes} bytes, this buffer ${frame.length}`);
  writeHeader(frame, header, length, chunk ?? { offset: 0, total: length });
  frame.writeUInt32LE(crc32(frame.subarray(frameHeaderBytes), crc32(frame.subarray(0, crcAt))), crcAt);
}

/**
 * Checks a frame and gives its fields. Allocates nothing in proportion to anything the frame says.
 * @param mesh  the receiver's mesh; a frame of another is refused
 * @throws {FrameError} and nothing else
 */
export function decodeFrame(bytes: Uint8Array, mesh?: Id): Frame {
  if (bytes.length < frameHeaderBytes)
    throw new FrameError('short', `a frame has at least ${frameHeaderBytes} bytes, got ${bytes.length}`);
  const buffer = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const foundMagic = buffer.readUInt32LE(0);
  if (foundMagic !== magic)
    throw new FrameError('magic', `a frame begins with 0x${magic.toString(16)}, got 0x${foundMagic.toString(16)}`);
  const version = buffer.readUInt16LE(4);
  if (version < protocolVersionMin || version > protocolVersionMax)
    throw new FrameError(
      'version',
      `frame of protocol version ${version}; this build reads ${protocolVersionMin} to ${protocolVersionMax}`,
    );
  const length = buffer.readUInt32LE(60);
  if (length > frameLimits.payloadBytesMax)
    throw new FrameError('length', `payload of ${length} bytes is over the limit of ${frameLimits.payloadBytesMax}`);
  if (length !== bytes.length - frameHeaderBytes)
    throw new FrameError('length', `the header announces ${length} bytes, ${bytes.length - frameHeaderBytes} follow it`);
  const payload = buffer.subarray(frameHeaderBytes);
  const crc = crc32(payload, crc32(buffer.subarray(0, crcAt)));
  if (crc !== buffer.readUInt32LE(crcAt))
    throw new FrameError('crc', `crc32 is 0x${crc.toString(16)}, the header says 0x${buffer.readUInt32LE(crcAt).toString(16)}`);

  // From here on the bytes are what some sender meant. It may still be another version's, or wrong.
  const kind = kindOf[buffer.readUInt8(6)];
  if (kind === undefined) throw new FrameError('kind', `unknown frame kind ${buffer.readUInt8(6)}`);
  const dtype = dtypeOf[buffer.readUInt8(7)];
  if (dtype === undefined) throw new FrameError('dtype', `unknown frame dtype ${buffer.readUInt8(7)}`);
  if (buffer.readUInt32LE(72) !== 0) throw new FrameError('reserved', 'the reserved field is not 0');
  const offset = buffer.readUInt32LE(64);
  const total = buffer.readUInt32LE(68);
  const rows = buffer.readUInt32LE(56);
  const source = { stage: buffer.readUInt16LE(52), rank: buffer.readUInt16LE(54) };
  checkExtent({ rows, dtype, length, offset, total });
  const found = idFromBytes(buffer.subarray(8, 24)) as Id;
  if (mesh !== undefined && found !== mesh) throw new FrameError('mesh', `frame of mesh ${found}, this is mesh ${mesh}`);
  return {
    mesh: found,
    placement: idFromBytes(buffer.subarray(24, 40)) as Id,
    epoch: buffer.readUInt32LE(40),
    step: buffer.readUInt32LE(44),
    operation: buffer.readUInt16LE(48),
    subtree: buffer.readUInt16LE(50),
    kind,
    source,
    dtype,
    rows,
    offset,
    total,
    payload,
  };
}

function writeHeader(bytes: Buffer, header: FrameHeader, length: number, chunk: { offset: number; total: number }): void {
  checkUnsigned('epoch', header.epoch, 0xffff_ffff);
  checkUnsigned('step', header.step, 0xffff_ffff);
  checkUnsigned('operation', header.operation, 0xffff);
  checkUnsigned('subtree', header.subtree, 0xffff);
  checkUnsigned('stage', header.source.stage, 0xffff);
  checkUnsigned('rank', header.source.rank, 0xffff);
  checkUnsigned('rows', header.rows, frameLimits.rowsMax);
  if (!isId(header.mesh)) throw new FrameError('range', 'mesh is not an id');
  if (!isId(header.placement)) throw new FrameError('range', 'placement is not an id');
  checkExtent({ rows: header.rows, dtype: header.dtype, length, ...chunk });
  bytes.writeUInt32LE(magic, 0);
  bytes.writeUInt16LE(protocolVersionMax, 4);
  bytes.writeUInt8(kindCodes[header.kind], 6);
  bytes.writeUInt8(dtypeCodes[header.dtype], 7);
  writeIdBytes(header.mesh, bytes, 8);
  writeIdBytes(header.placement, bytes, 24);
  bytes.writeUInt32LE(header.epoch, 40);
  bytes.writeUInt32LE(header.step, 44);
  bytes.writeUInt16LE(header.operation, 48);
  bytes.writeUInt16LE(header.subtree, 50);
  bytes.writeUInt16LE(header.source.stage, 52);
  bytes.writeUInt16LE(header.source.rank, 54);
  bytes.writeUInt32LE(header.rows, 56);
  bytes.writeUInt32LE(length, 60);
  bytes.writeUInt32LE(chunk.offset, 64);
  bytes.writeUInt32LE(chunk.total, 68);
  bytes.writeUInt32LE(0, 72);
}

function checkUnsigned(name: string, value: number, max: number): void {
  if (!Number.isInteger(value) || value < 0 || value > max)
    throw new FrameError('range', `${name} must be an integer of 0 to ${max}, got ${value}`);
}

/** Both ends: how much the payload is and where it belongs. */
function checkExtent(frame: { rows: number; dtype: FrameDtype; length: number; offset: number; total: number }): void {
  const { rows, dtype, length, offset, total } = frame;
  if (rows > frameLimits.rowsMax) throw new FrameError('range', `${rows} rows are over the limit of ${frameLimits.rowsMax}`);
  if (total > frameLimits.payloadBytesMax)
    throw new FrameError('length', `payload of ${total} bytes is over the limit of ${frameLimits.payloadBytesMax}`);
  if (offset + length > total)
    throw new FrameError('length', `bytes ${offset} to ${offset + length} do not lie in a payload of ${total}`);
  if (length === 0 && total !== 0) throw new FrameError('length', `an empty chunk of a payload of ${total} bytes`);
  if (total % dtypeBytes[dtype] !== 0)
    throw new FrameError(
      'length',
      `${total} bytes are not a whole number of ${dtype} elements (${dtypeBytes[dtype]} bytes each)`,
    );
}
