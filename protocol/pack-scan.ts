/**
 * Walks packed bytes (MessagePack) before they are unpacked, so that the unpacker meets only what messages are made of: null, booleans, integers, floats,
 * texts, lists, and maps with text keys. No extension types, no binary, nothing deeper or longer than allowed, no count that the bytes left cannot hold.
 * Allocates nothing.
 */
import { ProtocolError } from './errors.ts';

const depthMax = 16;

/** @throws {ProtocolError} */
export function scanPacked(bytes: Uint8Array): void {
  const end = scanValue(bytes, 0, 0);
  if (end !== bytes.length) refuse(end, `${bytes.length - end} bytes follow the message`);
}

function scanValue(bytes: Uint8Array, start: number, depth: number): number {
  if (depth > depthMax) refuse(start, `nested deeper than ${depthMax}`);
  const tag = byteAt(bytes, start);
  const at = start + 1;
  if (tag < 0x80 || tag >= 0xe0) return at;
  if (tag < 0x90) return scanMap(bytes, at, tag & 0x0f, depth);
  if (tag < 0xa0) return scanList(bytes, at, tag & 0x0f, depth);
  if (tag < 0xc0) return skip(bytes, at, tag & 0x1f);
  switch (tag) {
    case 0xc0: // null
    case 0xc2: // false
    case 0xc3: // true
      return at;
    case 0xcc: // 8-bit integers
    case 0xd0:
      return skip(bytes, at, 1);
    case 0xcd: // 16-bit integers
    case 0xd1:
      return skip(bytes, at, 2);
    case 0xca: // fp32 and 32-bit integers
    case 0xce:
    case 0xd2:
      return skip(bytes, at, 4);
    case 0xcb: // fp64 and 64-bit integers
    case 0xcf:
    case 0xd3:
      return skip(bytes, at, 8);
    case 0xd9:
      return skip(bytes, at + 1, unsigned(bytes, at, 1));
    case 0xda:
      return skip(bytes, at + 2, unsigned(bytes, at, 2));
    case 0xdb:
      return skip(bytes, at + 4, unsigned(bytes, at, 4));
    case 0xdc:
      return scanList(bytes, at + 2, unsigned(bytes, at, 2), depth);
    case 0xdd:
      return scanList(bytes, at + 4, unsigned(bytes, at, 4), depth);
    case 0xde:
      return scanMap(bytes, at + 2, unsigned(bytes, at, 2), depth);
    case 0xdf:
      return scanMap(bytes, at + 4, unsigned(bytes, at, 4), depth);
    default:
      return refuse(start, `type byte 0x${tag.toString(16)} is not used in messages`);
  }
}

function scanList(bytes: Uint8Array, start: number, count: number, depth: number): number {
  if (count > bytes.length - start) refuse(start, `a list of ${count} cannot fit ${bytes.length - start} bytes`);
  let at = start;
  for (let i = 0; i < count; i++) at = scanValue(bytes, at, depth + 1);
  return at;
}

function scanMap(bytes: Uint8Array, start: number, count: number, depth: number): number {
  if (count * 2 > bytes.length - start) refuse(start, `a map of ${count} cannot fit ${bytes.length - start} bytes`);
  let at = start;
  for (let i = 0; i < count; i++) {
    const tag = byteAt(bytes, at);
    const isText = (tag >= 0xa0 && tag < 0xc0) || tag === 0xd9;
    if (!isText) refuse(at, 'a key is not a short text');
    at = scanValue(bytes, at, depth + 1);
    at = scanValue(bytes, at, depth + 1);
  }
  return at;
}

function byteAt(bytes: Uint8Array, at: number): number {
  return bytes[at] ?? refuse(at, 'ends too early');
}

function skip(bytes: Uint8Array, at: number, count: number): number {
  if (count > bytes.length - at) refuse(at, 'ends too early');
  return at + count;
}

function unsigned(bytes: Uint8Array, at: number, width: number): number {
  let value = 0;
  for (let i = 0; i < width; i++) value = value * 256 + byteAt(bytes, at + i);
  return value;
}

function refuse(at: number, what: string): never {
  throw new ProtocolError(`byte ${at}`, `not a message: ${what} (byte ${at})`);
}
