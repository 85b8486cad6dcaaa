/**
 * Programs whose bits are free: products of BF16 weights for many tokens by cuBLASLt, which is opened when the executor is made. On the emulated machine it is a stand-in
 * (simt/cublas_lt_stand_in.cpp) that checks what it is given and sums in an order of its own. Not shown: what the library itself computes, and how fast.
 */
import { dirname, join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { loadAddonFrom, type Addon } from '../../kernels/index.ts';
import { buildKernelTarget } from './build-target.ts';
import { bf16Shape as shape, smallModel, type SmallShape } from './small-model.ts';
import { linesOf } from './test-program.ts';
import { randomTokens, TinyMesh, type MeshOptions } from './tiny-model.ts';

const cases = [
  'has the sums of double precision for any shape and number of tokens, parts of rows, with and without a bias',
  'products of one shape share a plan, and each keeps its bias',
  'refuses operands that are not aligned and numbers of tokens that were not planned; the library refuses what it was not asked for',
  'says in one line that the library is missing, lacks a function, or answers with an error',
];

describe.skipIf(process.platform !== 'linux' || process.arch !== 'x64')('cuBLASLt on the emulated machine', () => {
  let lines: string[] = [];
  let addon: Addon;
  let standIn = '';
  let other = '';

  beforeAll(async () => {
    const binary = await buildKernelTarget('cuda_blas_test');
    standIn = join(dirname(binary), 'libcublas_lt_stand_in.so');
    other = join(dirname(binary), 'nvml', 'libnvidia-ml.so.1');
    lines = await linesOf(binary, [standIn, other], 60_000);
    addon = loadAddonFrom(`${await buildKernelTarget('shardmesh_cuda_emulated')}.node`);
  }, 600_000);

  it.each(cases)('cuda blas - %s', (name) => {
    expect(lines.find((line) => line.includes(name))).toBe(`ok cuda blas - ${name}`);
  });

  interface Found {
    tokens: number[];
    logprobs: number[];
    notes: string[];
    bytes: number;
  }
  /** Log-probabilities of tokens of a prompt, in two chunks, and then three tokens one by one; what executors say of themselves. */
  const text = async (
    bits: NonNullable<SmallShape['bits']>,
    options: MeshOptions & {
      library?: string;
      answer?: string;
      answerInSteps?: string;
      tp?: number[];
      pp?: number;
      tokens?: number;
    } = {},
  ): Promise<Found> => {
    const { library, answer, answerInSteps, tp = [1], pp = 1, tokens: length = 150, ...mesh } = options;
    const model = smallModel({ ...shape, bits });
    const set = (name: string, value: string | undefined): void => {
      if (value === undefined) Reflect.deleteProperty(process.env, name);
      else process.env[name] = value;
    };
    set('SHARDMESH_EMULATED_CUBLASLT', library);
    set('SHARDMESH_STAND_IN_CUBLASLT', answer);
    let members: TinyMesh | undefined;
    try {
      members = await TinyMesh.ofPrograms(model.programs(tp, pp), (slice) => model.blocksOf(slice), {
        stepTokensMax: 170,
        ...mesh,
      });
      set('SHARDMESH_STAND_IN_CUBLASLT', answerInSteps);
      members.open(0);
      const prompt = randomTokens(length, 3);
      const first = length - 21;
      const blocks = Array.from({ length: 12 }, (_, i) => (i * 7 + 5) % 12);
      const found: Found = {
        tokens: [],
        logprobs: [],
        notes: members.members.map(({ executor }) => executor.note),
        bytes: members.members.reduce((sum, { executor }) => sum + executor.bytes, 0),
      };
      const step = async (position: number, tokens: number[], scores: (number | null)[]): Promise<void> => {
        const outputs = scores.map((score, row) => ({ row: tokens.length - scores.length + row, score }));
        for (const { token, logprob } of await members!.run([{ slot: 0, position, tokens, blocks, outputs }])) {
          found.tokens.push(token);
          found.logprobs.push(logprob!);
        }
      };
      // Of 150 tokens chunks of 129 and 21: the library, which computes rows of 170, and own kernels.
      await step(0, prompt.slice(0, first), prompt.slice(first - 29, first + 1));
      await step(first, prompt.slice(first), [...prompt.slice(first + 11), null]);
      for (let i = 0; i < 3; i++) await step(length + i, [found.tokens.at(-1)!], [null]);
      return found;
    } finally {
      set('SHARDMESH_EMULATED_CUBLASLT', undefined);
      set('SHARDMESH_STAND_IN_CUBLASLT', undefined);
      await members?.stop();
    }
  };
  const cuda = (): MeshOptions => ({ addon, kind: 'cuda' });
  /** The mean and the largest distance of their log-probabilities. */
  const distances = (a: Found, b: Found): [number, number] => {
    const each = a.logprobs.map((value, i) => Math.abs(value - b.logprobs[i]!));
    return [each.reduce((sum, one) => sum + one, 0) / each.length, Math.max(...each)];
  };
  /** Activations are rounded to bf16 for both, which costs as much against the reference; beside that only the order of sums differs. */
  const expectNear = (found: Found, perKind: Found, want: Found): void => {
    const [[mean, most], [meanOfSums, mostOfSums]] = [distances(found, want), distances(found, perKind)];
    expect(mean).toBeLessThan(0.015);
    expect(most).toBeLessThan(0.06);
    expect(meanOfSums).toBeLessThan(0.002);
    expect(mostOfSums).toBeLessThan(0.02);
    expect(mostOfSums).toBeGreaterThan(0); // the library did compute
  };
  const served = 'BF16 products of more than 64 tokens by cuBLASLt 13.1.0';

  it('cuda blas - whole programs with free bits are near the reference on any cut, and say who computes', async () => {
    const [want, perKind] = [await text('exact'), await text('per-kind', cuda())];
    expect(await text('free')).toEqual(want); // a processor has one arithmetic
    const found = await text('free', { ...cuda(), library: standIn });
    expect(found.notes).toEqual([served]);
    expectNear(found, perKind, want);
    expect(perKind.notes).toEqual(['']);
    // Row after row weights take no more than in strips; there is a workspace beside them.
    expect(found.bytes - perKind.bytes).toBeGreaterThan(0);
    expect(found.bytes - perKind.bytes).toBeLessThan(2_000);

    // Partial products of one and of several subtrees, and stages.
    const ranks = await text('free', { ...cuda(), library: standIn, tp: [3, 1] });
    expect(ranks.notes).toEqual([served, served]);
    expectNear(ranks, perKind, want);
    const stages = await text('free', { ...cuda(), library: standIn, pp: 2 });
    expectNear(stages, perKind, want);
    const peers = await text('free', { ...cuda(), library: standIn, tp: [1, 1], peers: 'card' });
    expectNear(peers, perKind, want);
  });

  it('cuda blas - without the library, a function of it or an algorithm, own kernels compute, with the bits per kind and one line that says so', async () => {
    const want = await text('per-kind', { ...cuda(), tokens: 91 });
    const own = 'BF16 products by own kernels: ';
    const found = async (options: { library?: string; answer?: string; stepTokensMax?: number }): Promise<string> => {
      const { notes, ...bits } = await text('free', { ...cuda(), tokens: 91, ...options });
      expect(bits).toEqual({ tokens: want.tokens, logprobs: want.logprobs, bytes: bits.bytes });
      expect(notes[0]).toMatch(new RegExp(`^${own}[^\n]+$`));
      return notes[0]!.slice(own.length);
    };
    expect(await found({})).toMatch(/^cuBLASLt is not here \(libcublasLt\.so\.emulated: cannot open shared object file: .*\)$/);
    expect(await found({ library: other })).toBe('libnvidia-ml.so.1 has no cublasLtGetStatusString');
    expect(await found({ library: standIn, answer: 'Create 1' })).toBe(
      'cublasLtCreate of libcublas_lt_stand_in.so answers 1 (another status)',
    );
    expect(await found({ library: standIn, answer: 'MatmulAlgoGetHeuristic 15' })).toMatch(
      /^libcublas_lt_stand_in\.so has no algorithm for 128 x 128 weights and 128 tokens: cublasLtMatmulAlgoGetHeuristic of .* answers 15 \(.*\)$/,
    );
  });

  it('cuda blas - says that the library is not needed where no step has so many tokens', async () => {
    const model = smallModel({ ...shape, bits: 'free' });
    const mesh = await TinyMesh.ofPrograms(model.programs(1), (slice) => model.blocksOf(slice), { ...cuda(), stepTokensMax: 64 });
    const [{ executor }] = mesh.members as [(typeof mesh.members)[number]];
    expect(executor.note).toBe('BF16 products by own kernels: no step has more than 64 tokens');
    await mesh.stop();
  });

  it('cuda blas - a product that the library refuses is found when weights are here, before a step needs it', async () => {
    await expect(text('free', { ...cuda(), library: standIn, answer: 'Matmul 13' })).rejects.toThrow(
      "executor kind 'cuda': a product of BF16 weights fails: cublasLtMatmul of libcublas_lt_stand_in.so answers 13 (the function failed to launch on the GPU)",
    );
  });

  it('cuda blas - a product that the library refuses in a step fails the step, in one line', async () => {
    await expect(text('free', { ...cuda(), library: standIn, answerInSteps: 'Matmul 13' })).rejects.toThrow(
      /^step 1: .*cublasLtMatmul of libcublas_lt_stand_in\.so answers 13 \(the function failed to launch on the GPU\)$/,
    );
  });
});
