import { afterAll, describe, expect, it } from 'vitest';
import { rmSync } from 'node:fs';
import { readGguf } from '../../../../kernels/model-file/gguf-reader.ts';
import { ModelFileError } from '../../../../kernels/model-file/model-file-error.ts';
import { openModel } from '../../../../kernels/model-file/model-file.ts';
import { parseModelFacts, readModelFacts, type ModelFacts } from '../../../../kernels/model-file/model-facts.ts';
import { checkModel } from '../../../../kernels/programs/index.ts';
import { scratchDirectory, tensorData, tinyModel, writeGguf, type Field, type TensorSpec } from './gguf-writer.ts';

const directory = scratchDirectory();
afterAll(() => rmSync(directory, { recursive: true, force: true }));
const digest = 'ab'.repeat(32);

type Spec = ReturnType<typeof tinyModel>;
function factsOf(change: (spec: Spec) => void = () => undefined, options: Parameters<typeof tinyModel>[0] = {}): ModelFacts {
  const spec = tinyModel(options);
  change(spec);
  const facts = readModelFacts(readGguf(writeGguf(directory, spec)), digest);
  checkModel(facts);
  return facts;
}
function errorOf(change: (spec: Spec) => void, options?: Parameters<typeof tinyModel>[0]): ModelFileError {
  try {
    factsOf(change, options);
  } catch (error) {
    if (error instanceof ModelFileError) return error;
    throw error;
  }
  throw new Error('the file was accepted');
}
const set = (key: string, value: Partial<Field>) => (spec: Spec) => {
  const found = spec.fields.find((field) => field.key === key);
  if (found) Object.assign(found, value);
  else spec.fields.push({ key, ...value } as Field);
};
const remove = (key: string) => (spec: Spec) => {
  spec.fields = spec.fields.filter((field) => field.key !== key);
};
const reshape =
  (name: string, shape: number[], type = 8) =>
  (spec: Spec) => {
    const tensor = spec.tensors.find((one) => one.name === name) as TensorSpec;
    Object.assign(tensor, { shape, type, data: tensorData(type, shape, 1) });
  };

