/** The benchmark of a card (test/gpu/gpu_bench.cpp) on the emulated machine: that it runs, what it writes, and that MEASURED.md says what was measured and nothing else. */
import { execFile } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { tune } from '../../deploy/cli/tune.ts';
import { readTuning, tunedAt, tuningPath } from '../../kernels/cuda/tuning.ts';
import { measuredPage, readMeasurements, renderPage, type BenchReport } from '../bench/gpu-measured.ts';
import { exportModel, testModels } from '../gpu/exported-models.ts';
import { cudaReadme, memoryTable } from '../gpu/memory-table.ts';
import { buildKernelTarget } from './build-target.ts';

const run = promisify(execFile);

describe.skipIf(process.platform !== 'linux' || process.arch !== 'x64')('benchmark of a card, on the emulated machine', () => {
  const folder = mkdtempSync(join(tmpdir(), 'shardmesh-bench-'));
  let binary: string;
  beforeAll(async () => {
    binary = await buildKernelTarget('gpu_bench');
  }, 600_000);
  afterAll(() => rmSync(folder, { recursive: true }));

  const bench = async (...args: string[]): Promise<BenchReport> => {
    const file = join(folder, 'bench.json');
    await run(binary, ['--json', file, ...args], { timeout: 100_000 });
    return JSON.parse(readFileSync(file, 'utf8')) as BenchReport;
  };

  it('gpu bench - measures each part, and says of nothing that a floor was met', async () => {
    const model = join(folder, 'model.jsonl');
    writeFileSync(model, exportModel({ ...testModels[1]!, cuts: testModels[1]!.cuts.slice(0, 1) }));
    const { card, ceilings, rows, floors } = await bench('--tries', '1', '--tiny', model);
    expect(card.emulated).toBe(true);
    expect(Object.values(ceilings).every((value) => value > 0)).toBe(true);
    expect(rows.filter((row) => row.skipped !== undefined)).toEqual([]);
    expect(new Set(rows.map((row) => row.part))).toEqual(
      new Set([
        'decode product',
        'prefill product',
        'paged decode',
        'prefill attention',
        'other',
        'decode step',
        'between steps',
      ]),
    );
    expect(floors.map((floor) => floor.met)).toEqual(floors.map(() => null));
  });

  it("shardmesh tune - keeps what it measured, and programs run with it have the reference's bits", async () => {
    const before = process.env['SHARDMESH_CACHE'];
    process.env['SHARDMESH_CACHE'] = folder;
    try {
      expect(readTuning(folder)).toBeNull();
      const other = {
        version: 1,
        cards: [{ sm: 90, card: 'another card', measured: '2030-01-01', products: [], attention: [] }],
      };
      writeFileSync(tuningPath(folder), JSON.stringify(other));
      tune(binary);
      tune(binary); // in place of what the first run left
    } finally {
      if (before === undefined) delete process.env['SHARDMESH_CACHE'];
      else process.env['SHARDMESH_CACHE'] = before;
    }
    const text = readTuning(folder)!;
    expect((JSON.parse(text) as { cards: { card: string }[] }).cards.map(({ card }) => card)).toEqual([
      'emulated CUDA machine',
      'another card',
    ]);
    expect(tunedAt(text, 'another card')).toBe('2030-01-01');
    expect(tunedAt(text, 'emulated CUDA machine')).toMatch(/^20\d\d-\d\d-\d\d$/);
    expect(tunedAt(text, 'a card that is not here')).toBeNull();
    expect(text).toMatch(/"graphEdges": "(plain|programmatic)"/);
    expect(text).toMatch(/"fusion": "(whole|products)"/);

    const model = join(folder, 'tuned.jsonl');
    const shape = testModels[1]!;
    writeFileSync(model, exportModel({ ...shape, promptTokens: 60 }));
    const { stdout } = await run(await buildKernelTarget('gpu_program_test'), ['--small', '--tuning', model, tuningPath(folder)]);
    expect(stdout).toContain(`ok ${shape.name} - the file's own choices: the reference's bits`);
    expect(stdout).not.toContain('FAIL');
    const broken = join(folder, 'broken.json');
    writeFileSync(broken, text.replace(/"decodeTiles": \d/, '"decodeTiles": 3'));
    const failed = await run(binary.replace(/gpu_bench$/, 'gpu_program_test'), ['--small', '--tuning', model, broken]).catch(
      (error: unknown) => error as { stdout: string },
    );
    expect(failed.stdout).toContain('tuning.cards[0].products[0].decodeTiles');
    writeFileSync(broken, text.replace(/"graphEdges": "\w+"/, '"graphEdges": "early"'));
    const unknown = await run(binary.replace(/gpu_bench$/, 'gpu_program_test'), ['--small', '--tuning', model, broken]).catch(
      (error: unknown) => error as { stdout: string },
    );
    expect(unknown.stdout).toContain("tuning.cards[0].graphEdges: 'early' is neither plain nor programmatic");
  });

  it('shardmesh tune - says what is missing, and changes nothing without a card', async () => {
    expect(() => tune(join(folder, 'nothing'))).toThrow('run npm run build:cuda first');
    process.env['SHARDMESH_EMULATED_CARD_ABSENT'] = 'no NVIDIA driver here';
    try {
      expect(() => tune(binary)).toThrow('no card here to tune for; nothing was changed');
    } finally {
      delete process.env['SHARDMESH_EMULATED_CARD_ABSENT'];
    }
  });

  it('gpu bench - MEASURED.md is what the files of measured cards say, row for row', async () => {
    const { floors } = await bench('--floors');
    expect(readFileSync(measuredPage, 'utf8')).toBe(renderPage(readMeasurements(), floors));
    expect(readMeasurements().some((report) => report.card.emulated)).toBe(false);
  });

  it('gpu bench - the memory table of kernels/cuda/README.md is what the programs say', async () => {
    const table = await memoryTable(binary);
    expect(table.split('\n')[2]).toMatch(/^\| SmolLM2 135M( \| 0\.\d+){2} \| - \| - \| 0\.\d+ \| \d/);
    expect(readFileSync(cudaReadme, 'utf8')).toContain(`<!-- memory -->\n${table}<!-- /memory -->`);
  });

  it('gpu bench - a page says which floors a card missed, and what was not measured', async () => {
    const { floors } = await bench('--floors');
    const [first, second] = floors;
    const report: BenchReport = {
      card: {
        name: 'a card',
        sm: 90,
        multiprocessors: 3,
        driver: 'CUDA 13.0',
        memoryBytes: 2 ** 30,
        l2Bytes: 2 ** 20,
        bandwidthBytes: 3e12,
        powerWatts: 700,
        emulated: false,
      },
      date: '2030-01-02',
      ceilings: { copyBytes: 1e12, readBytes: 1e12, int8Operations: 1e15, bf16Operations: 1e15 },
      rows: [
        { part: 'decode product', what: 'of a test', us: 2, bytes: 1e6, operations: 0, limit: 'copy bandwidth', share: 0.5 },
        { part: 'decode step', what: 'of another', skipped: 'no room' },
      ],
      floors: [
        { ...first!, value: 41.5, met: false },
        { ...second!, value: 99, met: true },
      ],
    };
    const page = renderPage([report], floors);
    expect(page).toContain(`| ${first!.name} | ≥ 75 % of copy bandwidth |  | 41.5 (misses the floor) |`);
    expect(page).toContain(`| ${second!.name} | ≥ 55 % of copy bandwidth |  | 99.0 |`);
    expect(page.match(/\| not measured \|/g)).toHaveLength(floors.length - 2);
    expect(page).toContain('| decode product | of a test | 2.00 | 500 GB/s | 50.0 % of copy bandwidth |');
    expect(page).toContain(
      '## a card (sm_90), 2030-01-02\n3 multiprocessors, 1 GiB, L2 1 MiB, 3000 GB/s by its own facts, 700 W, driver CUDA 13.0.',
    );
    expect(page).toContain('| decode step | of another | not measured: no room |  |  |');
  });
});
