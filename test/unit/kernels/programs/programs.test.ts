import { describe, expect, it } from 'vitest';
import type { ModelFacts, TensorFacts } from '../../../../kernels/model-file/model-facts.ts';
import { rowBytes } from '../../../../kernels/model-file/quant-types.ts';
import { buildProgram, cutModel, unitsOfModel } from '../../../../kernels/programs/index.ts';
import type { Operation, Program, TensorType } from '../../../../kernels/programs/program.ts';

interface Shape {
  architecture: 'llama' | 'qwen2';
  layers: number;
  hiddenSize: number;
  heads: number;
  kvHeads: number;
  feedForwardSize: number;
  vocabularySize: number;
  matrix: TensorType;
  down: TensorType;
  embedding: TensorType;
  tied: boolean;
}

function makeFacts({
  architecture,
  layers,
  hiddenSize,
  heads,
  kvHeads,
  feedForwardSize,
  vocabularySize,
  matrix,
  down,
  embedding,
  tied,
}: Shape): ModelFacts {
  const tensors: TensorFacts[] = [];
  let offset = 4096;
  const add = (name: string, type: TensorType, shape: number[]): void => {
    const bytes = rowBytes(type, shape[0] ?? 0) * (shape[1] ?? 1);
    tensors.push({ name, type, shape, offset, bytes });
    offset += Math.ceil(bytes / 32) * 32;
  };
  if (!tied) add('output.weight', 'Q8_0', [hiddenSize, vocabularySize]);
  add('token_embd.weight', embedding, [hiddenSize, vocabularySize]);
  for (let layer = 0; layer < layers; layer++) {
    const at = `blk.${layer}.`;
    add(`${at}attn_norm.weight`, 'F32', [hiddenSize]);
    add(`${at}ffn_down.weight`, down, [feedForwardSize, hiddenSize]);
    add(`${at}ffn_gate.weight`, matrix, [hiddenSize, feedForwardSize]);
    add(`${at}ffn_up.weight`, matrix, [hiddenSize, feedForwardSize]);
    add(`${at}ffn_norm.weight`, 'F32', [hiddenSize]);
    for (const [name, width] of [
      ['k', kvHeads * 64],
      ['q', heads * 64],
      ['v', kvHeads * 64],
    ] as const) {
      if (architecture === 'qwen2') add(`${at}attn_${name}.bias`, 'F32', [width]);
      add(`${at}attn_${name}.weight`, matrix, [hiddenSize, width]);
    }
    add(`${at}attn_output.weight`, matrix, [heads * 64, hiddenSize]);
  }
  add('output_norm.weight', 'F32', [hiddenSize]);
  return {
    version: 1,
    architecture,
    name: architecture,
    sourceSha256: '0'.repeat(64),
    sourceBytes: offset,
    layers,
    hiddenSize,
    heads,
    kvHeads,
    headSize: 64,
    feedForwardSize,
    vocabularySize,
    contextTokensMax: 8192,
    normEpsilon: 1e-5,
    rope: { base: 100_000, dimensions: 64, scale: 1 },
    slidingWindow: null,
    tensors,
  };
}
const smollm = makeFacts({
  architecture: 'llama',
  layers: 30,
  hiddenSize: 576,
  heads: 9,
  kvHeads: 3,
  feedForwardSize: 1536,
  vocabularySize: 49152,
  matrix: 'Q4_1',
  down: 'Q4_1',
  embedding: 'Q8_0',
  tied: true,
});
const qwen = makeFacts({
  architecture: 'qwen2',
  layers: 24,
  hiddenSize: 896,
  heads: 14,
  kvHeads: 2,
  feedForwardSize: 4864,
  vocabularySize: 151936,
  matrix: 'Q5_0',
  down: 'Q6_K',
  embedding: 'Q5_0',
  tied: false,
});

