/** What ptxas says each CUDA kernel takes, held against limits, of the part that the set-up has built (deploy/setup/cuda-part.mjs). Needs nvcc, not a card. */
import { existsSync, readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, it } from 'vitest';

const folder = fileURLToPath(new URL('../../build/cuda', import.meta.url));
const resources = `${folder}/resources.json`;
const couldNotBeCompiled = existsSync(`${folder}/.part-failed`);

interface Resources {
  kernel: string;
  architecture: string;
  registers: number;
  stackBytes: number;
  spillBytes: number;
}

// Where nvcc is missing or older than 12.8 the set-up builds nothing, and says so.
describe.skipIf(!existsSync(resources) && !couldNotBeCompiled)('compile table (skipped where there is no nvcc)', () => {
  let kernels: Resources[] = [];
  beforeAll(() => {
    expect(couldNotBeCompiled, 'nvcc could not compile the CUDA kernels; `npm run build:cuda` says why').toBe(false);
    kernels = JSON.parse(readFileSync(resources, 'utf8')) as Resources[];
  });

  const over = (isOver: (k: Resources) => boolean) => kernels.filter(isOver).map((k) => `${k.architecture} ${k.kernel}`);
  /** Prefill kernels may use local memory: the stack of the tree, or values of a whole row of attention. */
  const isPrefill = (k: Resources) => /^linear_((float|bf16)_)?prefill|^attention_kernel</.test(k.kernel);

  it('compile table - has every kernel for sm_80 and sm_90', () => {
    // Products of 7 quantised formats: 42 for decode (6 by tokens, strips and ring) and 7 for prefill, with int16 activations 14 (2 widths) and 7; of 3 float types 6 (2 widths)
    // and 3, of bf16 6 (3 widths by 2 layouts) and 1. 15 attention kernels of int8, 5 of f16; 10 of embedding rows; 5 that products share, 4 norms, 16 others.
    for (const architecture of ['sm_80', 'sm_90'])
      expect(kernels.filter((k) => k.architecture === architecture)).toHaveLength(141);
  });

  it('compile table - no kernel of a decode step spills', () => {
    expect(over((k) => !isPrefill(k) && k.spillBytes > 0)).toEqual([]);
  });

  it('compile table - a block of 16 decode warps fits the registers of a multiprocessor', () => {
    expect(over((k) => /^linear_((float|bf16)_)?decode|^linear_fused/.test(k.kernel) && k.registers > 128)).toEqual([]);
  });

  it('compile table - prefill spills little', () => {
    expect(over((k) => k.spillBytes > 640)).toEqual([]);
  });
});
