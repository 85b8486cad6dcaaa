/** Whole programs on the avx512 set where the processor has no AVX-512: the addon built once more with that set on emulated_avx512.h. */
import { beforeAll, describe, expect, it } from 'vitest';
import { loadAddonFrom, type Addon } from '../../kernels/index.ts';
import { buildKernelTarget } from './build-target.ts';
import { randomTokens, threeRankTwoStageCut, TinyMesh, tinyWeights, wholeCut, type TinyMeshOptions } from './tiny-model.ts';

describe.skipIf(process.platform !== 'linux' || process.arch !== 'x64')('avx512 on emulated instructions, whole programs', () => {
  const weights = tinyWeights();
  const prompt = randomTokens(100);
  let addon: Addon;

  beforeAll(async () => {
    addon = loadAddonFrom(`${await buildKernelTarget('shardmesh_emulated')}.node`);
  }, 600_000);

  const scores = async (options: TinyMeshOptions, chunk?: number) => {
    const mesh = await TinyMesh.start({ weights, addon, ...options });
    try {
      mesh.open(0);
      return await mesh.score(prompt, chunk === undefined ? {} : { chunk });
    } finally {
      await mesh.stop();
    }
  };

  it.for([
    ['int8 keys, one chunk, one worker', 'int8', undefined, wholeCut],
    ['f16 keys, chunks of 9, one worker', 'f16', 9, wholeCut],
    ['int8 keys, chunks of 33, three ranks by two stages', 'int8', 33, threeRankTwoStageCut],
  ] as const)('emulated avx512 program - equals the reference: %s', async ([, key, chunk, cut], { skip }) => {
    if (!addon.cpuFeatures().isas.includes('avx512')) skip('this processor lacks AVX2, which the emulation needs');
    const emulated = await scores({ kind: 'cpu', isa: 'avx512', key, cut }, chunk);
    expect(emulated).toEqual(await scores({ kind: 'reference', key }));
    expect(new Set(emulated).size).toBeGreaterThan(50);
  });
});
