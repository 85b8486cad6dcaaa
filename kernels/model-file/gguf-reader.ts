/**
 * Reads the header of a GGUF file (version 2 or 3, little-endian): metadata and tensor directory. Every count and length is checked against the bytes that
 * are left before anything is allocated for it; the directory is checked against the file's end, so that no tensor is ever read short. Only a window of the
 * header is in memory at a time, never tensor data.
 *
 *   magic "GGUF", u32 version, u64 tensors, u64 keys | key, type, value ... | name, u32 dims, u64 ne[dims], u32 type, u64 offset ... | padding | data
 *
 * Source: the GGUF specification of the ggml project.
 */
import { isUtf8 } from 'node:buffer';
import { closeSync, fstatSync, openSync, readSync } from 'node:fs';
import type { TensorType } from '../programs/program.ts';
import { ModelFileError, quoted } from './model-file-error.ts';
import { describeTypeId, quantTypeById } from './quant-types.ts';
import { checkVocabulary } from './vocabulary-check.ts';

export const ggufLimits = {
  /** All of the header, tensor directory included. */
  headerBytesMax: 256 * 1024 * 1024,
  keysMax: 65_536,
  keyBytesMax: 1_024,
  stringBytesMax: 4 * 1024 * 1024,
  arrayLengthMax: 1 << 22,
  tensorsMax: 65_536,
  tensorNameBytesMax: 64,
  dimensionsMax: 4,
  alignmentMin: 8,
  alignmentMax: 4_096,
} as const;

export type GgufScalarType = 'u8' | 'i8' | 'u16' | 'i16' | 'u32' | 'i32' | 'f32' | 'bool' | 'string' | 'u64' | 'i64' | 'f64';

export type GgufArray = string[] | boolean[] | number[] | Float32Array | Float64Array | Int32Array | Uint32Array | Uint8Array;

export type GgufValue =
  | { type: Exclude<GgufScalarType, 'bool' | 'string'>; value: number | bigint }
  | { type: 'bool'; value: boolean }
  | { type: 'string'; value: string }
  | { type: 'array'; elements: GgufScalarType; value: GgufArray };

export interface GgufTensor {
  name: string;
  type: TensorType;
  /** 1 to 4 dimensions, the contiguous one first (ggml's `ne`): a matrix is [columns, rows]. */
  shape: number[];
  /** From the start of the file. */
  offset: number;
  bytes: number;
}

/** Scalar types by their number in the file; 9 is the array. */
const scalarTypes: readonly (GgufScalarType | 'array')[] = [
  'u8',
  'i8',
  'u16',
  'i16',
  'u32',
  'i32',
  'f32',
  'bool',
  'string',
  'array',
  'u64',
  'i64',
  'f64',
];

/** Least bytes of a value: a string has at least its length. */
const scalarBytes: Readonly<Record<GgufScalarType, number>> = {
  u8: 1,
  i8: 1,
  u16: 2,
  i16: 2,
  u32: 4,
  i32: 4,
  f32: 4,
  bool: 1,
  string: 8,
  u64: 8,
  i64: 8,
  f64: 8,
};

/** Header of a model file. Questions for a key answer null when it is absent and throw when it has another type than asked for. */
export class GgufFile {
  readonly path: string;
  readonly bytes: number;
  readonly version: number;
  readonly alignment: number;
  /** Where tensor data begins. */
  readonly dataOffset: number;
  readonly metadata: ReadonlyMap<string, GgufValue>;
  readonly tensors: readonly GgufTensor[];

  constructor(fields: Pick<GgufFile, 'path' | 'bytes' | 'version' | 'alignment' | 'dataOffset' | 'metadata' | 'tensors'>) {
    this.path = fields.path;
    this.bytes = fields.bytes;
    this.version = fields.version;
    this.alignment = fields.alignment;
    this.dataOffset = fields.dataOffset;
    this.metadata = fields.metadata;
    this.tensors = fields.tensors;
  }

  has(key: string): boolean {
    return this.metadata.has(key);
  }

  getString(key: string): string | null {
    const found = this.metadata.get(key);
    if (!found) return null;
    if (found.type !== 'string') throw wrongType(key, found, 'a string');
    return found.value;
  }

  getBoolean(key: string): boolean | null {
    const found = this.metadata.get(key);
    if (!found) return null;
    if (found.type !== 'bool') throw wrongType(key, found, 'a bool');
    return found.value;
  }

