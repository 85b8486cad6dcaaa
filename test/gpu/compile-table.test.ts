/** What ptxas says each CUDA kernel takes, held against limits. Part of the `gpu` project: building the kernels takes minutes. Needs nvcc, not a card. */
import { execFileSync, spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, it } from 'vitest';

const root = fileURLToPath(new URL('../..', import.meta.url));

interface Resources {
  kernel: string;
  architecture: string;
  registers: number;
  stackBytes: number;
  spillBytes: number;
}

const hasNvcc = spawnSync(process.env.CUDACXX ?? 'nvcc', ['--version']).status === 0;

describe.skipIf(!hasNvcc)('compile table (skipped where nvcc is missing)', () => {
  let kernels: Resources[] = [];
  beforeAll(() => {
    execFileSync(process.execPath, ['deploy/setup/build-cuda.mjs'], { cwd: root, stdio: 'inherit' });
    kernels = JSON.parse(readFileSync(`${root}/build/cuda/resources.json`, 'utf8')) as Resources[];
  }, 1_200_000);

  const over = (isOver: (k: Resources) => boolean) => kernels.filter(isOver).map((k) => `${k.architecture} ${k.kernel}`);
  /** Prefill kernels may use local memory: the stack of the tree, or values of a whole row of attention. */
  const isPrefill = (k: Resources) => /^linear_((float|bf16)_)?prefill|^attention_kernel<.*true>/.test(k.kernel);

  it('compile table - has every kernel for sm_80 and sm_90', () => {
    // Products of 7 quantised formats: 28 for decode (4 widths) and 7 for prefill, with int16 activations 14 (2 widths) and 7; of 3 float types 6 (2 widths) and 3, of bf16
    // 6 (3 widths by 2 layouts) and 1. 15 attention kernels of int8, 5 of f16; 10 of embedding rows; one that products share, 17 others.
    for (const architecture of ['sm_80', 'sm_90'])
      expect(kernels.filter((k) => k.architecture === architecture)).toHaveLength(120);
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
