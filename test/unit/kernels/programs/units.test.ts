import { describe, expect, it } from 'vitest';
import fc from 'fast-check';
import {
  checkCut,
  columnSegments,
  CutError,
  cutModel,
  featuresOf,
  headsOf,
  kvHeadsOf,
  largestRemainder,
  maximalSubtrees,
  modelUnits,
  tokenIdsOf,
  unitSegments,
  type ModelCut,
  type ModelShape,
} from '../../../../kernels/programs/units.ts';

const shape = (rest: Partial<ModelShape>): ModelShape => ({
  layers: 30,
  hiddenSize: 576,
  heads: 9,
  kvHeads: 3,
  headSize: 64,
  feedForwardSize: 1536,
  vocabularySize: 49152,
  downBlockValues: [32],
  ...rest,
});
const smollm = modelUnits(shape({}));
const qwen = modelUnits(
  shape({
    layers: 24,
    hiddenSize: 896,
    heads: 14,
    kvHeads: 2,
    feedForwardSize: 4864,
    vocabularySize: 151936,
    downBlockValues: [256, 256],
  }),
);
const equal = (count: number) => ({ count, parts: null });
const shares = (...parts: number[]) => ({ count: parts.length, parts });
const borders = (cut: ModelCut, kind: 'attentionUnits' | 'feedForwardUnits' | 'vocabularyUnits') =>
  cut.stages[0]?.ranks.map((rank) => [rank[kind].from, rank[kind].to]);

describe('units', () => {
  it.each([
    [9, 3, 9, 1],
    [14, 2, 14, 1],
    [32, 8, 16, 2],
    [40, 10, 10, 4],
    [28, 4, 14, 2],
    [64, 64, 16, 4],
    [4, 2, 4, 1],
    [33, 33, 11, 3],
  ])('units - %i query heads over %i KV heads are %i attention units of %i', (heads, kvHeads, units, headsPerUnit) => {
    expect(modelUnits(shape({ heads, kvHeads })).attention).toEqual({ units, headsPerUnit, heads, kvHeads });
  });

  it('units - feed-forward units are whole blocks of down, the last may be short', () => {
    expect(smollm.feedForward).toEqual({ units: 16, valuesPerUnit: 96, values: 1536 });
    expect(qwen.feedForward).toEqual({ units: 10, valuesPerUnit: 512, values: 4864 });
    expect(featuresOf(qwen, { from: 9, to: 10 })).toEqual({ from: 4608, to: 4864 });
    expect(modelUnits(shape({ feedForwardSize: 4864, downBlockValues: [32, 256] })).feedForward.valuesPerUnit).toBe(512);
    expect(modelUnits(shape({ feedForwardSize: 4864, downBlockValues: [1] })).feedForward).toMatchObject({
      units: 16,
      valuesPerUnit: 320,
    });
  });

  it('units - vocabulary units are 1,024 ids, the last one short', () => {
    expect(smollm.vocabulary.units).toBe(48);
    expect(qwen.vocabulary.units).toBe(149);
    expect(tokenIdsOf(qwen, { from: 148, to: 149 })).toEqual({ from: 151552, to: 151936 });
  });

  it('units - a KV head whose query heads lie on two ranks belongs to both', () => {
    expect(kvHeadsOf(smollm, { from: 0, to: 5 })).toEqual({ from: 0, to: 2 });
    expect(kvHeadsOf(smollm, { from: 5, to: 9 })).toEqual({ from: 1, to: 3 });
    expect(headsOf(modelUnits(shape({ heads: 33, kvHeads: 33 })), { from: 10, to: 11 })).toEqual({ from: 30, to: 33 });
  });

  it('units - widths that are no whole groups are refused by name', () => {
    expect(() => modelUnits(shape({ headSize: 80 }))).toThrow('head size is 80, it must be a multiple of 32');
    expect(() => modelUnits(shape({ kvHeads: 2 }))).toThrow('9 query heads cannot share 2 KV heads evenly');
  });
});

describe('segments', () => {
  it.each([
    [576, [6, 12, 18]],
    [896, [7, 14, 21, 28]],
    [4096, [16, 32, 48, 64, 80, 96, 112, 128]],
    [32, [1]],
    [288, [5, 9]],
    [2560, [10, 20, 30, 40, 50, 60, 70, 80]],
  ])('segments - a product over %i columns is cut at %j', (columns, ends) => {
    expect(columnSegments(columns)).toEqual(ends);
  });

  it('segments - row-parallel ones end with their units', () => {
    expect(unitSegments([512, 512, 256])).toEqual([16, 32, 40]);
  });

  it('subtrees - are the maximal nodes inside a range', () => {
    expect(maximalSubtrees(9, { from: 0, to: 9 })).toEqual([{ first: 0, count: 9 }]);
    expect(maximalSubtrees(9, { from: 0, to: 5 })).toEqual([{ first: 0, count: 5 }]);
    expect(maximalSubtrees(9, { from: 1, to: 6 })).toEqual([
      { first: 1, count: 1 },
      { first: 2, count: 1 },
      { first: 3, count: 2 },
      { first: 5, count: 1 },
    ]);
  });

  it('subtrees - of all ranks cover every unit once', () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 16 }), fc.array(fc.integer({ min: 0, max: 16 }), { maxLength: 4 }), (units, cuts) => {
        const ends = [0, ...cuts.filter((cut) => cut < units).sort((a, b) => a - b), units];
        const leaves = ends.slice(1).flatMap((to, index) => maximalSubtrees(units, { from: ends[index] ?? 0, to }));
        expect(leaves.flatMap(({ first, count }) => Array.from({ length: count }, (_, i) => first + i))).toEqual(
          Array.from({ length: units }, (_, i) => i),
        );
      }),
    );
  });
});

