/**
 * Whole programs on CUDA executors whose ranks read each other's sums (kernels/cuda/peer_reduce.h): the tokens and log-probabilities of the scalar reference, as exact
 * numbers, and what happens when a rank is missing. On the emulated machine for every `npm test`, on a card for `npm run test:gpu`.
 */
import { beforeAll, describe, expect, it } from 'vitest';
import type { Addon, SlotSampling } from '../../kernels/index.ts';
import { programmaticEdges } from './cuda-programs.ts';
import type { StepFailedError } from './tiny-model.ts';
import {
  memoryLink,
  failuresOf,
  randomTokens,
  threeRankTwoStageCut,
  TinyMesh,
  twoRankCut,
  type RankExecutor,
  type TinyMeshOptions,
  type TinyRows,
} from './tiny-model.ts';

/** @param load  the addon that has the CUDA executor, and a card to go with it */
export function describeCudaPeerPrograms(load: () => Promise<Addon>): void {
  const prompt = randomTokens(100);
  const blocks = [9, 3, 0, 14, 6, 2, 11];
  let cuda: RankExecutor;

  beforeAll(async () => {
    cuda = { addon: await load(), kind: 'cuda' };
  }, 600_000);

  const score = (mesh: TinyMesh, chunk = 100): Promise<number[]> => {
    mesh.open(0);
    return mesh.score(prompt, { chunk, blocks });
  };
  const reference = (): Promise<number[]> => TinyMesh.with({}, score);

  it.for([
    ['two ranks, card memory', 70, twoRankCut, 'card'],
    ['two ranks, host memory', 9, twoRankCut, 'host'],
    ['three uneven ranks by two stages, card memory', 41, threeRankTwoStageCut, 'card'],
    ['three uneven ranks by two stages, host memory', 64, threeRankTwoStageCut, 'host'],
  ] as const)('cuda peers - score a prompt as the reference does: %s', async ([, chunk, cut, peers]) => {
    expect(await TinyMesh.with({ ...cuda, cut, peers }, (mesh) => score(mesh, chunk))).toEqual(await reference());
  });

  it('cuda peers - score a prompt as the reference does with int16 activations, K and V in f16', async () => {
    const formats = { activations: 'int16', key: 'f16', value: 'f16' } as const;
    expect(await TinyMesh.with({ ...cuda, ...formats, cut: twoRankCut, peers: 'card' }, (mesh) => score(mesh, 41))).toEqual(
      await TinyMesh.with(formats, score),
    );
  });

  it('cuda peers - a step of many rows is finished in shares', async () => {
    const tokens = randomTokens(640, 11);
    const last = (options: TinyMeshOptions) =>
      TinyMesh.with({ cut: threeRankTwoStageCut, stepTokensMax: 640, ...options }, (mesh) => {
        mesh.open(0);
        const all = Array.from({ length: 40 }, (_, block) => block);
        return mesh.run([{ slot: 0, position: 0, tokens, blocks: all, outputs: [{ row: 639, score: null }] }], 60_000);
      });
    expect(await last({ ...cuda, peers: 'card' })).toEqual(await last({ kind: 'cpu' }));
  });

  it('cuda peers - queued steps give the text of the reference, greedy and sampled', async () => {
    const penalties = { temperature: 0.9, topP: 0.95, seed: 1234567890123456789n, repetitionPenalty: 1.3, frequencyPenalty: 0.3 };
    for (const sampling of [{}, penalties] as Partial<SlotSampling>[]) {
      const generate = (options: TinyMeshOptions) =>
        TinyMesh.with(options, (mesh) => mesh.generate(prompt.slice(0, 30), sampling, 16));
      expect(await generate({ ...cuda, cut: twoRankCut, peers: 'card' })).toEqual(await generate({}));
    }
  });

  it('cuda peers - a decode step is one graph from the rows of the embedding to the logits', async () => {
    await TinyMesh.with({ ...cuda, cut: twoRankCut, peers: 'card' }, async (mesh) => {
      await mesh.generate(prompt.slice(0, 30), { logprobs: null }, 6);
      for (const { executor } of mesh.members) {
        const [one] = executor.graphs();
        expect(one).toMatchObject({ rows: 1, steps: 5 });
        // The embedding, whose rows the ranks exchange; then the first norm, two layers and the tail: look at the rows, select them, norm, head, candidates. Up to 8 rows a
        // layer is q k v with rope, attention, o, its reduction with the norm, gate and up with the activation, down, its reduction with the norm.
        for (const { rows, nodes } of executor.graphs())
          expect(nodes, `${rows} rows`).toEqual([1, rows <= 8 ? 7 + 7 * 2 : 6 + 17 * 2]);
      }
    });
  });

  it('cuda peers - where graphs have programmatic edges, queued steps give the text of the reference', async () => {
    const generate = (options: TinyMeshOptions) => TinyMesh.with(options, (mesh) => mesh.generate(prompt.slice(0, 30), {}, 6));
    const want = await generate({});
    expect(await generate({ ...cuda, cut: threeRankTwoStageCut, peers: 'card', cudaTuning: programmaticEdges })).toEqual(want);
  });

  it('cuda peers - epochs follow each other, over card memory, host memory and frames', async () => {
    const want = await reference();
    await TinyMesh.with({ ...cuda, cut: twoRankCut, peers: 'card' }, async (mesh) => {
      expect(await score(mesh, 50)).toEqual(want);
      for (const peers of ['card', 'host', undefined, 'card'] as const) {
        await mesh.nextEpoch(peers);
        expect(await score(mesh, 50)).toEqual(want);
      }
    });
  });

  describe('a rank that does not come', () => {
    const rows: TinyRows[] = [{ slot: 0, position: 0, tokens: [1, 2, 3], blocks: [0], outputs: [{ row: 2, score: null }] }];
    /** The last rank of stage 1 gets no step; its peers find out in a reduction on their cards. */
    const withoutLast = (mesh: TinyMesh) => mesh.members.slice(0, -1);
    /** How the step ends on each of the other ranks of stage 1. */
    const failures = async (mesh: TinyMesh, timeoutMs: number, meanwhile: () => Promise<void>): Promise<StepFailedError[]> => {
      const [first, second] = [mesh.members[3]!, mesh.members[4]!];
      mesh.submit(rows, timeoutMs, withoutLast(mesh));
      const found = failuresOf([first, second]);
      await meanwhile();
      return found;
    };

    it('cuda peers - is named by all others when the deadline is over, and the next epoch works', async () => {
      await TinyMesh.with({ ...cuda, cut: threeRankTwoStageCut, peers: 'card' }, async (mesh) => {
        mesh.open(0);
        const began = performance.now();
        for (const failure of await failures(mesh, 300, () => Promise.resolve())) {
          expect(failure).toMatchObject({ code: 'wait_timeout', peer: { stage: 1, rank: 2 } });
          expect(failure.message).toMatch(
            /^step 1, operation \d+ \(all_reduce\): waited 300 ms for the block of stage 1 rank 2$/,
          );
        }
        // Two layers have four reductions; those behind the first end at once.
        expect(performance.now() - began).toBeLessThan(900);
        await mesh.nextEpoch('card');
        mesh.open(0);
        expect(await mesh.run(rows)).toHaveLength(1);
      });
    });

    it('cuda peers - is given up when the epoch ends', async () => {
      await TinyMesh.with({ ...cuda, cut: threeRankTwoStageCut, peers: 'host' }, async (mesh) => {
        mesh.open(0);
        const began = performance.now();
        const found = await failures(mesh, 60_000, async () => {
          await new Promise((resolve) => setTimeout(resolve, 200));
          await Promise.all(mesh.members.map(({ executor }) => executor.abort('rank 2 was lost')));
        });
        for (const failure of found) {
          expect(failure.code).toBe('aborted');
          expect(failure.message).toMatch(
            /\(all_reduce\) was aborted while waiting for the block of stage 1 rank 2: rank 2 was lost$/,
          );
        }
        expect(performance.now() - began).toBeLessThan(5_000);
      });
    });
  });

  it('cuda peers - refuse memory that is not what it should be, by name', async () => {
    await TinyMesh.with({ ...cuda, cut: twoRankCut }, async (mesh) => {
      const [a, b] = mesh.members.map(({ executor }) => executor);
      const refused = (change: object): string => {
        const segment = b!.openSegment();
        a!.openSegment();
        const memory = { ...memoryLink(b!, 'host'), ...change };
        try {
          a!.connect([{ peer: { stage: 0, rank: 1 }, driver: 'peer', ...segment, memory, epoch: 7 }]);
        } catch (error) {
          return (error as Error).message;
        }
        return 'taken';
      };
      await Promise.all([a, b].map((executor) => executor!.abort('a new epoch begins')));
      expect(refused({})).toBe('taken');
      expect(refused({ bytes: 1_000 })).toBe('memory of rank 1 cannot be read here: it has 1000 bytes, which is no two blocks');
      expect(refused({ bytes: 256 + 512 })).toMatch(
        /^memory of rank 1 cannot be read here: a memory file: it has \d+ bytes, expected 768$/,
      );
      expect(refused({ fd: 0 })).toMatch(
        /^memory of rank 1 cannot be read here: a memory file: \/proc\/\d+\/fd\/0 is .*, no memory of a rank$/,
      );
      expect(refused({ place: 'elsewhere' })).toBe("peers[0].memory.place must be 'card' or 'host', got 'elsewhere'");
      expect(refused({ place: 'card', handle: '00' })).toBe('peers[0].memory.handle is not 64 bytes in hexadecimal');
    });
    // A processor, one rank alone, and sums that are rounded on their way.
    for (const options of [{ cut: twoRankCut }, cuda, { ...cuda, cut: twoRankCut, wire: 'q8' }] as TinyMeshOptions[])
      await TinyMesh.with(options, (mesh) => {
        for (const { executor } of mesh.members) expect(executor.peerMemory()).toBeNull();
        return Promise.resolve();
      });
  });
}
