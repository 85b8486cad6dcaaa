/** Writes small GGUF files, right or wrong on purpose: every count, length and offset can be forged. */
import { mkdtempSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

const typeIds = { u8: 0, i8: 1, u16: 2, i16: 3, u32: 4, i32: 5, f32: 6, bool: 7, string: 8, array: 9, u64: 10, i64: 11, f64: 12 };
export type ValueType = keyof typeof typeIds;

export type Field =
  | { key: string; type: Exclude<ValueType, 'array'>; value: number | bigint | string | boolean }
  | { key: string; type: 'array'; elements: ValueType; value: (number | bigint | string | boolean)[]; length?: bigint };

export interface TensorSpec {
  name: string;
  /** Number of the type in the file. */
  type: number;
  shape: (number | bigint)[];
  dimensions?: number;
  /** From the start of the data; default: after the tensor before, aligned. */
  offset?: number | bigint;
  data?: Buffer;
}

export interface FileSpec {
  magic?: string;
  version?: number;
  alignment?: number;
  fields?: Field[];
  tensors?: TensorSpec[];
  fieldCount?: bigint;
  tensorCount?: bigint;
  /** Bytes cut off at the end. */
  cut?: number;
}

const u32 = (value: number): Buffer => {
  const buffer = Buffer.alloc(4);
  buffer.writeUInt32LE(value);
  return buffer;
};
const u64 = (value: number | bigint): Buffer => {
  const buffer = Buffer.alloc(8);
  buffer.writeBigUInt64LE(BigInt(value));
  return buffer;
};
const text = (value: string): Buffer => Buffer.concat([u64(Buffer.byteLength(value)), Buffer.from(value)]);

function scalar(type: ValueType, value: number | bigint | string | boolean): Buffer {
  const buffer = Buffer.alloc(8);
  switch (type) {
    case 'u8':
    case 'i8':
    case 'bool':
      buffer.writeUInt8(Number(value) & 255);
      return buffer.subarray(0, 1);
    case 'u16':
    case 'i16':
      buffer.writeUInt16LE(Number(value) & 0xffff);
      return buffer.subarray(0, 2);
    case 'u32':
      return u32(Number(value));
    case 'i32':
      buffer.writeInt32LE(Number(value));
      return buffer.subarray(0, 4);
    case 'f32':
      buffer.writeFloatLE(Number(value));
      return buffer.subarray(0, 4);
    case 'f64':
      buffer.writeDoubleLE(Number(value));
      return buffer;
    case 'u64':
      return u64(BigInt(value));
    case 'i64':
      buffer.writeBigInt64LE(BigInt(value));
      return buffer;
    case 'string':
      return text(String(value));
    case 'array':
      return Buffer.concat([u32(typeIds.u8), u64(0)]);
  }
}

function field(spec: Field): Buffer {
  const head = Buffer.concat([text(spec.key), u32(typeIds[spec.type])]);
  if (spec.type !== 'array') return Buffer.concat([head, scalar(spec.type, spec.value)]);
  const { elements, value, length = BigInt(value.length) } = spec;
  return Buffer.concat([head, u32(typeIds[elements]), u64(length), ...value.map((item) => scalar(elements, item))]);
}

export function ggufBytes(spec: FileSpec): Buffer {
  const { alignment = 32, fields = [], tensors = [], cut = 0 } = spec;
  const pad = (size: number): number => Math.ceil(size / alignment) * alignment;
  let next = 0;
  const placed = tensors.map((tensor) => {
    const data = tensor.data ?? Buffer.alloc(0);
    const offset = tensor.offset ?? next;
    if (tensor.offset === undefined) next = pad(next + data.length);
    return { ...tensor, data, offset };
  });
  const header = Buffer.concat([
    Buffer.from(spec.magic ?? 'GGUF', 'latin1'),
    u32(spec.version ?? 3),
    u64(spec.tensorCount ?? tensors.length),
    u64(spec.fieldCount ?? fields.length),
    ...fields.map(field),
    ...placed.map(({ name, shape, dimensions = shape.length, type, offset }) =>
      Buffer.concat([text(name), u32(dimensions), ...shape.map(u64), u32(type), u64(offset)]),
    ),
  ]);
  const end = Math.max(0, ...placed.map(({ offset, data }) => Number(offset) + data.length));
  const bytes = Buffer.alloc(tensors.length > 0 && end < 1 << 24 ? pad(header.length) + end : header.length);
  header.copy(bytes);
  for (const { offset, data } of placed) if (Number(offset) < 1 << 24) data.copy(bytes, pad(header.length) + Number(offset));
  return bytes.subarray(0, bytes.length - cut);
}

export const scratchDirectory = (): string => mkdtempSync(join(tmpdir(), 'shardmesh-test-'));

export function writeGguf(directory: string, spec: FileSpec, name = 'model.gguf'): string {
  const path = join(directory, name);
  writeFileSync(path, ggufBytes(spec));
  return path;
}

const blocks: Record<number, [values: number, bytes: number]> = {
  0: [1, 4],
  1: [1, 2],
  2: [32, 18],
  3: [32, 20],
  8: [32, 34],
  12: [256, 144],
  14: [256, 210],
  30: [1, 2],
};

/** Whole blocks whose bytes are all different from their neighbours'; no scale among them is NaN or infinite. */
export function tensorData(type: number, shape: number[], seed: number): Buffer {
  const [values, bytes] = blocks[type] ?? [1, 4];
  const data = Buffer.alloc((shape.reduce((product, size) => product * size, 1) / values) * bytes);
  for (let i = 0; i < data.length; i++) data[i] = (i * 7 + seed * 13 + (i >> 8)) & 0x3b;
  return data;
}

export interface TinyModel {
  architecture?: 'llama' | 'qwen2';
  layers?: number;
  heads?: number;
  kvHeads?: number;
  headSize?: number;
  feedForward?: number;
  vocabulary?: number;
  matrixType?: number;
  downType?: number;
  tied?: boolean;
  bias?: boolean;
}

/** A whole model of a few kilobytes, with values that mean nothing. */
export function tinyModel(options: TinyModel = {}): FileSpec & { fields: Field[]; tensors: TensorSpec[] } {
  const {
    architecture = 'llama',
    layers = 2,
    heads = 4,
    kvHeads = 2,
    headSize = 32,
    feedForward = 256,
    vocabulary = 3000,
  } = options;
  const { matrixType = 8, downType = matrixType, tied = true, bias = architecture === 'qwen2' } = options;
  const hidden = heads * headSize;
  const tensors: TensorSpec[] = [];
  const add = (name: string, type: number, shape: number[]): void => {
    tensors.push({ name, type, shape, data: tensorData(type, shape, tensors.length) });
  };
  add('token_embd.weight', matrixType, [hidden, vocabulary]);
  for (let layer = 0; layer < layers; layer++) {
    const at = `blk.${layer}.`;
    add(`${at}attn_norm.weight`, 0, [hidden]);
    add(`${at}ffn_down.weight`, downType, [feedForward, hidden]);
    add(`${at}ffn_gate.weight`, matrixType, [hidden, feedForward]);
    add(`${at}ffn_up.weight`, matrixType, [hidden, feedForward]);
    add(`${at}ffn_norm.weight`, 0, [hidden]);
    for (const [name, width] of [
      ['k', kvHeads],
      ['q', heads],
      ['v', kvHeads],
    ] as const) {
      if (bias) add(`${at}attn_${name}.bias`, 0, [width * headSize]);
      add(`${at}attn_${name}.weight`, matrixType, [hidden, width * headSize]);
    }
    add(`${at}attn_output.weight`, matrixType, [heads * headSize, hidden]);
  }
  add('output_norm.weight', 0, [hidden]);
  if (!tied) add('output.weight', matrixType, [hidden, vocabulary]);
  const number = (name: string, value: number): Field => ({ key: `${architecture}.${name}`, type: 'u32', value });
  return {
    tensors,
    fields: [
      { key: 'general.architecture', type: 'string', value: architecture },
      { key: 'general.name', type: 'string', value: 'tiny' },
      number('block_count', layers),
      number('context_length', 512),
      number('embedding_length', hidden),
      number('feed_forward_length', feedForward),
      number('attention.head_count', heads),
      number('attention.head_count_kv', kvHeads),
      { key: `${architecture}.attention.layer_norm_rms_epsilon`, type: 'f32', value: 1e-5 },
      { key: `${architecture}.rope.freq_base`, type: 'f32', value: 10_000 },
    ],
  };
}