  /** Any number type. @throws {ModelFileError} also where a 64-bit integer is beyond 2^53 */
  getNumber(key: string): number | null {
    const found = this.metadata.get(key);
    if (!found) return null;
    if (found.type === 'array' || found.type === 'string' || found.type === 'bool') throw wrongType(key, found, 'a number');
    if (typeof found.value === 'bigint')
      throw new ModelFileError('bad_value', `key ${key} is ${found.value}, limit 2^53`, {
        key,
        value: found.value,
        limit: 2 ** 53,
      });
    return found.value;
  }

  getStringArray(key: string): string[] | null {
    const found = this.metadata.get(key);
    if (!found) return null;
    if (found.type !== 'array' || found.elements !== 'string') throw wrongType(key, found, 'an array of strings');
    return found.value as string[];
  }

  getNumberArray(key: string): ArrayLike<number> | null {
    const found = this.metadata.get(key);
    if (!found) return null;
    if (found.type !== 'array' || found.elements === 'string' || found.elements === 'bool')
      throw wrongType(key, found, 'an array of numbers');
    return found.value as ArrayLike<number>;
  }

  tensor(name: string): GgufTensor | null {
    return this.tensors.find((tensor) => tensor.name === name) ?? null;
  }
}

function wrongType(key: string, found: GgufValue, wanted: string): ModelFileError {
  const type = found.type === 'array' ? `array of ${found.elements}` : found.type;
  return new ModelFileError('bad_value_type', `key ${key} has type ${type}, ${wanted} is needed`, {
    key,
    value: type,
    limit: wanted,
  });
}

/**
 * Opens, reads and checks the header of `path`.
 * @throws {ModelFileError} what is wrong, with key, value and limit
 */
export function readGguf(path: string): GgufFile {
  let descriptor: number;
  try {
    descriptor = openSync(path, 'r');
  } catch (cause) {
    throw new ModelFileError('unreadable', `cannot open model file ${path}: ${(cause as Error).message}`, { value: path, cause });
  }
  try {
    const stat = fstatSync(descriptor);
    if (!stat.isFile()) throw new ModelFileError('unreadable', `${path} is not a file`, { value: path });
    const file = readHeader(path, new HeaderWindow(descriptor, stat.size));
    checkVocabulary(file);
    return file;
  } finally {
    closeSync(descriptor);
  }
}

function readHeader(path: string, header: HeaderWindow): GgufFile {
  const magic = header.u32('magic');
  if (magic !== 0x46554747)
    throw new ModelFileError('bad_magic', `${path} is not a GGUF file: it begins with 0x${magic.toString(16).padStart(8, '0')}`, {
      key: 'magic',
      value: magic,
      limit: 0x46554747,
    });
  const version = header.u32('version');
  if (version !== 2 && version !== 3) {
    const bigEndian = version === 0x02000000 || version === 0x03000000;
    throw new ModelFileError(
      'bad_version',
      bigEndian
        ? `${path} is a big-endian GGUF file; convert it to little-endian`
        : `GGUF version ${version} is not supported, versions 2 and 3 are; convert the file again`,
      { key: 'version', value: version, limit: 3 },
    );
  }
  // A key takes at least its length (8), one character, its type (4) and a value byte; a tensor its length, a character, 4 + 8 + 4 + 8.
  const tensorCount = header.u64('tensor count');
  const keyCount = header.u64('key count');
  header.checkCount('tensor count', tensorCount, 33, ggufLimits.tensorsMax);
  header.checkCount('key count', keyCount, 14, ggufLimits.keysMax);

  const metadata = new Map<string, GgufValue>();
  for (let i = 0; i < keyCount; i++) {
    const key = header.text(`key ${i}`, ggufLimits.keyBytesMax);
    if (!/^[\x21-\x7e]+$/.test(key))
      throw new ModelFileError('bad_key', `key ${i} is ${quoted(key)}: a key is printable ASCII and not empty`, {
        key,
        value: i,
      });
    if (metadata.has(key)) throw new ModelFileError('duplicate_key', `key ${key} occurs twice`, { key, value: i });
    metadata.set(key, readValue(header, key));
  }
  const alignment = readAlignment(metadata);
  const directory: DirectoryEntry[] = [];
  const names = new Set<string>();
  for (let i = 0; i < tensorCount; i++) {
    const entry = readDirectoryEntry(header, i);
    if (names.has(entry.name))
      throw new ModelFileError('duplicate_tensor', `tensor ${entry.name} occurs twice`, { key: entry.name, value: i });
    names.add(entry.name);
    directory.push(entry);
  }
  const dataOffset = Math.ceil(header.position / alignment) * alignment;
  return new GgufFile({
    path,
    bytes: header.fileBytes,
    version,
    alignment,
    dataOffset,
    metadata,
    tensors: placeTensors(directory, alignment, dataOffset, header.fileBytes),
  });
}

