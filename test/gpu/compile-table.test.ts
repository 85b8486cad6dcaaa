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
  const isPrefill = (k: Resources) => k.kernel.startsWith('linear_prefill') || /^attention_kernel<.*true>/.test(k.kernel);

  it('compile table - has every kernel for sm_80 and sm_90', () => {
    // 28 decode products (7 formats, 4 widths), 7 prefill products, one for all formats, 12 attention kernels, 7 of embedding rows, 14 others.
    for (const architecture of ['sm_80', 'sm_90'])
      expect(kernels.filter((k) => k.architecture === architecture)).toHaveLength(69);
  });

  it('compile table - no kernel of a decode step spills', () => {
    expect(over((k) => !isPrefill(k) && k.spillBytes > 0)).toEqual([]);
  });

  it('compile table - a block of 16 decode warps fits the registers of a multiprocessor', () => {
    expect(over((k) => /^linear_(decode|fused)/.test(k.kernel) && k.registers > 128)).toEqual([]);
  });

  it('compile table - prefill spills little', () => {
    expect(over((k) => k.spillBytes > 640)).toEqual([]);
  });
});
