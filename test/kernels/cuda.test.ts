/**
 * Runs the CUDA kernels of kernels/cuda on the CPU (simt/machine.h) against the reference, with memcmp: simt/cuda_linear_test.cpp, cuda_step_test.cpp, cuda_fused_test.cpp and
 * cuda_early_test.cpp. Each of their cases is a test here. It proves indexes, barriers and every bit of the arithmetic; not speed, and not what only a card's memory can do.
 */
import { beforeAll, describe, expect, it } from 'vitest';
import { buildKernelTarget } from './build-target.ts';
import { linesOf } from './test-program.ts';

const quantised = ['Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0', 'Q4_K', 'Q5_K', 'Q6_K'];
const ofEachType = [
  "the decode product has the reference's bits for any shape, batch and segments",
  'the decode product does not depend on the order of threads and blocks',
  "the prefill product has the reference's bits for any shape, batch and segments",
  'the prefill product does not depend on the order of threads and blocks',
];
const cases = {
  cuda_linear_test: [
    ...['F32', 'F16', 'BF16', ...quantised].flatMap((type) => ofEachType.map((check) => `cuda linear ${type} - ${check}`)),
    ...quantised.map(
      (type) => `cuda linear ${type} - the decode product of one token has the reference's bits where a block has two strips`,
    ),
    ...quantised.map(
      (type) => `cuda linear ${type} - both products have the reference's bits with int16 activations, in any order`,
    ),
    'cuda linear - the decode products make every tree of 1 to 16 segments',
    'cuda linear - the prefill products make every tree of 1 to 16 segments',
    "cuda linear bf16 - both products of tensor cores have the reference's bits where no sum rounds",
    'cuda linear bf16 - both products of tensor cores give the same, as close to the true sums as fp32 is',
    'cuda linear - refuses shapes by name before any launch',
  ],
  cuda_step_test: [
    "cuda arithmetic - exp has the reference's bits",
    "cuda rms_norm - has the reference's bits, fp32 and quantised",
    "cuda gated_activation - has the reference's bits at the ends of exp too, fp32 and quantised",
    "cuda finish_tree - has the reference's bits for any cut of 1 to 16 units",
    "cuda rope_store_kv - writes the reference's bytes and no others, both styles, K and V int8 and f16",
    "cuda attention - has the reference's bits where pieces fold their spans",
    "cuda attention - has the reference's bits where a context is split into spans",
    "cuda attention - has the reference's bits where decode is split and prefill is not",
    "cuda attention - has the reference's bits where there is room to split some contexts only",
    'cuda attention - does not depend on the order of threads and blocks',
    "cuda embed - reads the reference's rows of every format, and leaves rows of other tokens alone",
    'cuda select_rows - copies the rows it is told',
    'cuda check_rows and quantize - name the first row that is not finite',
    'cuda rms_norm and gated_activation - name the first row whose quantised result is not finite',
    'cuda rope_store_kv - names the row whose k, once rotated, or v is not finite',
    "cuda head - picks the candidate that the sampler's noise picks, ties to the lower id, none where a logit is not finite",
    "cuda head - sums have the sampler's bits",
  ],
  cuda_fused_test: [
    'cuda fused - products of a gate and their activation have the bits of single launches',
    'cuda fused - products side by side have the bits of single launches',
    'cuda fused - a product into the residual has the bits of single launches',
    'cuda fused - a product into the residual and the norm behind it have the bits of single launches',
    'cuda fused - the end of a reduction and the norm behind it have the bits of single launches',
    'cuda fused - q, k and v, rotated and stored, have the bits of single launches, and rows that pad are left alone',
    'cuda fused - attention with its join has the bits of single launches',
    'cuda fused - refuses by name what does not belong together',
  ],
  cuda_early_test: [
    'cuda early - a chain with programmatic edges has the bits of one with plain edges',
    'cuda early - finds a product that never waits',
    'cuda early - finds a product that waits when it has read its activations',
    'cuda early - finds a counter that is set before the wait',
    'cuda early - finds a product in which one lane waits for its warp',
  ],
};

describe.skipIf(process.platform !== 'linux' || process.arch !== 'x64')('cuda kernels on the emulated machine', () => {
  for (const [target, names] of Object.entries(cases)) {
    describe(target, () => {
      let lines: string[] = [];
      beforeAll(async () => {
        const binary = await buildKernelTarget(target);
        lines = await linesOf(binary, [], 120_000);
      }, 600_000);

      it.each(names)('%s', (name) => {
        expect(lines.find((line) => line === `ok ${name}` || line.startsWith(`FAIL ${name}:`))).toBe(`ok ${name}`);
      });

      it('every case is listed here', () => {
        expect(lines.filter((line) => !line.startsWith('emulated '))).toHaveLength(names.length);
      });
    });
  }
});
