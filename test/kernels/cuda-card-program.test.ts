/**
 * Whole programs whose CUDA ranks are in one graph, on an emulated card (simt/machine.h): nodes that no edge orders are done forwards, backwards and at random, so that
 * a reduction which does not wait for every rank is found.
 */
import { describe, expect, it } from 'vitest';
import { loadAddonFrom } from '../../kernels/index.ts';
import { buildKernelTarget } from './build-target.ts';
import { describeCudaCardPrograms } from './cuda-card-programs.ts';
import { randomTokens, TinyMesh, twoRankCut, type TinyMeshOptions } from './tiny-model.ts';

describe.skipIf(process.platform !== 'linux' || process.arch !== 'x64')('cuda ranks on one emulated card, whole programs', () => {
  const load = async () => loadAddonFrom(`${await buildKernelTarget('shardmesh_cuda_emulated')}.node`);
  describeCudaCardPrograms(load);

  it('cuda card - a reduction that lacks the edge from one rank is found', async () => {
    const withoutEdge = 'SHARDMESH_EMULATED_GRAPH_WITHOUT_EDGE';
    const generate = async (options: TinyMeshOptions): Promise<unknown> => {
      const mesh = await TinyMesh.start(options);
      try {
        return await mesh.generate(randomTokens(30), { logprobs: null, temperature: 0.9, seed: 3n }, 10);
      } catch (error) {
        return error;
      } finally {
        await mesh.stop();
      }
    };
    const cuda = { addon: await load(), kind: 'cuda', cut: twoRankCut, peers: 'together' } as const;
    const want = await generate({});
    expect(await generate(cuda)).toEqual(want);
    // Nodes by turns of the two ranks: 0 to 3 the embedding, 4 and 5 the first norm, 6 and 7 q k v, 8 and 9 attention, 10 and 11 o, 12 and 13 its reductions. Then 18 and 19, behind down.
    // Done backwards, rank 1 comes first, and then lacks the sums of rank 0.
    for (const edge of ['13:0', '19:0']) {
      process.env[withoutEdge] = edge;
      try {
        expect(await generate(cuda), edge).not.toEqual(want);
      } finally {
        delete process.env[withoutEdge];
      }
    }
  });
});
