/**
 * Runs linear_test.cpp: matrix products of every CPU kernel set against the reference, with memcmp. Each of its cases is a test here. `avx512-emulated` and
 * `amx-emulated` are the sources of avx512 and amx on emulated_avx512.h, so that they run on any machine with AVX2.
 */
import { beforeAll, describe, expect, it } from 'vitest';
import { buildKernelTarget } from './build-target.ts';
import { linesOf } from './test-program.ts';

const sets = ['portable', 'avx2', 'avx512', 'amx', 'avx512-emulated', 'amx-emulated'];
const types = ['F32', 'F16', 'BF16', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0', 'Q4_K', 'Q5_K', 'Q6_K'];
const checks = [
  'packs without loss and reads rows back',
  "has the reference's bits for any shape, batch, segments and parts",
  "has the reference's bits where every product is extreme",
  "has the reference's bits for any shape, batch, segments and parts, int16 activations",
  "has the reference's bits where every product is extreme, int16 activations",
  "has the reference's bits, a range of rows and of columns at a time",
  'does not depend on tuning',
  "has the reference's bits where a row is longer than a panel",
];
const generalCases = [
  'kernel sets - are found by name and by what the machine runs',
  'kv layout - has the sizes that kernel_set.h draws',
  'linear reference - gives a range of rows and of columns what it gives the whole',
];

describe.skipIf(process.platform !== 'linux')('linear', () => {
  let lines: string[] = [];

  /** What the cases of `target` whose name contains one of `filters` print. */
  const linesOfTarget = async (target: string, ...filters: string[]) => {
    const binary = await buildKernelTarget(target);
    return await linesOf(binary, filters, 100_000);
  };

  beforeAll(async () => {
    lines = await linesOfTarget('linear_test');
    const sets = ['avx512', 'amx'];
    const emulated =
      process.arch === 'x64'
        ? await linesOfTarget('linear_test_emulated', ...sets.map((set) => `linear ${set} `))
        : sets.map((set) => `skip linear ${set}: x86-64 only`);
    for (const set of sets) {
      const ofSet = emulated.filter((line) => new RegExp(`^\\w+ linear ${set}[ :]`).test(line));
      lines.push(...ofSet.map((line) => line.replace(`linear ${set}`, `linear ${set}-emulated`)));
    }
  }, 600_000);

  /** `ok NAME`, or what the case says instead. */
  const outcome = (name: string) =>
    lines.find((line) => line === `ok ${name}` || line.startsWith(`FAIL ${name}:`)) ?? `no line for ${name}`;

  it.each(generalCases)('%s', (name) => {
    expect(outcome(name)).toBe(`ok ${name}`);
  });

  for (const set of sets) {
    for (const check of checks) {
      it.for(types)(`linear ${set} %s - ${check}`, (type, context) => {
        const skipped = lines.find((line) => line.startsWith(`skip linear ${set}:`));
        if (skipped) {
          expect(set).not.toBe('portable');
          context.skip(skipped);
        }
        const name = `linear ${set} ${type} - ${check}`;
        expect(outcome(name)).toBe(`ok ${name}`);
      });
    }
  }

  it('linear - reports no case that is not listed here', () => {
    const ran = sets.filter((set) => !lines.some((line) => line.startsWith(`skip linear ${set}:`)));
    expect(lines.filter((line) => line.startsWith('ok ') || line.startsWith('FAIL '))).toHaveLength(
      generalCases.length + ran.length * types.length * checks.length,
    );
  });
});