function readValue(header: HeaderWindow, key: string): GgufValue {
  const type = readType(header, key);
  if (type === 'string') return { type, value: header.text(`key ${key}`, ggufLimits.stringBytesMax) };
  if (type === 'bool') return { type, value: header.bool(key) };
  if (type !== 'array') return { type, value: header.number(type, key) };
  const elements = readType(header, key);
  if (elements === 'array')
    throw new ModelFileError('bad_value_type', `key ${key} is an array of arrays, which no known key is`, {
      key,
      value: 'array',
    });
  const length = header.u64(`length of ${key}`);
  header.checkCount(`length of ${key}`, length, scalarBytes[elements], ggufLimits.arrayLengthMax, key);
  return { type: 'array', elements, value: readArray(header, key, elements, length) };
}

function readType(header: HeaderWindow, key: string): GgufScalarType | 'array' {
  const id = header.u32(`type of ${key}`);
  const type = scalarTypes[id];
  if (!type)
    throw new ModelFileError('bad_value_type', `key ${key} has value type ${id}, limit ${scalarTypes.length - 1}`, {
      key,
      value: id,
      limit: scalarTypes.length - 1,
    });
  return type;
}

function readArray(header: HeaderWindow, key: string, elements: GgufScalarType, length: number): GgufArray {
  switch (elements) {
    case 'string': {
      const what = `an element of ${key}`;
      return Array.from({ length }, () => header.text(what, ggufLimits.stringBytesMax, key));
    }
    case 'bool':
      return Array.from({ length }, () => header.bool(key));
    case 'f32':
      return Float32Array.from({ length }, () => Number(header.number('f32', key)));
    case 'f64':
      return Float64Array.from({ length }, () => Number(header.number('f64', key)));
    case 'i8':
    case 'i16':
    case 'i32':
      return Int32Array.from({ length }, () => Number(header.number(elements, key)));
    case 'u16':
    case 'u32':
      return Uint32Array.from({ length }, () => Number(header.number(elements, key)));
    case 'u8':
      return Uint8Array.from({ length }, () => Number(header.number('u8', key)));
    case 'u64':
    case 'i64':
      return Array.from({ length }, () => {
        const value = header.number(elements, key);
        if (typeof value === 'bigint')
          throw new ModelFileError('bad_value', `an element of ${key} is ${value}, limit 2^53`, { key, value, limit: 2 ** 53 });
        return value;
      });
  }
}

function readAlignment(metadata: ReadonlyMap<string, GgufValue>): number {
  const key = 'general.alignment';
  const found = metadata.get(key);
  if (!found) return 32;
  if (found.type !== 'u32') throw wrongType(key, found, 'u32');
  const value = Number(found.value);
  if (value < ggufLimits.alignmentMin || value > ggufLimits.alignmentMax || (value & (value - 1)) !== 0)
    throw new ModelFileError(
      'bad_alignment',
      `key ${key} is ${value}, it must be a power of two from ${ggufLimits.alignmentMin} to ${ggufLimits.alignmentMax}`,
      { key, value, limit: ggufLimits.alignmentMax },
    );
  return value;
}

interface DirectoryEntry {
  name: string;
  type: TensorType;
  shape: number[];
  bytes: number;
  /** From the start of tensor data; not yet checked. */
  offset: number;
}