const equal = (count: number) => ({ count, parts: null });
function program(
  facts: ModelFacts,
  tp: number | number[],
  pp: number,
  stage: number,
  rank: number,
  rest: Partial<Parameters<typeof buildProgram>[2]> = {},
): Program {
  const shares = typeof tp === 'number' ? equal(tp) : { count: tp.length, parts: tp };
  return buildProgram(facts, cutModel(unitsOfModel(facts), shares, equal(pp)), {
    stage,
    rank,
    activations: 'int8',
    kvType: 'auto',
    contextTokensMax: null,
    ...rest,
  });
}
const names = ({ operations }: Program) => operations.map(({ op }) => op);
const find = <K extends Operation['op']>({ operations }: Program, op: K, nth = 0): Extract<Operation, { op: K }> => {
  const found = operations.filter((one): one is Extract<Operation, { op: K }> => one.op === op)[nth];
  if (!found) throw new Error(`no operation ${op} ${nth}`);
  return found;
};
const width = ({ buffers }: Program, name: string) => buffers.find((buffer) => buffer.name === name)?.width;
const layerOperations = [
  'rms_norm',
  'linear',
  'linear',
  'linear',
  'rope',
  'rope',
  'store_kv',
  'attention',
  'linear_partial',
  'all_reduce',
  'rms_norm',
  'linear',
  'linear',
  'gated_activation',
  'linear_partial',
  'all_reduce',
];