describe('cut', () => {
  it('cut - two equal ranks of SmolLM2 meet at the nodes of the trees', () => {
    const cut = cutModel(smollm, equal(2), equal(1));
    expect(borders(cut, 'attentionUnits')).toEqual([
      [0, 5],
      [5, 9],
    ]);
    expect(borders(cut, 'feedForwardUnits')).toEqual([
      [0, 8],
      [8, 16],
    ]);
    expect(borders(cut, 'vocabularyUnits')).toEqual([
      [0, 24],
      [24, 48],
    ]);
  });

  it('cut - prefers KV-head borders where no rank gets more than its share', () => {
    expect(borders(cutModel(smollm, equal(3), equal(1)), 'attentionUnits')).toEqual([
      [0, 3],
      [3, 6],
      [6, 9],
    ]);
    // 16 units of 2 heads, a KV head every second unit: 6|4|6 splits none, where 6|5|5 would split one.
    const wide = modelUnits(shape({ heads: 32, kvHeads: 8, hiddenSize: 2048 }));
    const sizes = borders(cutModel(wide, equal(3), equal(1)), 'attentionUnits')?.map(([from = 0, to = 0]) => to - from);
    expect(Math.max(...(sizes ?? []))).toBe(6);
    expect(sizes?.every((size) => size % 2 === 0)).toBe(true);
  });

  it('cut - explicit shares are largest remainders, whatever the borders', () => {
    const cut = cutModel(smollm, shares(3, 2, 1), equal(1));
    expect(borders(cut, 'attentionUnits')).toEqual([
      [0, 5],
      [5, 8],
      [8, 9],
    ]);
    expect(borders(cut, 'feedForwardUnits')).toEqual([
      [0, 8],
      [8, 13],
      [13, 16],
    ]);
    expect(borders(cut, 'vocabularyUnits')).toEqual([
      [0, 24],
      [24, 40],
      [40, 48],
    ]);
  });

  it('cut - gives each rank at least one unit of each kind', () => {
    expect(largestRemainder(9, [1000, 1, 1])).toEqual([7, 1, 1]);
    expect(largestRemainder(3, [1, 1, 1000])).toEqual([1, 1, 1]);
    expect(largestRemainder(10, [1, 1, 1])).toEqual([4, 3, 3]);
  });

  it('cut - more ranks than units are refused by name', () => {
    expect(() => cutModel(smollm, equal(10), equal(1))).toThrow(
      '--tp 10: 10 ranks, but the model has 9 attention units and each rank needs one; at most 9 ranks are possible',
    );
    expect(() => cutModel(qwen, equal(11), equal(1))).toThrow('10 feed-forward units');
    expect(borders(cutModel(smollm, equal(9), equal(1)), 'attentionUnits')).toHaveLength(9);
  });

  it('cut - stages take equal numbers of layers, the longer first, or the numbers given', () => {
    const layers = (cut: ModelCut) => cut.stages.map((stage) => [stage.layers.from, stage.layers.to]);
    expect(layers(cutModel(smollm, equal(1), equal(4)))).toEqual([
      [0, 8],
      [8, 16],
      [16, 23],
      [23, 30],
    ]);
    expect(layers(cutModel(smollm, equal(1), shares(10, 20)))).toEqual([
      [0, 10],
      [10, 30],
    ]);
    expect(() => cutModel(smollm, equal(1), shares(10, 10))).toThrow('--pp 10:10 names 20 layers, the model has 30');
    expect(() => cutModel(smollm, equal(1), equal(31))).toThrow(CutError);
    expect(() => cutModel(smollm, shares(1, 0), equal(1))).toThrow('--tp 1:0: every share must be a whole number');
  });

  it('cut - of any shares covers the model', () => {
    fc.assert(
      fc.property(
        fc.array(fc.integer({ min: 1, max: 1000 }), { minLength: 1, maxLength: 9 }),
        fc.boolean(),
        fc.integer({ min: 1, max: 30 }),
        (parts, explicit, stages) => {
          for (const units of [smollm, qwen]) {
            const cut = cutModel(units, explicit ? shares(...parts) : equal(parts.length), equal(Math.min(stages, units.layers)));
            expect(() => checkCut(units, cut)).not.toThrow();
          }
        },
      ),
      { numRuns: 60 },
    );
  });

  it('cut - one with a gap is refused', () => {
    const cut = cutModel(smollm, equal(2), equal(1));
    const second = cut.stages[0]?.ranks[1];
    if (second) second.attentionUnits.from = 6;
    expect(() => checkCut(smollm, cut)).toThrow('attention units of stage 0 of the placement: range 6..9 follows 5');
  });
});