function readDirectoryEntry(header: HeaderWindow, index: number): DirectoryEntry {
  const name = header.text(`name of tensor ${index}`, ggufLimits.tensorNameBytesMax);
  if (!/^[\x21-\x7e]+$/.test(name))
    throw new ModelFileError('bad_key', `tensor ${index} is named ${quoted(name)}: a name is printable ASCII and not empty`, {
      key: name,
      value: index,
    });
  const dimensions = header.u32(`dimensions of ${name}`);
  if (dimensions < 1 || dimensions > ggufLimits.dimensionsMax)
    throw new ModelFileError(
      'bad_dimensions',
      `tensor ${name} has ${dimensions} dimensions, 1 to ${ggufLimits.dimensionsMax} are possible`,
      {
        key: name,
        value: dimensions,
        limit: ggufLimits.dimensionsMax,
      },
    );
  const exact = Array.from({ length: dimensions }, () => header.bigU64(`shape of ${name}`));
  const typeId = header.u32(`type of ${name}`);
  const type = quantTypeById(typeId);
  if (!type)
    throw new ModelFileError(
      'unknown_tensor_type',
      `tensor ${name} has type ${describeTypeId(typeId)}, which is not supported; use a file in F16, BF16, Q4_0 to Q8_0 or Q4_K to Q6_K`,
      { key: name, value: typeId },
    );
  const offset = header.bigU64(`offset of ${name}`);
  const shapeText = `[${exact.join(', ')}]`;
  if (exact.some((size) => size === 0n))
    throw new ModelFileError('bad_dimensions', `tensor ${name} has shape ${shapeText}: a dimension of 0`, {
      key: name,
      value: shapeText,
    });
  const values = exact.reduce((product, size) => product * size, 1n);
  const row = exact[0] ?? 0n;
  if (row % BigInt(type.blockValues) !== 0n)
    throw new ModelFileError(
      'partial_block',
      `tensor ${name} has rows of ${row} values, which is not a multiple of the block of ${type.name} (${type.blockValues})`,
      { key: name, value: row, limit: type.blockValues },
    );
  const bytes = (values / BigInt(type.blockValues)) * BigInt(type.blockBytes);
  // BigInt never wraps: what a 64-bit product would hide is seen here.
  if (bytes > BigInt(header.fileBytes))
    throw new ModelFileError(
      bytes > BigInt(Number.MAX_SAFE_INTEGER) ? 'tensor_overflow' : 'tensor_past_end',
      `tensor ${name} of shape ${shapeText} needs ${bytes} bytes, the file has ${header.fileBytes}: it is broken or was cut off`,
      { key: name, value: bytes, limit: header.fileBytes },
    );
  if (offset > BigInt(header.fileBytes))
    throw new ModelFileError(
      'tensor_past_end',
      `tensor ${name} begins ${offset} bytes into the data, the file has ${header.fileBytes}`,
      {
        key: name,
        value: offset,
        limit: header.fileBytes,
      },
    );
  return { name, type: type.name, shape: exact.map(Number), bytes: Number(bytes), offset: Number(offset) };
}

/** Tensors must lie in directory order, aligned, apart from each other and inside the file. Gaps are allowed (padding). */
function placeTensors(directory: DirectoryEntry[], alignment: number, dataOffset: number, fileBytes: number): GgufTensor[] {
  let previous: DirectoryEntry | null = null;
  return directory.map((entry) => {
    const { name, type, shape, bytes, offset } = entry;
    if (offset % alignment !== 0)
      throw new ModelFileError(
        'misaligned_tensor',
        `tensor ${name} begins at ${offset}, which is not a multiple of the alignment ${alignment}`,
        {
          key: name,
          value: offset,
          limit: alignment,
        },
      );
    if (previous && offset < previous.offset)
      throw new ModelFileError(
        'tensor_out_of_order',
        `tensor ${name} begins at ${offset}, before tensor ${previous.name} at ${previous.offset}`,
        {
          key: name,
          value: offset,
          limit: previous.offset,
        },
      );
    if (previous && offset < previous.offset + previous.bytes)
      throw new ModelFileError(
        'tensor_overlap',
        `tensor ${name} begins at ${offset}, inside tensor ${previous.name} (${previous.offset} to ${previous.offset + previous.bytes})`,
        { key: name, value: offset, limit: previous.offset + previous.bytes },
      );
    if (dataOffset + offset + bytes > fileBytes)
      throw new ModelFileError(
        'tensor_past_end',
        `tensor ${name} ends at byte ${dataOffset + offset + bytes}, the file has ${fileBytes}: it is broken or was cut off; download it again`,
        { key: name, value: dataOffset + offset + bytes, limit: fileBytes },
      );
    previous = entry;
    return { name, type, shape, offset: dataOffset + offset, bytes };
  });
}

const windowBytes = 1 << 20;

/** A cursor over the header, backed by one window that is read again as the cursor moves on. */
class HeaderWindow {
  readonly fileBytes: number;
  readonly #descriptor: number;
  #window = Buffer.alloc(0);
  #windowOffset = 0;
  #at = 0;

  constructor(descriptor: number, fileBytes: number) {
    this.#descriptor = descriptor;
    this.fileBytes = fileBytes;
  }

  get position(): number {
    return this.#windowOffset + this.#at;
  }