describe('llama program', () => {
  it('llama program - of one rank is embed, 30 layers, head, sample', () => {
    const whole = program(smollm, 1, 1, 0, 0);
    expect(names(whole)).toEqual([
      'embed',
      ...Array.from({ length: 30 }, () => layerOperations).flat(),
      'select_rows',
      'rms_norm',
      'linear',
      'sample',
    ]);
    expect(whole).toMatchObject({
      architecture: 'llama',
      bits: 'exact',
      hiddenSize: 576,
      vocabularySize: 49152,
      layers: { from: 0, to: 30 },
      contextTokensMax: 8192,
    });
    expect(whole.kv).toEqual({ layers: 30, heads: 3, headSize: 64, key: 'int8', value: 'int8' });
    expect(whole.weights).toHaveLength(30 * 9 + 2);
    expect(find(whole, 'linear').segments).toEqual([6, 12, 18]);
    expect(find(whole, 'linear_partial')).toMatchObject({
      segments: [2, 4, 6, 8, 10, 12, 14, 16, 18],
      cut: { units: 9, ranks: [{ from: 0, to: 9 }] },
      width: 576,
    });
    expect(find(whole, 'linear_partial', 1).segments.slice(0, 2)).toEqual([3, 6]);
    expect(find(whole, 'rope')).toEqual({
      op: 'rope',
      buffer: 'q',
      heads: 9,
      headSize: 64,
      dimensions: 64,
      style: 'adjacent',
      base: 100_000,
      scale: 1,
      factors: null,
    });
    expect(find(whole, 'attention')).toMatchObject({ heads: 9, kvHead: [0, 0, 0, 1, 1, 1, 2, 2, 2], scale: 0.125, window: null });
  });

  it('llama program - holds a tied embedding once where one rank both looks up and multiplies', () => {
    const whole = program(smollm, 1, 1, 0, 0);
    expect(whole.weights.filter(({ tensor }) => tensor === 'token_embd.weight')).toEqual([
      { tensor: 'token_embd.weight', type: 'Q8_0', rows: { from: 0, to: 49152 }, columns: { from: 0, to: 576 }, use: 'matrix' },
    ]);
    const heads = whole.operations.filter((one) => one.op === 'linear');
    expect(heads.at(-1)?.weight).toBe(find(whole, 'embed').weight);
    expect(program(smollm, 1, 2, 0, 0).weights[0]).toMatchObject({ tensor: 'token_embd.weight', use: 'embedding' });
    expect(program(smollm, 1, 2, 1, 0).weights.at(-2)).toMatchObject({ tensor: 'token_embd.weight', use: 'matrix' });
  });

  it('llama program - of two ranks holds the KV head between them on both', () => {
    const [first, second] = [program(smollm, 2, 1, 0, 0), program(smollm, 2, 1, 0, 1)];
    expect([width(first, 'q'), width(first, 'k'), width(first, 'gate')]).toEqual([320, 128, 768]);
    expect([width(second, 'q'), width(second, 'k'), width(second, 'gate')]).toEqual([256, 128, 768]);
    expect(find(first, 'attention').kvHead).toEqual([0, 0, 0, 1, 1]);
    expect(find(second, 'attention').kvHead).toEqual([0, 1, 1, 1]);
    const weight = (one: Program, tensor: string) => one.weights.find((slice) => slice.tensor === tensor);
    expect(weight(second, 'blk.0.attn_q.weight')?.rows).toEqual({ from: 320, to: 576 });
    expect(weight(second, 'blk.0.attn_k.weight')?.rows).toEqual({ from: 64, to: 192 });
    expect(weight(second, 'blk.0.attn_output.weight')).toMatchObject({
      rows: { from: 0, to: 576 },
      columns: { from: 320, to: 576 },
    });
    expect(weight(second, 'blk.0.ffn_down.weight')).toMatchObject({
      rows: { from: 0, to: 576 },
      columns: { from: 768, to: 1536 },
    });
    expect(find(second, 'linear_partial')).toMatchObject({
      segments: [2, 4, 6, 8],
      rank: 1,
      cut: {
        units: 9,
        ranks: [
          { from: 0, to: 5 },
          { from: 5, to: 9 },
        ],
      },
    });
  });

  it('llama program - gathers rows and logits only where several ranks share the vocabulary', () => {
    const first = program(smollm, [3, 2, 1], 1, 0, 0);
    const vocabulary = [
      { from: 0, to: 24576 },
      { from: 24576, to: 40960 },
      { from: 40960, to: 49152 },
    ];
    expect(names(first).slice(0, 2)).toEqual(['embed', 'gather_rows']);
    expect(find(first, 'embed')).toMatchObject({ vocabulary, rank: 0 });
    expect(find(first, 'gather_logits')).toEqual({ op: 'gather_logits', in: 'own_logits', out: 'logits', vocabulary, rank: 0 });
    expect([width(first, 'own_logits'), width(first, 'logits')]).toEqual([24576, 49152]);
    expect(names(first).at(-1)).toBe('sample');
    expect(names(program(smollm, [3, 2, 1], 1, 0, 2)).at(-1)).toBe('gather_logits');
    expect(names(program(smollm, 1, 1, 0, 0))).not.toContain('gather_logits');
  });

  it('llama program - of a stage counts its own layers from 0', () => {
    const [first, last] = [program(smollm, 1, 3, 0, 0), program(smollm, 1, 3, 2, 0)];
    expect([names(first)[0], names(first).at(-1)]).toEqual(['embed', 'send_hidden']);
    expect([names(last)[0], names(last).at(-1)]).toEqual(['receive_hidden', 'sample']);
    expect(last).toMatchObject({ layers: { from: 20, to: 30 }, stage: 2, stages: 3 });
    expect(find(last, 'store_kv').layer).toBe(0);
    expect(last.weights[0]?.tensor).toBe('blk.20.attn_norm.weight');
    expect(last.kv.layers).toBe(10);
  });

  it('llama program - uses frequency factors when the file has them', () => {
    const factors: TensorFacts = { name: 'rope_freqs.weight', type: 'F32', shape: [32], offset: smollm.sourceBytes, bytes: 128 };
    const whole = program(
      { ...smollm, sourceBytes: smollm.sourceBytes + 128, tensors: [...smollm.tensors, factors] },
      1,
      1,
      0,
      0,
    );
    const { factors: index } = find(whole, 'rope');
    expect(index).not.toBeNull();
    expect(whole.weights[index ?? -1]).toMatchObject({
      tensor: 'rope_freqs.weight',
      columns: { from: 0, to: 32 },
      use: 'vector',
    });
  });

  it('llama program - takes the shorter of the asked and the own context', () => {
    expect(program(smollm, 1, 1, 0, 0, { contextTokensMax: 2048 }).contextTokensMax).toBe(2048);
    expect(program(smollm, 1, 1, 0, 0, { contextTokensMax: 99_999 }).contextTokensMax).toBe(8192);
  });
});

