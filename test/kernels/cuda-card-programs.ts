/**
 * Whole programs on CUDA executors of one process whose ranks do each step together on one card, as one graph (kernels/cuda/card_group.h): the tokens and log-probabilities
 * of the scalar reference, as exact numbers, and what happens when a rank does not come. On the emulated machine for every `npm test`, on a card for `npm run test:gpu`.
 */
import { beforeAll, describe, expect, it } from 'vitest';
import type { Addon, SlotSampling } from '../../kernels/index.ts';
import { programmaticEdges } from './cuda-programs.ts';
import {
  failuresOf,
  randomTokens,
  threeRankTwoStageCut,
  TinyMesh,
  twoRankCut,
  type RankExecutor,
  type StepFailedError,
  type TinyMeshOptions,
  type TinyRows,
} from './tiny-model.ts';

/** @param load  the addon that has the CUDA executor, and a card to go with it */
export function describeCudaCardPrograms(load: () => Promise<Addon>): void {
  const prompt = randomTokens(100);
  const blocks = [9, 3, 0, 14, 6, 2, 11];
  let cuda: RankExecutor & { peers: 'together' };

  beforeAll(async () => {
    cuda = { addon: await load(), kind: 'cuda', peers: 'together' };
  }, 600_000);

  const score = (mesh: TinyMesh, chunk = 100): Promise<number[]> => {
    mesh.open(0);
    return mesh.score(prompt, { chunk, blocks });
  };
  const generate = (options: TinyMeshOptions, sampling: Partial<SlotSampling> = {}, count = 8) =>
    TinyMesh.with(options, (mesh) => mesh.generate(prompt.slice(0, 30), sampling, count));

  it.for([
    ['two ranks', 70, twoRankCut, {}],
    ['three uneven ranks by two stages', 41, threeRankTwoStageCut, {}],
    ['int16 activations, K and V in f16', 41, twoRankCut, { activations: 'int16', key: 'f16', value: 'f16' }],
  ] as const)('cuda card - ranks score a prompt as the reference does: %s', async ([, chunk, cut, formats]) => {
    const want = await TinyMesh.with(formats, score);
    expect(await TinyMesh.with({ ...cuda, ...formats, cut }, (mesh) => score(mesh, chunk))).toEqual(want);
  });

  it('cuda card - queued steps give the text of the reference, greedy and sampled, with programmatic edges too', async () => {
    const penalties = { temperature: 0.9, topP: 0.95, seed: 1234567890123456789n, repetitionPenalty: 1.3, frequencyPenalty: 0.3 };
    for (const sampling of [{}, penalties, { temperature: 0.9, seed: 3n, logprobs: null }] as Partial<SlotSampling>[])
      expect(await generate({ ...cuda, cut: twoRankCut }, sampling)).toEqual(await generate({}, sampling));
    const early = { ...cuda, cut: threeRankTwoStageCut, cudaTuning: programmaticEdges };
    expect(await generate(early, {}, 6)).toEqual(await generate({}, {}, 6));
  });

  it('cuda card - a decode step of all ranks is one graph, from the embedding to the candidates', async () => {
    await TinyMesh.with({ ...cuda, cut: twoRankCut }, async (mesh) => {
      await mesh.generate(prompt.slice(0, 30), { logprobs: null }, 6);
      for (const { executor } of mesh.members) {
        expect(executor.graphs()[0]).toMatchObject({ rows: 1, steps: 5 });
        // Of each rank: the rows of the embedding that it has and that the other has, the first norm, two layers, and the tail: look at the rows, select them, norm, head, candidates,
        // report. Up to 8 rows a layer is q k v with rope, attention, o, its reduction with the norm, gate and up with the activation, down, its reduction with the norm.
        for (const { rows, nodes } of executor.graphs())
          expect(nodes, `${rows} rows`).toEqual([2 * (rows <= 8 ? 9 + 7 * 2 : 8 + 17 * 2)]);
      }
    });
  });

  it('cuda card - epochs follow each other, together, over frames and over card memory', async () => {
    const want = await TinyMesh.with({}, score);
    await TinyMesh.with({ ...cuda, cut: twoRankCut }, async (mesh) => {
      expect(await score(mesh)).toEqual(want);
      for (const peers of [undefined, 'card', 'together'] as const) {
        await mesh.nextEpoch(peers);
        expect(await score(mesh)).toEqual(want);
      }
    });
  });

  describe('a rank that does not come', () => {
    const rows: TinyRows[] = [{ slot: 0, position: 0, tokens: [1, 2, 3], blocks: [0], outputs: [{ row: 2, score: null }] }];
    const threeRankCut = { ...threeRankTwoStageCut, stages: [{ from: 0, to: 2 }] };
    /** Rank 2 gets no step. @returns how it ends on the others */
    const failures = async (mesh: TinyMesh, timeoutMs: number, meanwhile: () => Promise<void>): Promise<StepFailedError[]> => {
      mesh.submit(rows, timeoutMs, mesh.members.slice(0, -1));
      const found = failuresOf(mesh.members.slice(0, 2));
      await meanwhile();
      return found;
    };
    const pause = () => new Promise<void>((resolve) => setTimeout(resolve, 100));
    const onUnevenMesh = (use: (mesh: TinyMesh) => Promise<void>) =>
      TinyMesh.with({ ...cuda, cut: threeRankCut }, async (mesh) => {
        mesh.open(0);
        await use(mesh);
      });

    it('cuda card - is named by all others when the deadline is over, and the next epoch works', async () => {
      await onUnevenMesh(async (mesh) => {
        const began = performance.now();
        for (const failure of await failures(mesh, 300, () => Promise.resolve())) {
          expect(failure).toMatchObject({ code: 'wait_timeout', peer: { stage: 0, rank: 2 } });
          expect(failure.message).toBe('step 1: waited 300 ms for the step of stage 0 rank 2');
        }
        expect(performance.now() - began).toBeLessThan(2_000);
        await mesh.nextEpoch('together');
        mesh.open(0);
        expect(await mesh.run(rows)).toHaveLength(1);
      });
    });

    it('cuda card - is given up when the epoch ends', async () => {
      await onUnevenMesh(async (mesh) => {
        const found = await failures(mesh, 60_000, async () => {
          await pause();
          await Promise.all(mesh.members.map(({ executor }) => executor.abort('rank 2 was lost')));
        });
        for (const { code, message } of found)
          expect([code, message]).toEqual(['aborted', 'step 1 was aborted: rank 2 was lost']);
      });
    });

    it('cuda card - is named at once when it leaves while others wait', async () => {
      await onUnevenMesh(async (mesh) => {
        const found = await failures(mesh, 60_000, async () => {
          await pause();
          await mesh.members.at(-1)!.executor.dispose();
        });
        for (const failure of found) {
          expect(failure).toMatchObject({ code: 'link_lost', peer: { stage: 0, rank: 2 } });
          expect(failure.message).toBe('step 1: stage 0 rank 2 has left the card that both compute on');
        }
      });
    });

    it('cuda card - ranks that come with different steps are found', async () => {
      await TinyMesh.with({ ...cuda, cut: twoRankCut }, async (mesh) => {
        mesh.open(0);
        const [first, second] = mesh.members;
        const one = mesh.submit(rows, 10_000, [first!]);
        const other = mesh.submit([{ ...rows[0]!, tokens: [1, 2, 4] }], 10_000, [second!]);
        for (const { done } of [one, other])
          await expect(done).rejects.toThrow(
            /: ranks do not run the same step: rank \d has step \d from action \d on with 3 rows, 1 output rows and tokens of digest \d+, rank \d step \d /,
          );
      });
    });
  });

  it('cuda card - refuse ranks that cannot be together, by name', async () => {
    const connect = (options: TinyMeshOptions, link: object = {}) =>
      TinyMesh.with(options, async (mesh) => {
        const [a, b] = mesh.members.map(({ executor }) => executor);
        a!.openSegment();
        const segment = b!.openSegment();
        try {
          a!.connect([{ peer: { stage: 0, rank: 1 }, driver: 'card', ...segment, epoch: 7, ...link }]);
        } catch (error) {
          return Promise.resolve((error as Error).message);
        }
        return Promise.resolve('taken');
      });
    const two = { addon: cuda.addon!, kind: 'cuda', cut: twoRankCut } as const;
    expect(await connect(two)).toBe('taken');
    expect(await connect(two, { pid: process.ppid })).toBe(
      `connect: rank 1 is in process ${process.ppid}, this one in ${process.pid}; ranks share a card in one process`,
    );
    expect(await connect({ ...two, wire: 'q8' })).toBe('connect: sums that stay on a card are f32, but the wire is not');
    expect(await connect({ ...two, kind: 'cpu' })).toBe('this executor is on no card that ranks could share');
    expect(await connect(two, { driver: 'cards' })).toBe(
      "peers[0].driver must be 'shm', 'peer', 'card', 'tcp' or 'host', got 'cards'",
    );
  });
}
