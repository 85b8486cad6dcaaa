/**
 * Runs each test of attention_test.cpp for every kernel set of this machine, and for avx512 on emulated_avx512.h. One process runs a test for all sets, since what
 * the reference computes for it takes most of the time. SHARDMESH_BENCH=1 prints the speed of attention as well.
 */
import { execFile, execFileSync } from 'node:child_process';
import { promisify } from 'node:util';
import { beforeAll, describe, expect, it } from 'vitest';
import { buildKernelTarget } from './build-target.ts';
import { linesOf } from './test-program.ts';

const run = promisify(execFile);

const names = (set: string) => [
  `attention ${set} - matches the reference for every head size, group size and context with int8 K`,
  `attention ${set} - matches the reference for every head size, group size and context with f16 K`,
  `attention ${set} - matches the reference for every head size, group size and context with f16 K and V`,
  `attention ${set} - matches the reference for several sequences, block sizes, windows and parts`,
  `attention ${set} - matches the reference when query heads lie unevenly over KV heads`,
  `attention ${set} - matches the reference on extreme, equal, steep and zero K and V`,
  `attention ${set} - matches the reference when weights vanish`,
  `attention ${set} - gives a row the same bits in any chunk`,
  `attention ${set} - never lets a masked or unwritten slot matter`,
  `store_kv ${set} - writes the same bytes as the reference and no others`,
  `rms_norm ${set} - matches the reference`,
  `rope ${set} - matches the reference in both styles`,
  `gated_activation ${set} - matches the reference at the ends of exp too`,
  `finish_tree ${set} - matches the reference for any cut of 1 to 16 units`,
  `all_finite ${set} - finds a bad value at any place`,
];
const sets = ['portable', 'avx2', 'avx512'];

/** The line of one test of `binary` and one set: `ok NAME`, or what it says instead. */
const outcomes = (binary: () => string, ...set: string[]) => {
  const runs = new Map<string, Promise<string[]>>();
  return async (name: string): Promise<string> => {
    const test = name.replace(/^(\w+) \w+ - /, '$1 - ');
    if (!runs.has(test)) runs.set(test, linesOf(binary(), [test, ...set], 110_000));
    const lines = await runs.get(test)!;
    return lines.find((line) => line === `ok ${name}` || line.startsWith(`FAIL ${name}:`)) ?? `no line for ${name}`;
  };
};

describe('attention and elementwise kernels', () => {
  let binary: string;
  /** Tests of the kernel sets that this machine runs. */
  let here: string[];
  beforeAll(async () => {
    binary = await buildKernelTarget('attention_test');
    here = execFileSync(binary, ['--list'], { encoding: 'utf8' }).trim().split('\n');
  }, 600_000);

  it('attention kernels - every test of attention_test.cpp is run here, and portable everywhere', () => {
    const known = sets.flatMap(names);
    expect(here.filter((name) => !known.includes(name))).toEqual([]);
    expect(here).toEqual(expect.arrayContaining(names('portable')));
  });

  const outcome = outcomes(() => binary);
  it.for(sets.flatMap(names))('%s', async (name, { skip }) => {
    const set = name.split(' ')[1];
    // A set is there whole or, where the processor lacks its instructions, not at all.
    if (!here.some((other) => other.split(' ')[1] === set)) skip(`this processor lacks ${set}`);
    expect(await outcome(name)).toBe(`ok ${name}`);
  });

  describe.runIf(process.arch === 'x64')('avx512 on emulated instructions', () => {
    let emulated: string;
    let known: string[];
    beforeAll(async () => {
      emulated = await buildKernelTarget('attention_test_emulated');
      known = execFileSync(emulated, ['--list'], { encoding: 'utf8' }).trim().split('\n');
    }, 600_000);

    const outcome = outcomes(() => emulated, 'avx512');
    it.for(names('avx512'))('emulated %s', async (name, { skip }) => {
      if (!known.some((other) => other.split(' ')[1] === 'avx2')) skip('this processor lacks AVX2, which the emulation needs');
      expect(await outcome(name)).toBe(`ok ${name}`);
    });
  });

  it.runIf(process.env['SHARDMESH_BENCH'] === '1')('attention kernels - speed', async () => {
    const { stdout } = await run(binary, ['--bench']);
    console.log(stdout);
    expect(stdout).toMatch(/GB\/s/);
  });
});
