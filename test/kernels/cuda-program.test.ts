/**
 * Whole programs on the CUDA executor, its kernels on the emulated machine (simt/machine.h). Copies and launches are queued as on a card and done as late as a card may,
 * in changing orders of threads and blocks; memory is guarded and poisoned. Not shown: speed, and what only a card's memory can do.
 */
import { describe, expect, it } from 'vitest';
import { loadAddonFrom, type Addon } from '../../kernels/index.ts';
import { buildKernelTarget } from './build-target.ts';
import { describeCudaPrograms } from './cuda-programs.ts';
import { TinyMesh } from './tiny-model.ts';

const load = async (target: string): Promise<Addon> => loadAddonFrom(`${await buildKernelTarget(target)}.node`);

describe.skipIf(process.platform !== 'linux' || process.arch !== 'x64')('cuda executor on the emulated machine', () => {
  describeCudaPrograms(() => load('shardmesh_cuda_emulated'));

  it('cuda executor - tells the facts of its card', async () => {
    expect((await load('shardmesh_cuda_emulated')).cudaFacts()).toEqual({
      card: {
        name: 'emulated CUDA machine',
        sm: 80,
        memoryBytes: 8 * 2 ** 30,
        multiprocessors: 2,
        bandwidthBytes: 1e9,
        powerWatts: 5,
        driver: 'none',
      },
      absent: null,
    });
  });

  it('cuda executor - says in one line that there is no card, and that a build has no CUDA part', async () => {
    const start = (addon: Addon) => TinyMesh.start({ addon, kind: 'cuda' });
    const emulated = await load('shardmesh_cuda_emulated');
    process.env['SHARDMESH_EMULATED_CARD_ABSENT'] = 'no NVIDIA driver here';
    try {
      await expect(start(emulated)).rejects.toThrow("executor kind 'cuda': no NVIDIA driver here");
    } finally {
      delete process.env['SHARDMESH_EMULATED_CARD_ABSENT'];
    }
    const plain = await load('shardmesh_emulated');
    await expect(start(plain)).rejects.toThrow(
      "executor kind 'cuda': this addon was built without its CUDA part; run: npm run build:cuda",
    );
  });
});
