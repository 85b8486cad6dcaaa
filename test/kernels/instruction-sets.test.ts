/**
 * Files built for an instruction set must not leak it: an inline function or template with external linkage, compiled there, may be the copy that the linker
 * picks for the whole addon, and then a machine without the instructions dies in code that was never meant for them.
 */
import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { buildKernelTarget } from './build-target.ts';

const operations = (set: string, names: string[]) => names.map((name) => `shardmesh::${set}::${name}`);
const ofSet = (set: string): Record<string, string[]> => ({
  [`attention_${set}.cpp.o`]: operations(set, ['attention', 'attention_scratch_bytes', 'store_kv']),
  [`elementwise_${set}.cpp.o`]: operations(set, ['all_finite', 'finish_tree', 'gated_activation', 'rms_norm', 'rope']),
  [`linear_${set}.cpp.o`]: operations(set, ['linear_int8', 'quantize_int8']),
  [`linear_int16_${set}.cpp.o`]: operations(set, ['linear_int16', 'quantize_int16']),
});
/** All that such an object may define for others. */
const entryPoints: Record<string, string[]> = {
  ...ofSet('avx2'),
  ...ofSet('avx512'),
  'linear_amx.cpp.o': operations('amx', ['linear_int8', 'quantize_int8']),
  'linear_int16_amx.cpp.o': operations('amx', ['linear_int16', 'quantize_int16']),
  'reference_fma.cpp.o': ['shardmesh::reference_f32_fma_kernel_set', 'shardmesh::reference_fma_kernel_set'],
  'sampler_loops_avx2.cpp.o': ['shardmesh::sampler_loops_avx2'],
};

describe.skipIf(process.platform !== 'linux' || process.arch !== 'x64')('files built for an instruction set', () => {
  /** External definitions of each object, as `nm` classes them: `T name`, weak ones as `W name` or `V name`. */
  const external = new Map<string, string[]>();

  beforeAll(async () => {
    const folder = dirname(await buildKernelTarget('kernel_set_archive'));
    const archive = readFileSync(join(folder, 'kernel_sets.path'), 'utf8');
    const listing = execFileSync('nm', ['--demangle', '--defined-only', '--extern-only', archive], { encoding: 'utf8' });
    for (const paragraph of listing.trim().split(/\n\n+/)) {
      const [head = '', ...symbols] = paragraph.split('\n');
      external.set(
        head.replace(/:$/, ''),
        symbols.map((line) => line.slice(17).replace(/\(.*$/, '')),
      );
    }
  }, 600_000);

  it('instruction sets - every object built for one is listed here', () => {
    expect([...external.keys()].filter((object) => /_(avx2|avx512|amx|fma)\.cpp\.o$/.test(object)).sort()).toEqual(
      Object.keys(entryPoints).sort(),
    );
  });

  it.each(Object.entries(entryPoints))(
    'instruction sets - %s defines its entry points for others and nothing else',
    (object, names) => {
      expect([...(external.get(object) ?? [])].sort()).toEqual(names.map((name) => `T ${name}`));
    },
  );
});
