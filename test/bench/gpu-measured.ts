/** kernels/cuda/MEASURED.md, written from what gpu_bench (and rivals.py) left behind on cards: one JSON file a card in kernels/cuda/measured. */
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const cudaFolder = fileURLToPath(new URL('../../kernels/cuda', import.meta.url));
export const measuredFolder = join(cudaFolder, 'measured');
export const measuredPage = join(cudaFolder, 'MEASURED.md');

/** As test/gpu/bench_report.cpp writes them. */
export interface BenchRow {
  part: string;
  what: string;
  us?: number;
  bytes?: number;
  operations?: number;
  limit?: string;
  share?: number;
  skipped?: string;
}

export interface BenchFloor {
  name: string;
  unit: string;
  atLeast: boolean;
  floor: number;
  aim: number | null;
  value: number | null;
  met: boolean | null;
}

export interface BenchReport {
  card: {
    name: string;
    sm: number;
    multiprocessors: number;
    driver: string;
    memoryBytes: number;
    l2Bytes: number;
    /** As the card says; 0: unknown. */
    bandwidthBytes: number;
    powerWatts: number;
    emulated: boolean;
  };
  date: string;
  ceilings: { copyBytes: number; readBytes: number; int8Operations: number; bf16Operations: number };
  rows: BenchRow[];
  floors: BenchFloor[];
  rivals?: { torch: string; cuda: string; rows: BenchRow[] };
}

/** Oldest first. */
export function readMeasurements(): BenchReport[] {
  if (!existsSync(measuredFolder)) return [];
  const files = readdirSync(measuredFolder).filter((name) => name.endsWith('.json'));
  const all = files.map((name) => JSON.parse(readFileSync(join(measuredFolder, name), 'utf8')) as BenchReport);
  return all.sort((a, b) => a.date.localeCompare(b.date));
}

const digits = (value: number): string => (Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3));
const table = (head: string[], rows: string[][]): string =>
  [head, head.map(() => '---'), ...rows].map((cells) => `| ${cells.join(' | ')} |\n`).join('');

function rowCells({ part, what, us, bytes, operations, limit, share, skipped }: BenchRow): string[] {
  if (us === undefined) return [part, what, `not measured: ${skipped ?? 'no reason given'}`, '', ''];
  const rates = [bytes ? `${digits(bytes / us / 1e3)} GB/s` : '', operations ? `${digits(operations / us / 1e6)} T/s` : ''];
  return [part, what, digits(us), rates.filter(Boolean).join(', '), limit ? `${digits(share! * 100)} % of ${limit}` : ''];
}

function cardSection({ card, date, ceilings: c, rows, rivals }: BenchReport): string {
  const head = ['part', 'what', 'µs', 'rate', 'share'];
  const facts = `${card.multiprocessors} multiprocessors, ${(card.memoryBytes / 2 ** 30).toFixed(0)} GiB, L2 ${(card.l2Bytes / 2 ** 20).toFixed(0)} MiB, ${(card.bandwidthBytes / 1e9).toFixed(0)} GB/s by its own facts, ${card.powerWatts.toFixed(0)} W, driver ${card.driver}`;
  const most = `copy ${digits(c.copyBytes / 1e9)} GB/s, read ${digits(c.readBytes / 1e9)} GB/s, int8 ${digits(c.int8Operations / 1e12)} TOPS, bf16 ${digits(c.bf16Operations / 1e12)} TFLOP/s (mma.sync)`;
  const beside = rivals
    ? `\nBeside it PyTorch ${rivals.torch} (CUDA ${rivals.cuda}):\n\n${table(head, rivals.rows.map(rowCells))}`
    : '';
  return `\n## ${card.name} (sm_${card.sm}), ${date}\n${facts}. Ceilings of the same run: ${most}.\n\n${table(head, rows.map(rowCells))}${beside}`;
}

/**
 * The whole page.
 * @param floors  the floors by name and limit, from any run
 */
export function renderPage(measurements: readonly BenchReport[], floors: readonly BenchFloor[]): string {
  const cards = measurements.map(({ card, date }) => `${card.name}, ${date}`);
  const cell = (report: BenchReport, name: string): string => {
    const found = report.floors.find((floor) => floor.name === name);
    if (!found || found.value === null) return 'not measured';
    return `${digits(found.value)}${found.met ? '' : ' (misses the floor)'}`;
  };
  const none = cards.length === 0;
  const lines = floors.map(({ name, unit, atLeast, floor, aim }) => [
    name,
    `${atLeast ? '≥' : '≤'} ${floor} ${unit}`,
    aim === null ? '' : String(aim),
    ...(none ? ['not measured'] : measurements.map((report) => cell(report, name))),
  ]);
  return `# What the CUDA kernels were measured to do

Written by \`npm run bench:gpu\` from the files in \`measured/\`; nothing here is written by hand. ${none ? '**No card has run these kernels yet: every row says so, and no figure is claimed anywhere.**' : `Cards: ${cards.join('; ')}.`}

On a machine with a card: \`npm run bench:gpu\` (nvcc 12.8 or later). On one without Node: carry \`build/cuda/card\` there, \`sh card/run.sh\`, and bring its results back:
\`npm run bench:gpu -- --from results/bench.json --rivals results/rivals.json\`. On no card at all: \`npm run bench:gpu -- --emulated\` shows that the benchmark runs, and measures nothing.

Weights and caches are taken in turns so that each repetition finds the L2 cache cold (\`other\` rows find there what the kernel before them left, as in a step), values are random, a row is the middle one of nine runs of a graph of repetitions (of five, for the H200), and shares are of what two kernels
of the same run reach: copying memory, and int8 products from registers (\`test/gpu/ceilings.cu\`). Floors are aims for an H100.

## Floors
${table(['what', 'floor', 'aim', ...(none ? ['measured'] : cards)], lines)}${measurements.map(cardSection).join('')}`;
}