describe('model facts', () => {
  it('model facts - hold hyper-parameters and the tensor directory, not the vocabulary', () => {
    const facts = factsOf();
    expect(facts).toMatchObject({
      version: 1,
      architecture: 'llama',
      name: 'tiny',
      sourceSha256: digest,
      layers: 2,
      hiddenSize: 128,
      heads: 4,
      kvHeads: 2,
      headSize: 32,
      feedForwardSize: 256,
      vocabularySize: 3000,
      contextTokensMax: 512,
      normEpsilon: Math.fround(1e-5),
      rope: { base: 10_000, dimensions: 32, scale: 1 },
      slidingWindow: null,
    });
    expect(facts.tensors).toHaveLength(20);
    expect(JSON.stringify(facts)).not.toContain('tokenizer');
  });

  it('model facts - survive the way over JSON unchanged', () => {
    const facts = factsOf();
    expect(parseModelFacts(JSON.stringify(facts))).toEqual(facts);
  });

  it('model facts - turn a linear rope scaling into a factor on positions', () => {
    const facts = factsOf((spec) => {
      set('llama.rope.scaling.type', { type: 'string', value: 'linear' })(spec);
      set('llama.rope.scaling.factor', { type: 'f32', value: 4 })(spec);
    });
    expect(facts.rope.scale).toBe(0.25);
  });

  it('model facts - carry the digest of the file when a model is opened', async () => {
    const path = writeGguf(directory, tinyModel(), 'opened.gguf');
    const { facts } = await openModel(path, { cacheDirectory: directory });
    const { createHash } = await import('node:crypto');
    const { readFileSync } = await import('node:fs');
    expect(facts.sourceSha256).toBe(createHash('sha256').update(readFileSync(path)).digest('hex'));
  });

  const bad: [string, (spec: Spec) => void, object][] = [
    [
      'an unknown architecture',
      set('general.architecture', { value: 'gpt2' }),
      { code: 'unknown_architecture', key: 'general.architecture', value: 'gpt2' },
    ],
    ['no architecture', remove('general.architecture'), { code: 'missing_key', key: 'general.architecture' }],
    ['no layer count', remove('llama.block_count'), { code: 'missing_key', key: 'llama.block_count' }],
    ['a layer count of 0', set('llama.block_count', { value: 0 }), { code: 'bad_value', key: 'llama.block_count', value: 0 }],
    [
      'more layers than there are tensors for',
      set('llama.block_count', { value: 3 }),
      { code: 'missing_tensor', key: 'blk.2.attn_norm.weight' },
    ],
    [
      'fewer layers than there are tensors for',
      set('llama.block_count', { value: 1 }),
      { code: 'unexpected_tensor', key: 'blk.1.attn_norm.weight' },
    ],
    [
      'a head count that is an array',
      set('llama.attention.head_count', { type: 'array', elements: 'u32', value: [4, 4] }),
      { code: 'unsupported', key: 'llama.attention.head_count' },
    ],
    [
      'a head count that does not divide the width',
      set('llama.attention.head_count', { value: 3 }),
      { code: 'inconsistent', value: 3, limit: 128 },
    ],
    [
      'KV heads that do not divide the heads',
      set('llama.attention.head_count_kv', { value: 3 }),
      { code: 'inconsistent', key: 'llama.attention.head_count_kv', value: 3 },
    ],
    ['another hidden size than the tensors', set('llama.embedding_length', { value: 256 }), { code: 'inconsistent' }],
    [
      'another feed-forward size than the tensors',
      set('llama.feed_forward_length', { value: 512 }),
      { code: 'inconsistent', key: 'blk.0.ffn_gate.weight', value: '128 x 256', limit: '128 x 512' },
    ],
    [
      'an odd number of rotated values',
      set('llama.rope.dimension_count', { type: 'u32', value: 31 }),
      { code: 'inconsistent', value: 31 },
    ],
    ['an epsilon of 0', set('llama.attention.layer_norm_rms_epsilon', { value: 0 }), { code: 'bad_value', value: 0 }],
    ['an epsilon that is NaN', set('llama.attention.layer_norm_rms_epsilon', { value: NaN }), { code: 'bad_value' }],
    ['yarn scaling', set('llama.rope.scaling.type', { type: 'string', value: 'yarn' }), { code: 'unsupported', value: 'yarn' }],
    [
      'a mixture of experts',
      set('llama.expert_count', { type: 'u32', value: 8 }),
      { code: 'unsupported', key: 'llama.expert_count', value: 8 },
    ],
    ['one part of a split file', set('split.count', { type: 'u16', value: 2 }), { code: 'unsupported', key: 'split.count' }],
    [
      'another token count than embedding rows',
      set('tokenizer.ggml.tokens', { type: 'array', elements: 'string', value: ['a'] }),
      { code: 'inconsistent', key: 'tokenizer.ggml.tokens', value: 1, limit: 3000 },
    ],
    [
      'a tensor it would ignore',
      (spec) => spec.tensors.push({ name: 'blk.0.attn_sinks', type: 0, shape: [4], data: Buffer.alloc(16) }),
      { code: 'unexpected_tensor', key: 'blk.0.attn_sinks' },
    ],
    [
      'a matrix of another shape',
      reshape('blk.1.attn_k.weight', [128, 128]),
      { code: 'inconsistent', key: 'blk.1.attn_k.weight' },
    ],
    [
      'a norm in blocks',
      reshape('output_norm.weight', [128], 8),
      { code: 'unsupported', key: 'output_norm.weight', value: 'Q8_0' },
    ],
  ];
  it.each(bad)('model facts - refuse %s', (_, change, expected) => {
    expect(errorOf(change)).toMatchObject(expected);
  });

  it('model facts - an architecture that is not supported is refused by name', () => {
    expect(() => checkModel({ ...factsOf(), architecture: 'gemma9' })).toThrow(
      'key general.architecture is gemma9; supported are llama, qwen2',
    );
  });

  it('model facts - qwen2 without its biases is refused', () => {
    expect(errorOf(() => undefined, { architecture: 'qwen2', bias: false })).toMatchObject({
      code: 'missing_tensor',
      key: 'blk.0.attn_q.bias',
    });
  });

  it.each<[string, (facts: Record<string, unknown> & ModelFacts) => void, string]>([
    ['another version', (facts) => Object.assign(facts, { version: 2 }), 'version'],
    ['a digest that is a path', (facts) => Object.assign(facts, { sourceSha256: '../../etc/passwd' }), 'sourceSha256'],
    ['a fraction of layers', (facts) => Object.assign(facts, { layers: 1.5 }), 'layers'],
    [
      'a tensor past the end',
      (facts) => Object.assign(facts.tensors.at(-1) ?? {}, { offset: facts.sourceBytes }),
      'tensors[19].offset',
    ],
    [
      'overlapping tensors',
      (facts) => Object.assign(facts.tensors[1] ?? {}, { offset: facts.tensors[0]?.offset }),
      'tensors[1].offset',
    ],
    ['bytes that do not fit the shape', (facts) => Object.assign(facts.tensors[0] ?? {}, { bytes: 1 }), 'tensors[0].bytes'],
    [
      'a shape that overflows',
      (facts) => Object.assign(facts.tensors[0] ?? {}, { shape: [2 ** 52, 2 ** 52] }),
      'tensors[0].bytes',
    ],
    ['an unknown tensor type', (facts) => Object.assign(facts.tensors[0] ?? {}, { type: 'toString' }), 'tensors[0].type'],
  ])('model facts - on receipt refuse %s', (_, change, field) => {
    const facts = structuredClone(factsOf()) as Record<string, unknown> & ModelFacts;
    change(facts);
    expect(() => parseModelFacts(JSON.stringify(facts))).toThrow(`field ${field} of the model description`);
  });

  it('model facts - on receipt refuse what is not JSON', () => {
    expect(() => parseModelFacts('{')).toThrow('the model description is not JSON');
    expect(() => parseModelFacts('[]')).toThrow('field at the top of the model description is a list of 0: it must be an object');
  });
});
