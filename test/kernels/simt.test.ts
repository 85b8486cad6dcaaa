/**
 * Runs simt/simt_test.cpp: the machine that runs CUDA kernels on the CPU. Each of its cases is a test here; those that begin with "finds" are kernels that are
 * wrong on purpose.
 */
import { beforeAll, describe, expect, it } from 'vitest';
import { buildKernelTarget } from './build-target.ts';
import { linesOf } from './test-program.ts';

const cases = [
  'sums over warps and blocks in every order',
  'shuffles, votes and reductions read the lanes they name',
  'integer mma of signed and unsigned bytes equals the plain product',
  'ldmatrix, half and bf16 mma equal the plain product',
  'ldmatrix transposes',
  'dp4a, byte permutation, rounding, half and bf16 conversion',
  'asynchronous copies arrive when they are waited for',
  'an asynchronous copy fills with zeros behind its source',
  'resident blocks may wait for each other',
  'a deadline ends a spin',
  'blocks run in the order that is asked for',
  'finds a missing barrier between warps',
  'finds a missing __syncwarp',
  'finds a read of an asynchronous copy that was not waited for',
  'finds a full-mask shuffle by half a warp',
  'finds a full-mask shuffle whose other half is at a barrier',
  'finds one shuffle at two sites',
  'finds two operations in one warp',
  'finds two masks in one operation',
  'finds a mask without the own lane',
  'finds a shuffle from a lane outside the mask',
  'finds a mask with lanes that the warp lacks',
  'finds barriers at two sites',
  'finds a barrier that a thread never reaches',
  'finds a write behind a buffer',
  'finds a write behind shared memory',
  'finds writes in the page of a buffer and not in it',
  'finds a misaligned vector load',
  'finds misaligned rows of ldmatrix',
  'finds wrong asynchronous copies',
  'finds a spin without end',
  'the block that comes last sees what the others have written; finds one that comes a block too early',
  'finds a race between blocks that live together',
  'a stream works in order, and not before it is waited for',
  'finds a host that changes what a queued copy reads',
  "a stream stops at a kernel's fault, and says it once",
  'a graph does its nodes as often as it is launched, each behind those of its edges',
  'a kernel behind a programmatic edge may do before its wait what touches no memory of the card',
  'finds a load before the wait for the grid before',
  'finds a store before it',
  'finds an atomic operation before it',
  'finds an asynchronous copy that is begun before it',
  'finds a prefetch of memory that is not there',
  'finds a kernel without the wait',
  'finds a thread that ends without the wait',
  'finds a thread that spins before it',
  'finds a barrier between the waits of a block',
  'nodes that no edge orders are done in any order',
  'finds a missing edge of a graph',
  'cards that run together see what another one has released, and no more',
  'of cards that run together, the one that faults is named',
  'refuses launches that no card takes',
];

describe.skipIf(process.platform !== 'linux' || process.arch !== 'x64')('simt', () => {
  let lines: string[] = [];
  beforeAll(async () => {
    const binary = await buildKernelTarget('simt_test');
    lines = await linesOf(binary, [], 60_000);
  }, 600_000);

  it.each(cases)('simt - %s', (name) => {
    expect(lines.find((line) => line === `ok simt - ${name}` || line.startsWith(`FAIL simt - ${name}:`))).toBe(
      `ok simt - ${name}`,
    );
  });

  it('simt - every case of simt_test.cpp is listed here', () => {
    expect(lines).toHaveLength(cases.length);
  });
});