  /** Checks a count before anything is allocated for it. @param bytesEach least bytes one of them takes */
  checkCount(what: string, count: number, bytesEach: number, max: number, key = what): void {
    const left = this.fileBytes - this.position;
    const room = Math.floor(left / bytesEach);
    const limit = Math.min(room, max);
    if (count > limit)
      throw new ModelFileError(
        'count_too_large',
        `${what} is ${count}, limit ${limit}${room < max ? ` (${left} bytes are left in the file)` : ''}`,
        { key, value: count, limit },
      );
  }

  u32(what: string): number {
    const at = this.#take(4, what);
    return this.#window.readUInt32LE(at);
  }

  bigU64(what: string): bigint {
    const at = this.#take(8, what);
    return this.#window.readBigUInt64LE(at);
  }

  /** As a double: exact up to 2^53, and still far above any limit beyond that. */
  u64(what: string): number {
    const at = this.#take(8, what);
    return this.#window.readUInt32LE(at) + this.#window.readUInt32LE(at + 4) * 2 ** 32;
  }

  bool(key: string): boolean {
    const at = this.#take(1, key);
    const byte = this.#window.readUInt8(at);
    if (byte > 1)
      throw new ModelFileError('bad_value', `key ${key} is a bool of value ${byte}, limit 1`, { key, value: byte, limit: 1 });
    return byte === 1;
  }

  /** 64-bit integers beyond 2^53 come as bigint. */
  number(type: Exclude<GgufScalarType, 'bool' | 'string'>, key: string): number | bigint {
    const at = this.#take(scalarBytes[type], key);
    const window = this.#window;
    switch (type) {
      case 'u8':
        return window.readUInt8(at);
      case 'i8':
        return window.readInt8(at);
      case 'u16':
        return window.readUInt16LE(at);
      case 'i16':
        return window.readInt16LE(at);
      case 'u32':
        return window.readUInt32LE(at);
      case 'i32':
        return window.readInt32LE(at);
      case 'f32':
        return window.readFloatLE(at);
      case 'f64':
        return window.readDoubleLE(at);
      case 'u64':
      case 'i64': {
        const value = type === 'u64' ? window.readBigUInt64LE(at) : window.readBigInt64LE(at);
        const near = Number(value);
        return Number.isSafeInteger(near) ? near : value;
      }
    }
  }

  text(what: string, bytesMax: number, key = what): string {
    const length = this.u64(what);
    const left = this.fileBytes - this.position;
    const limit = Math.min(left, bytesMax);
    if (length > limit)
      throw new ModelFileError(
        'length_too_large',
        `the text of ${what} is ${length} bytes long, limit ${limit}${left < bytesMax ? ' (the rest of the file)' : ''}`,
        { key, value: length, limit },
      );
    const at = this.#take(length, what);
    const bytes = this.#window.subarray(at, at + length);
    if (!isUtf8(bytes)) throw new ModelFileError('bad_text', `the text of ${what} is not valid UTF-8`, { key, value: length });
    return bytes.toString('utf8');
  }

  /** Moves over `count` bytes and returns where they begin in the window. */
  #take(count: number, what: string): number {
    if (this.#at + count > this.#window.length) this.#refill(count, what);
    const at = this.#at;
    this.#at += count;
    return at;
  }

  #refill(count: number, what: string): void {
    const from = this.position;
    const left = this.fileBytes - from;
    if (count > left)
      throw new ModelFileError(
        'truncated',
        `the file ends at byte ${this.fileBytes}, inside ${what} at ${from}: it was cut off`,
        {
          key: what,
          value: this.fileBytes,
          limit: from + count,
        },
      );
    if (from + count > ggufLimits.headerBytesMax)
      throw new ModelFileError('length_too_large', `the header goes on past ${ggufLimits.headerBytesMax} bytes, at ${what}`, {
        key: what,
        value: from + count,
        limit: ggufLimits.headerBytesMax,
      });
    const window = Buffer.allocUnsafe(Math.min(left, Math.max(count, windowBytes)));
    let read = 0;
    while (read < window.length) {
      const got = readSync(this.#descriptor, window, read, window.length - read, from + read);
      if (got === 0)
        throw new ModelFileError('truncated', `the file became shorter while it was read, at byte ${from + read}`, {
          key: what,
          value: from + read,
          limit: this.fileBytes,
        });
      read += got;
    }
    this.#window = window;
    this.#windowOffset = from;
    this.#at = 0;
  }
}
