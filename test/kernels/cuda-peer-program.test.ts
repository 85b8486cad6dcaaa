/**
 * Whole programs whose CUDA ranks read each other's sums, on emulated cards (simt/machine.h): each rank has a card of its own, which runs its kernels whenever the others' only
 * spin, and memory that others read is mapped for them read-only. Not shown: speed, and what a link between cards does.
 */
import { describe } from 'vitest';
import { loadAddonFrom } from '../../kernels/index.ts';
import { buildKernelTarget } from './build-target.ts';
import { describeCudaPeerPrograms } from './cuda-peer-programs.ts';

describe.skipIf(process.platform !== 'linux' || process.arch !== 'x64')('cuda peers on emulated cards, whole programs', () => {
  describeCudaPeerPrograms(async () => loadAddonFrom(`${await buildKernelTarget('shardmesh_cuda_emulated')}.node`));
});
