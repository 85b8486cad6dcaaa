import { gguf } from '@huggingface/gguf';
import { afterAll, describe, expect, it } from 'vitest';
import { rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { readGguf } from '../../../../kernels/model-file/gguf-reader.ts';
import { ModelFileError } from '../../../../kernels/model-file/model-file-error.ts';
import {
  ggufBytes,
  scratchDirectory,
  tensorData,
  tinyModel,
  writeGguf,
  type Field,
  type FileSpec,
  type TensorSpec,
} from './gguf-writer.ts';

const directory = scratchDirectory();
afterAll(() => rmSync(directory, { recursive: true, force: true }));

function errorOf(spec: FileSpec): ModelFileError {
  try {
    readGguf(writeGguf(directory, spec));
  } catch (error) {
    if (error instanceof ModelFileError) return error;
    throw error;
  }
  throw new Error('the file was accepted');
}

const f32 = (name: string, shape: number[], rest: Partial<TensorSpec> = {}): TensorSpec => ({
  name,
  type: 0,
  shape,
  data: tensorData(0, shape, 1),
  ...rest,
});
const tokens = (count: number): Field => ({
  key: 'tokenizer.ggml.tokens',
  type: 'array',
  elements: 'string',
  value: Array.from({ length: count }, (_, i) => `t${i}`),
});
const near64 = 0xffff_ffff_ffff_fff0n;

describe('gguf reader', () => {
  it('gguf reader - gives metadata of every type and tensors with absolute offsets', () => {
    const fields: Field[] = [
      { key: 'a.u8', type: 'u8', value: 200 },
      { key: 'a.i32', type: 'i32', value: -5 },
      { key: 'a.f32', type: 'f32', value: 0.5 },
      { key: 'a.bool', type: 'bool', value: true },
      { key: 'a.text', type: 'string', value: 'naïve' },
      { key: 'a.u64', type: 'u64', value: 2n ** 60n },
      { key: 'a.i64', type: 'i64', value: -7n },
      { key: 'a.floats', type: 'array', elements: 'f32', value: [1, 2.5] },
      { key: 'a.texts', type: 'array', elements: 'string', value: ['', 'x'] },
    ];
    const file = readGguf(
      writeGguf(directory, {
        fields,
        tensors: [f32('w', [3]), { name: 'q', type: 8, shape: [64, 2], data: tensorData(8, [64, 2], 2) }],
      }),
    );
    expect([file.getNumber('a.u8'), file.getNumber('a.i32'), file.getNumber('a.f32'), file.getNumber('a.i64')]).toEqual([
      200, -5, 0.5, -7,
    ]);
    expect(file.getBoolean('a.bool')).toBe(true);
    expect(file.getString('a.text')).toBe('naïve');
    expect(file.metadata.get('a.u64')).toEqual({ type: 'u64', value: 2n ** 60n });
    expect(() => file.getNumber('a.u64')).toThrow('key a.u64 is 1152921504606846976, limit 2^53');
    expect(file.getNumberArray('a.floats')).toEqual(Float32Array.of(1, 2.5));
    expect(file.getStringArray('a.texts')).toEqual(['', 'x']);
    expect(file.getString('a.absent')).toBeNull();
    expect(() => file.getString('a.u8')).toThrow('key a.u8 has type u8, a string is needed');
    expect(
      file.tensors.map(({ name, type, shape, offset, bytes }) => [name, type, shape, offset - file.dataOffset, bytes]),
    ).toEqual([
      ['w', 'F32', [3], 0, 12],
      ['q', 'Q8_0', [64, 2], 32, 136],
    ]);
  });

  it('gguf reader - agrees with an independent reader on a whole model', async () => {
    const spec = tinyModel({ architecture: 'qwen2', tied: false });
    const path = writeGguf(directory, { ...spec, fields: [...spec.fields, tokens(3000)] }, 'whole.gguf');
    const ours = readGguf(path);
    const theirs = await gguf(path, { allowLocalFile: true });
    expect(theirs.tensorInfos).toHaveLength(27);
    expect(ours.tensors.map(({ name, shape, offset }) => ({ name, shape, offset: offset - ours.dataOffset }))).toEqual(
      theirs.tensorInfos.map(({ name, shape, offset }) => ({ name, shape: shape.map(Number), offset: Number(offset) })),
    );
    expect(ours.dataOffset).toBe(Number(theirs.tensorDataOffset));
    for (const [key, value] of Object.entries(theirs.metadata)) {
      if (key === 'version' || key === 'tensor_count' || key === 'kv_count') continue;
      expect(ours.metadata.get(key)?.value).toEqual(value);
    }
  });

  it('gguf reader - reads a header larger than its window', () => {
    const path = writeGguf(directory, { fields: [tokens(200_000), { key: 'z', type: 'u32', value: 9 }] });
    const file = readGguf(path);
    expect(file.getStringArray('tokenizer.ggml.tokens')?.[199_999]).toBe('t199999');
    expect(file.getNumber('z')).toBe(9);
  });

  it('gguf reader - refuses a file at any length it was cut off to', () => {
    const whole = ggufBytes({ fields: [{ key: 'k', type: 'string', value: 'v' }], tensors: [f32('w', [8])] });
    const path = join(directory, 'cut.gguf');
    for (let length = 0; length < whole.length; length++) {
      writeFileSync(path, whole.subarray(0, length));
      expect(() => readGguf(path)).toThrow(ModelFileError);
    }
    writeFileSync(path, whole);
    expect(readGguf(path).tensors).toHaveLength(1);
  });

  it('gguf reader - names an unreadable path', () => {
    expect(() => readGguf(join(directory, 'absent.gguf'))).toThrow(/cannot open model file .*absent.gguf: ENOENT/);
    expect(() => readGguf(directory)).toThrow('is not a file');
  });
});

describe('gguf reader - bad files', () => {
  const cases: [name: string, spec: FileSpec, expected: { code: string; key?: string; value?: unknown; limit?: unknown }][] = [
    ['another magic', { magic: 'GGML' }, { code: 'bad_magic' }],
    ['version 1', { version: 1 }, { code: 'bad_version', value: 1 }],
    ['a big-endian file', { version: 0x03000000 }, { code: 'bad_version' }],
    ['a key count near 2^64', { fieldCount: near64 }, { code: 'count_too_large', key: 'key count' }],
    ['a tensor count near 2^64', { tensorCount: near64 }, { code: 'count_too_large', key: 'tensor count' }],
    [
      'a key count above the bytes left',
      { fieldCount: 3n, fields: [{ key: 'k', type: 'u8', value: 1 }] },
      { code: 'count_too_large', limit: 1 },
    ],
    [
      'an array length near 2^64',
      { fields: [{ key: 'k', type: 'array', elements: 'u8', value: [1], length: near64 }] },
      { code: 'count_too_large', key: 'k' },
    ],
    [
      'an array of texts longer than the file',
      { fields: [{ key: 'k', type: 'array', elements: 'string', value: ['a', 'b'], length: 3n }] },
      { code: 'count_too_large', key: 'k', limit: 2 },
    ],
    [
      'an array of arrays',
      { fields: [{ key: 'k', type: 'array', elements: 'array', value: [0] }] },
      { code: 'bad_value_type', key: 'k' },
    ],
    ['a bool of 2', { fields: [{ key: 'k', type: 'bool', value: 2 }] }, { code: 'bad_value', key: 'k', value: 2, limit: 1 }],
    [
      'a key twice',
      {
        fields: [
          { key: 'k', type: 'u8', value: 1 },
          { key: 'k', type: 'u8', value: 2 },
        ],
      },
      { code: 'duplicate_key', key: 'k' },
    ],
    ['an empty key', { fields: [{ key: '', type: 'u32', value: 1 }] }, { code: 'bad_key' }],
    [
      'a key that is too long',
      { fields: [{ key: 'k'.repeat(1025), type: 'u32', value: 1 }] },
      { code: 'length_too_large', value: 1025, limit: 1024 },
    ],
    [
      'alignment 0',
      { fields: [{ key: 'general.alignment', type: 'u32', value: 0 }] },
      { code: 'bad_alignment', key: 'general.alignment', value: 0 },
    ],
    ['alignment 48', { fields: [{ key: 'general.alignment', type: 'u32', value: 48 }] }, { code: 'bad_alignment', value: 48 }],
    ['alignment 4', { fields: [{ key: 'general.alignment', type: 'u32', value: 4 }] }, { code: 'bad_alignment', value: 4 }],
    [
      'alignment 2^31',
      { fields: [{ key: 'general.alignment', type: 'u32', value: 2 ** 31 }] },
      { code: 'bad_alignment', value: 2 ** 31, limit: 4096 },
    ],
    [
      'an alignment that is a text',
      { fields: [{ key: 'general.alignment', type: 'string', value: '32' }] },
      { code: 'bad_value_type' },
    ],
    ['no dimensions', { tensors: [f32('w', [], { data: Buffer.alloc(64) })] }, { code: 'bad_dimensions', key: 'w', value: 0 }],
    ['five dimensions', { tensors: [f32('w', [1, 1, 1, 1, 1])] }, { code: 'bad_dimensions', key: 'w', value: 5, limit: 4 }],
    [
      'dimensions of 2^32 - 1',
      { tensors: [f32('w', [1], { dimensions: 0xffff_ffff })] },
      { code: 'bad_dimensions', value: 0xffff_ffff },
    ],
    ['a dimension of 0', { tensors: [f32('w', [4, 0])] }, { code: 'bad_dimensions', key: 'w', value: '[4, 0]' }],
    [
      'a shape whose product wraps to a small number',
      { tensors: [{ name: 'w', type: 0, shape: [2n ** 32n, 2n ** 32n + 1n], data: Buffer.alloc(64) }] },
      { code: 'tensor_overflow', key: 'w' },
    ],
    [
      'a byte count that wraps',
      { tensors: [{ name: 'w', type: 0, shape: [2n ** 62n], data: Buffer.alloc(64) }] },
      { code: 'tensor_overflow', value: 2n ** 64n },
    ],
    [
      'a type that is not supported, by name',
      { tensors: [{ name: 'w', type: 10, shape: [256], data: Buffer.alloc(84) }] },
      { code: 'unknown_tensor_type', key: 'w', value: 10 },
    ],
    [
      'a type that does not exist',
      { tensors: [{ name: 'w', type: 999, shape: [256], data: Buffer.alloc(84) }] },
      { code: 'unknown_tensor_type', value: 999 },
    ],
    [
      'a row that is not whole blocks',
      { tensors: [{ name: 'w', type: 8, shape: [48, 2], data: Buffer.alloc(102) }] },
      { code: 'partial_block', key: 'w', value: 48n, limit: 32 },
    ],
    [
      'a misaligned tensor',
      { tensors: [f32('w', [8], { offset: 16 })] },
      { code: 'misaligned_tensor', key: 'w', value: 16, limit: 32 },
    ],
    [
      'overlapping tensors',
      { tensors: [f32('a', [16]), f32('b', [16], { offset: 32 })] },
      { code: 'tensor_overlap', key: 'b', value: 32, limit: 64 },
    ],
    [
      'tensors at the same place',
      { tensors: [f32('a', [8]), f32('b', [8], { offset: 0 })] },
      { code: 'tensor_overlap', key: 'b' },
    ],
    [
      'tensors out of order',
      { tensors: [f32('a', [8], { offset: 64 }), f32('b', [8], { offset: 0 })] },
      { code: 'tensor_out_of_order', key: 'b' },
    ],
    ['a tensor twice', { tensors: [f32('a', [8]), f32('a', [8])] }, { code: 'duplicate_tensor', key: 'a' }],
    ['a tensor past the end', { tensors: [f32('a', [8])], cut: 1 }, { code: 'tensor_past_end', key: 'a' }],
    [
      'an offset near 2^64',
      { tensors: [f32('a', [8], { offset: near64 })] },
      { code: 'tensor_past_end', key: 'a', value: near64 },
    ],
    ['a tensor name over 64 bytes', { tensors: [f32('a'.repeat(65), [8])] }, { code: 'length_too_large', value: 65, limit: 64 }],
    [
      'tokens that are numbers',
      { fields: [{ key: 'tokenizer.ggml.tokens', type: 'array', elements: 'u32', value: [1, 2] }] },
      { code: 'bad_value_type', key: 'tokenizer.ggml.tokens' },
    ],
    [
      'scores of the wrong type',
      { fields: [tokens(2), { key: 'tokenizer.ggml.scores', type: 'array', elements: 'u8', value: [1, 2] }] },
      { code: 'bad_value_type', key: 'tokenizer.ggml.scores', value: 'array of u8' },
    ],
    [
      'fewer scores than tokens',
      { fields: [tokens(3), { key: 'tokenizer.ggml.scores', type: 'array', elements: 'f32', value: [1, 2] }] },
      { code: 'bad_vocabulary', key: 'tokenizer.ggml.scores', value: 2, limit: 3 },
    ],
    [
      'a score that is NaN',
      { fields: [tokens(1), { key: 'tokenizer.ggml.scores', type: 'array', elements: 'f32', value: [NaN] }] },
      { code: 'bad_vocabulary' },
    ],
    [
      'more token types than tokens',
      { fields: [tokens(1), { key: 'tokenizer.ggml.token_type', type: 'array', elements: 'i32', value: [1, 1] }] },
      { code: 'bad_vocabulary', value: 2, limit: 1 },
    ],
    [
      'merges that are numbers',
      { fields: [tokens(1), { key: 'tokenizer.ggml.merges', type: 'array', elements: 'i32', value: [1] }] },
      { code: 'bad_value_type', key: 'tokenizer.ggml.merges' },
    ],
    [
      'a token longer than 16 KiB',
      { fields: [{ key: 'tokenizer.ggml.tokens', type: 'array', elements: 'string', value: ['x'.repeat(16_385)] }] },
      { code: 'bad_vocabulary', value: 16_385, limit: 16_384 },
    ],
    [
      'an end token outside the vocabulary',
      { fields: [tokens(2), { key: 'tokenizer.ggml.eos_token_id', type: 'u32', value: 2 }] },
      { code: 'bad_vocabulary', key: 'tokenizer.ggml.eos_token_id', value: 2, limit: 1 },
    ],
    [
      'scores without tokens',
      { fields: [{ key: 'tokenizer.ggml.scores', type: 'array', elements: 'f32', value: [1] }] },
      { code: 'bad_vocabulary' },
    ],
  ];
  it.each(cases)('gguf reader - refuses %s', (_, spec, expected) => {
    const error = errorOf(spec);
    expect(error).toMatchObject(expected);
    expect(error.message).toMatch(/\w+ .*\w/);
  });

  it('gguf reader - refuses a text length near 2^64 without allocating it', () => {
    const bytes = ggufBytes({ fields: [{ key: 'k', type: 'string', value: 'abc' }] });
    bytes.writeBigUInt64LE(near64, 24 + 8 + 1 + 4);
    const path = join(directory, 'text.gguf');
    writeFileSync(path, bytes);
    const before = process.memoryUsage().rss;
    expect(() => readGguf(path)).toThrow('the text of key k is 18446744073709552000 bytes long, limit 3 (the rest of the file)');
    expect(process.memoryUsage().rss - before).toBeLessThan(64 << 20);
  });

  it('gguf reader - refuses text that is not UTF-8', () => {
    const bytes = ggufBytes({ fields: [{ key: 'k', type: 'string', value: 'abc' }] });
    bytes[bytes.length - 1] = 0xff;
    const path = join(directory, 'text.gguf');
    writeFileSync(path, bytes);
    expect(() => readGguf(path)).toThrow('the text of key k is not valid UTF-8');
  });

  it('gguf reader - answers random damage with its own error or a readable file, never anything else', () => {
    const whole = ggufBytes({
      fields: [tokens(5), { key: 'k', type: 'f64', value: 1 }],
      tensors: [f32('w', [8]), f32('v', [4, 4])],
    });
    const path = join(directory, 'damaged.gguf');
    let state = 4711;
    const random = (below: number): number => {
      state = (Math.imul(state, 1103515245) + 12345) >>> 0;
      return (state >>> 8) % below;
    };
    let refused = 0;
    for (let round = 0; round < 400; round++) {
      const bytes = Buffer.from(whole);
      for (let i = 0; i <= random(3); i++) bytes[random(bytes.length)] = random(256);
      writeFileSync(path, bytes);
      try {
        readGguf(path);
      } catch (error) {
        expect(error, `round ${round}`).toBeInstanceOf(ModelFileError);
        refused++;
      }
    }
    expect(refused).toBeGreaterThan(100);
  });
});
