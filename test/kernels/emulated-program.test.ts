/** Whole programs on the avx512 and amx sets where the processor lacks them: the addon built once more with these sets on emulated_avx512.h. */
import { beforeAll, describe, expect, it } from 'vitest';
import { loadAddonFrom, type Addon } from '../../kernels/index.ts';
import { buildKernelTarget } from './build-target.ts';
import { randomTokens, threeRankTwoStageCut, TinyMesh, tinyWeights, wholeCut, type TinyMeshOptions } from './tiny-model.ts';

describe.skipIf(process.platform !== 'linux' || process.arch !== 'x64')(
  'avx512 and amx on emulated instructions, whole programs',
  () => {
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
      ['avx512, int8 keys, one chunk, one worker', 'avx512', 'int8', undefined, wholeCut],
      ['avx512, f16 keys, chunks of 9, one worker', 'avx512', 'f16', 9, wholeCut],
      ['avx512, int8 keys, chunks of 33, three ranks by two stages', 'avx512', 'int8', 33, threeRankTwoStageCut],
      ['amx, int8 keys, one chunk, one worker', 'amx', 'int8', undefined, wholeCut],
      ['amx, f16 keys, chunks of 9, three ranks by two stages', 'amx', 'f16', 9, threeRankTwoStageCut],
    ] as const)('emulated program - equals the reference: %s', async ([, isa, key, chunk, cut], { skip }) => {
      if (!addon.cpuFeatures().isas.includes(isa)) skip('this processor lacks AVX2, which the emulation needs');
      const emulated = await scores({ kind: 'cpu', isa, key, cut }, chunk);
      expect(emulated).toEqual(await scores({ kind: 'reference', key }));
      expect(new Set(emulated).size).toBeGreaterThan(50);
    });
  },
);
