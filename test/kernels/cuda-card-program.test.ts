/**
 * Whole programs whose CUDA ranks are in one graph, on an emulated card (simt/machine.h): nodes that no edge orders are done forwards, backwards and at random, so that
 * a reduction which does not wait for every rank is found.
 */
import { describe, expect, it } from 'vitest';
import { loadAddonFrom } from '../../kernels/index.ts';
import { buildKernelTarget } from './build-target.ts';
import { describeCudaCardPrograms } from './cuda-card-programs.ts';
import { randomTokens, TinyMesh, tinyWeights, twoRankCut, type TinyMeshOptions } from './tiny-model.ts';

describe.skipIf(process.platform !== 'linux' || process.arch !== 'x64')('cuda ranks on one emulated card, whole programs', () => {
  const load = async (target: string) => loadAddonFrom(`${await buildKernelTarget(target)}.node`);
  const weights = tinyWeights();
  describeCudaCardPrograms(() => load('shardmesh_cuda_emulated'));

  // Nodes by turns of the two ranks: 0 to 3 the embedding, 4 and 5 the first norm, 6 and 7 q k v, 8 and 9 attention, 10 and 11 o, 12 and 13 its reductions; 18 and 19 those behind down.
  // Done backwards, rank 1 comes first, and then lacks the sums of rank 0.
  it.for([
    ['a reduction that lacks the edge from one rank', 'shardmesh_cuda_emulated', 'SHARDMESH_EMULATED_GRAPH_WITHOUT_EDGE', '13:0'],
    ['the last one of a layer that does', 'shardmesh_cuda_emulated', 'SHARDMESH_EMULATED_GRAPH_WITHOUT_EDGE', '19:0'],
    [
      'a rank that writes the sums of all its reductions into one block',
      'shardmesh_cuda_broken_queue',
      'SHARDMESH_BROKEN_QUEUE',
      'block',
    ],
  ] as const)('cuda card - finds %s', async ([, target, fault, value]) => {
    const generate = async (options: TinyMeshOptions): Promise<unknown> => {
      const mesh = await TinyMesh.start({ weights, ...options });
      try {
        return await mesh.generate(randomTokens(30), { logprobs: null, temperature: 0.9, seed: 3n }, 5);
      } catch (error) {
        return error;
      } finally {
        await mesh.stop();
      }
    };
    const cuda = { addon: await load(target), kind: 'cuda', cut: twoRankCut, peers: 'together' } as const;
    const want = await generate({});
    expect(await generate(cuda)).toEqual(want);
    process.env[fault] = value;
    try {
      expect(await generate(cuda)).not.toEqual(want);
    } finally {
      delete process.env[fault];
    }
  });
});
