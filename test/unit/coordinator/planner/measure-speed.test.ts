import { describe, expect, test } from 'vitest';
import {
  generatedBlocks,
  linkFacts,
  measureKernels,
  measureReduction,
  sampleFacts,
} from '../../../../coordinator/planner/measure-speed.ts';
import { loadAddon } from '../../../../kernels/index.ts';
import { kvBytesPerBlock } from '../../../../coordinator/planner/placement-planner.ts';
import { tensorTypeNames } from '../../../../kernels/model-file/quant-types.ts';
import { buildProgram, cutModel, unitsOfModel } from '../../../../kernels/programs/index.ts';
import { makeFacts } from './make-facts.ts';

const MiB = 1024 ** 2;
const one = { count: 1, parts: null };
const programOf = (facts: ReturnType<typeof makeFacts>) =>
  buildProgram(facts, cutModel(unitsOfModel(facts), one, one), {
    stage: 0,
    rank: 0,
    activations: 'int8',
    kvType: 'auto',
    contextTokensMax: 64,
  });
const bytesOf = (facts: ReturnType<typeof makeFacts>): number => facts.tensors.reduce((sum, tensor) => sum + tensor.bytes, 0);

describe('generated weights', () => {
  test('generated weights - a model that fits is taken whole', () => {
    const facts = makeFacts();
    expect(sampleFacts(facts, 100 * MiB)).toMatchObject({ layers: 30, vocabularySize: 49_152, feedForwardSize: 1_536 });
  });

  test('generated weights - fewer layers and a shorter head otherwise', () => {
    const sample = sampleFacts(makeFacts(), 32 * MiB);
    // Head of 24,576 rows: 14.3 MiB; 8 layers of 2.11 MiB.
    expect(sample).toMatchObject({ layers: 8, vocabularySize: 24_576, feedForwardSize: 1_536, heads: 9 });
    expect(bytesOf(sample)).toBeLessThan(32 * MiB);
    expect(programOf(sample).layers).toEqual({ from: 0, to: 8 });
  });

  test('generated weights - one layer of a large model shrinks until it fits, and is still a model', () => {
    const large = makeFacts(
      {
        layers: 80,
        hiddenSize: 8_192,
        heads: 64,
        kvHeads: 8,
        headSize: 128,
        feedForwardSize: 28_672,
        rope: { base: 1e4, dimensions: 128, scale: 1 },
      },
      'Q4_K',
      'Q6_K',
    );
    const sample = sampleFacts(large, 48 * MiB);
    expect(sample).toMatchObject({ layers: 1, hiddenSize: 8_192, headSize: 128 });
    expect(bytesOf(sample)).toBeLessThan(64 * MiB);
    expect(programOf(sample).operations.length).toBeGreaterThan(10);
  });

  test('generated weights - two ranks can share the model that links are measured with', () => {
    const facts = linkFacts(makeFacts());
    const cut = cutModel(unitsOfModel(facts), { count: 2, parts: null }, one);
    expect(cut.stages[0]?.ranks.map((rank) => rank.attentionUnits)).toEqual([
      { from: 0, to: 1 },
      { from: 1, to: 2 },
    ]);
  });

  test.each(tensorTypeNames)('generated weights - blocks of %s have small scales, whatever their length', (type) => {
    const blocks = generatedBlocks(type, 210 * 176 * 144 * 34);
    const view = new DataView(blocks.buffer);
    if (type === 'F32') expect([view.getFloat32(0, true), view.getFloat32(4, true)]).toEqual([-0.0625, 0.0625]);
    else if (type === 'F16') expect([view.getUint16(0, true), view.getUint16(2, true)]).toEqual([0xac00, 0x2c00]);
    else if (type === 'BF16') expect([view.getUint16(0, true), view.getUint16(2, true)]).toEqual([0xbd80, 0x3d80]);
    else expect(view.getUint16(type === 'Q6_K' ? 208 : 0, true)).toBe(0x1400);
  });
});

describe('measured speed', () => {
  const addon = loadAddon();
  const { cores } = addon.cpuFeatures();
  const options = {
    addon,
    facts: makeFacts(),
    kind: 'cpu' as const,
    isa: null,
    activations: 'int8' as const,
    kvType: 'auto' as const,
    cores,
    sampleBytesMax: 4 * MiB,
  };

  test('measured speed - one point for one and for eight tokens, on one core and on all', async () => {
    const { points, isa, sampleBytes, stepSeconds } = await measureKernels(options);
    expect(points.map(({ threads, tokens }) => [threads, tokens])).toEqual(
      [...new Set([1, cores.length])].flatMap((threads) => [
        [threads, 1],
        [threads, 8],
      ]),
    );
    for (const { bytesPerSecond } of points) {
      expect(bytesPerSecond).toBeGreaterThan(1e6);
      expect(bytesPerSecond).toBeLessThan(1e12);
    }
    expect(addon.cpuFeatures().isas).toContain(isa);
    expect(sampleBytes).toBeLessThan(4 * MiB);
    expect(stepSeconds).toBeGreaterThan(0);
  });

  test.skipIf(cores.length < 2)('measured speed - a reduction takes less than 10 ms', async () => {
    // Beside other tests a rank may lose its core for longer than that; not every time.
    let link = await measureReduction(options);
    for (let again = 0; again < 5 && (link?.seconds ?? 0) >= 0.01; again++) link = await measureReduction(options);
    expect(link?.seconds).toBeGreaterThan(0);
    expect(link?.seconds).toBeLessThan(0.01);
    expect(link?.bytesPerSecond).toBeGreaterThan(1e6);
  });

  test('measured speed - a reduction cannot be measured on one core', async () => {
    expect(await measureReduction({ ...options, cores: [0] })).toBeNull();
  });

  test.each(['int8', 'f16-int8', 'f16'] as const)('measured speed - KV blocks of %s are as large as the addon says', (kvType) => {
    const facts = makeFacts();
    for (const count of [1, 2, 3]) {
      const cut = cutModel(unitsOfModel(facts), { count, parts: null }, one);
      const program = buildProgram(facts, cut, { stage: 0, rank: 0, activations: 'int8', kvType, contextTokensMax: null });
      for (const blockTokens of [16, 48])
        expect(kvBytesPerBlock(program.kv, blockTokens)).toBe(addon.kvBytesPerBlock(program, blockTokens));
    }
  });
});
