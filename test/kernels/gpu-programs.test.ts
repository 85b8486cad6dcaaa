/**
 * Exported programs (test/gpu) on the emulated machine: what a machine with a card and without Node runs, short. Two formats and sizes of head on one and two ranks, and a
 * rank in a process of its own that is killed in a step.
 */
import { execFile } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { exportModel, testModels } from '../gpu/exported-models.ts';
import { buildKernelTarget } from './build-target.ts';
import { linesOf } from './test-program.ts';

const run = promisify(execFile);

describe.skipIf(process.platform !== 'linux' || process.arch !== 'x64')('exported programs on the emulated machine', () => {
  const folder = mkdtempSync(join(tmpdir(), 'shardmesh-programs-'));
  let binary: string;
  beforeAll(async () => {
    binary = await buildKernelTarget('gpu_program_test');
  }, 600_000);
  afterAll(() => rmSync(folder, { recursive: true }));

  const exported = (name: string): string => {
    const file = join(folder, `${name}.jsonl`);
    writeFileSync(file, exportModel(testModels.find((model) => model.name === name)!));
    return file;
  };
  const lines = async (...args: string[]): Promise<string[]> => {
    return (await linesOf(binary, args, 100_000)).slice(1, -1);
  };

  it("exported program - has the reference's bits on one rank and two, and after a rank was killed", async () => {
    const name = 'llama-k-quants-d64';
    expect(await lines('--small', exported(name))).toEqual([
      `ok ${name} - the reference gives many different results`,
      `ok ${name} - 1 rank, CUDA, chunks of 40: the reference's bits`,
      `ok ${name} - 2 ranks, CUDA, chunks of 70: the reference's bits`,
      `ok ${name} - 2 ranks, CUDA in one graph, chunks of 70: the reference's bits`,
      `ok ${name} - 2 ranks in 2 processes: one is killed in a step, the other names it, and the next epoch has the reference's bits`,
    ]);
  });

  it("exported program - heads of 256 on three uneven ranks have the reference's bits", async () => {
    const name = 'llama-q8_0-d256';
    expect(await lines('--small', '--no-kill', exported(name))).toEqual([
      `ok ${name} - the reference gives many different results`,
      `ok ${name} - 1 rank, CUDA, chunks of 40: the reference's bits`,
      `ok ${name} - 3 uneven ranks, CUDA, chunks of 70: the reference's bits`,
      `ok ${name} - 3 uneven ranks, CUDA in one graph, chunks of 70: the reference's bits`,
    ]);
  });

  it('exported program - ranks that compute something else are found', async () => {
    const name = 'llama-k-quants-d64';
    const [header, one, ...others] = exportModel(testModels.find((model) => model.name === name)!).split('\n');
    const changed = others.map((program) => program.replace('"epsilon":0.00001', '"epsilon":0.000011'));
    const file = join(folder, 'changed.jsonl');
    writeFileSync(file, [header, one, ...changed].join('\n'));
    const [, first, second] = await lines('--small', '--no-kill', file);
    expect(first).toMatch(/^ok/);
    expect(second).toMatch(/^FAIL llama-k-quants-d64 - 2 ranks, CUDA, chunks of 70: .* is not the reference's$/);
  });

  it("exported program - every value that tuning chooses from, and every row of the built-in table, has the reference's bits", async () => {
    for (const name of ['qwen2-blocks-of-32-d32-window', 'llama-floats-d32']) {
      const found = await lines('--small', '--tuning', exported(name));
      expect(found.length).toBeGreaterThanOrEqual(6);
      for (const line of found)
        expect(line).toMatch(/^ok .* - decode products up to .* (plain|programmatic) edges: the reference's bits$/);
      expect(found[0]).toContain(name);
      const fused = found.map((line) => / fused for (\d) rows/.exec(line)?.[1]);
      expect(fused).toEqual(expect.arrayContaining(['0', '1', '2', '4', '8']));
      expect(found.filter((line) => line.includes('programmatic edges'))).not.toHaveLength(0);
    }
  });

  it('exported program - a file that is cut short, or names a tensor it does not have, is refused by name', async () => {
    const text = exportModel(testModels[0]!);
    const broken = async (name: string, content: string) => {
      const file = join(folder, name);
      writeFileSync(file, content);
      return (await lines('--small', file))[0];
    };
    const short = text.slice(0, text.trimEnd().lastIndexOf('\n') + 1);
    expect(await broken('short.jsonl', short)).toMatch(/^FAIL .*short\.jsonl: .*short\.jsonl: ends before its programs do$/);
    const renamed = text.replace('"name":"blk.1.ffn_up.weight"', '"name":"blk.9.ffn_up.weight"');
    expect(await broken('renamed.jsonl', renamed)).toMatch(/'blk\.1\.ffn_up\.weight' is not a tensor of this model/);
  });

  it('exported program - says in one line that there is no card', async () => {
    const { stdout } = await run(binary, ['any'], { env: { SHARDMESH_EMULATED_CARD_ABSENT: 'no NVIDIA driver here' } });
    expect(stdout).toBe('skip no NVIDIA driver here\n');
  });
});