describe('qwen2 program', () => {
  it('qwen2 program - adds biases to q, k and v, turns halves, and keeps K in f16', () => {
    const whole = program(qwen, 1, 1, 0, 0);
    expect(whole.kv).toEqual({ layers: 24, heads: 2, headSize: 64, key: 'f16', value: 'int8' });
    expect(whole.bits).toBe('exact');
    expect(find(whole, 'rope').style).toBe('half');
    const biases = [0, 1, 2].map((nth) => whole.weights[find(whole, 'linear', nth).bias ?? -1]);
    expect(biases.map((weight) => [weight?.tensor, weight?.columns.to])).toEqual([
      ['blk.0.attn_q.bias', 896],
      ['blk.0.attn_k.bias', 128],
      ['blk.0.attn_v.bias', 128],
    ]);
    expect(find(whole, 'linear', 3).bias).toBeNull();
    expect(find(whole, 'linear').segments).toEqual([7, 14, 21, 28]);
    expect(find(whole, 'linear_partial', 1).segments).toEqual([16, 32, 48, 64, 80, 96, 112, 128, 144, 152]);
  });

  it('qwen2 program - keeps K in int8 when told to', () => {
    expect(program(qwen, 1, 1, 0, 0, { kvType: 'int8' })).toMatchObject({ bits: 'exact', kv: { key: 'int8' } });
  });

  it('qwen2 program - cuts biases with their rows, and holds the untied head apart from the embedding', () => {
    const second = program(qwen, 2, 1, 0, 1);
    const weight = (tensor: string) => second.weights.find((slice) => slice.tensor === tensor);
    expect(weight('blk.3.attn_q.bias')).toMatchObject({
      rows: { from: 0, to: 1 },
      columns: { from: 448, to: 896 },
      use: 'vector',
    });
    expect(weight('blk.3.attn_k.bias')?.columns).toEqual({ from: 64, to: 128 });
    expect(weight('blk.3.ffn_down.weight')?.columns).toEqual({ from: 2560, to: 4864 });
    expect(weight('token_embd.weight')).toMatchObject({ use: 'embedding', rows: { from: 76800, to: 151936 } });
    expect(weight('output.weight')).toMatchObject({ use: 'matrix', rows: { from: 76800, to: 151936 } });
  });

  it('qwen2 program - of a placement that does not cover the model is refused', () => {
    const cut = cutModel(unitsOfModel(qwen), equal(1), equal(2));
    expect(() =>
      buildProgram(
        qwen,
        { stages: cut.stages.slice(0, 1) },
        { stage: 0, rank: 0, activations: 'int8', kvType: 'auto', contextTokensMax: null },
      ),
    ).toThrow('layers of the placement end at 12, the model has 24');
  });
});

describe('programs', () => {
  it.each([1, 2, 3, 5, 9])('programs - all weight rows and columns of %i ranks together are the model, KV heads apart', (tp) => {
    const all = Array.from({ length: tp }, (_, rank) => program(smollm, tp, 1, 0, rank));
    const covered = (tensor: string, side: 'rows' | 'columns') =>
      all.reduce(
        (sum, one) =>
          sum +
          one.weights
            .filter((slice) => slice.tensor === tensor)
            .reduce((size, slice) => size + slice[side].to - slice[side].from, 0),
        0,
      );
    expect(covered('token_embd.weight', 'rows')).toBe(49152);
    expect(covered('blk.7.attn_q.weight', 'rows')).toBe(576);
    expect(covered('blk.7.attn_output.weight', 'columns')).toBe(576);
    expect(covered('blk.7.ffn_up.weight', 'rows')).toBe(1536);
    expect(covered('blk.7.ffn_down.weight', 'columns')).toBe(1536);
    expect(covered('blk.7.attn_k.weight', 'rows')).toBeGreaterThanOrEqual(192);
  });

  it('programs - name only declared buffers and weights', () => {
    for (const one of [program(smollm, 3, 2, 0, 2), program(smollm, 3, 2, 1, 0), program(qwen, 2, 3, 1, 1)]) {
      const buffers = new Set(one.buffers.map(({ name }) => name));
      for (const operation of one.operations)
        for (const [field, value] of Object.entries(operation)) {
          if (['in', 'out', 'buffer', 'residual', 'gate', 'up', 'q', 'k', 'v', 'logits'].includes(field))
            expect(buffers).toContain(value);
          if (['weight', 'bias', 'factors'].includes(field) && value !== null) expect(one.weights[value as number]).toBeDefined();
        }
    }
  });
});
