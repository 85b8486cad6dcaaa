import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { arrivals, parseTrace, type Arrival, type Load } from '../../../../deploy/bench/arrivals.ts';
import { drawLength, parseLengthDistribution } from '../../../../deploy/bench/length-distribution.ts';
import { Random } from '../../../../deploy/bench/random.ts';

const folder = mkdtempSync(join(tmpdir(), 'shardmesh-lengths-'));
afterAll(() => rmSync(folder, { recursive: true }));

function draws(text: string, count: number, seed = 1): number[] {
  const random = new Random(seed);
  const distribution = parseLengthDistribution(text);
  return Array.from({ length: count }, () => drawLength(distribution, random));
}

const mean = (values: number[]): number => values.reduce((sum, value) => sum + value, 0) / values.length;
const median = (values: number[]): number => [...values].sort((a, b) => a - b)[values.length >> 1] ?? 0;

describe('random', () => {
  it('gives these numbers for seed 1, so that loads are the same on every machine', () => {
    const random = new Random(1);
    expect([random.uniform(), random.uniform(), random.integer(0, 9)].map((value) => Number(value.toFixed(6)))).toEqual([
      0.627074, 0.002736, 5,
    ]);
  });
});

describe('length distribution', () => {
  it('fixed gives always the same', () => expect(draws('128', 3)).toEqual([128, 128, 128]));

  it('uniform reaches both ends and nothing beyond', () => expect(new Set(draws('3-5', 200))).toEqual(new Set([3, 4, 5])));

  it('normal has its mean and deviation', () => {
    const values = draws('normal:1000:100', 4000);
    expect(mean(values)).toBeGreaterThan(990);
    expect(mean(values)).toBeLessThan(1010);
    const centre = mean(values);
    const deviation = Math.sqrt(mean(values.map((value) => (value - centre) ** 2)));
    expect(deviation).toBeGreaterThan(95);
    expect(deviation).toBeLessThan(105);
  });

  it('normal is never below one token', () => expect(Math.min(...draws('normal:2:50', 500))).toBe(1));

  it('lognormal has its median, and a mean above it', () => {
    const values = draws('lognormal:200:0.8', 4000);
    expect(median(values)).toBeGreaterThan(190);
    expect(median(values)).toBeLessThan(210);
    // exp(0.8² / 2) = 1.377
    expect(mean(values) / 200).toBeGreaterThan(1.3);
    expect(mean(values) / 200).toBeLessThan(1.45);
  });

  it('file draws its lines', () => {
    writeFileSync(join(folder, 'lengths.txt'), '10\n20\n\n700\n');
    expect(new Set(draws(`file:${join(folder, 'lengths.txt')}`, 100))).toEqual(new Set([10, 20, 700]));
  });

  it.each(['', 'x', '0', '5-3', '1048577', 'normal:10', 'normal:10:x', 'lognormal::1', 'file:/nowhere/lengths.txt', '-4', '1.5'])(
    'refuses "%s"',
    (text) => expect(() => parseLengthDistribution(text)).toThrow(/length/),
  );
});

function take(load: Exclude<Load, { kind: 'closed' }>, count: number): Arrival[] {
  const list: Arrival[] = [];
  for (const arrival of arrivals(load, new Random(7))) if (list.push(arrival) >= count) break;
  return list;
}

describe('arrivals', () => {
  it('burst - so many at once, again after its time', () => {
    const times = take({ kind: 'burst', size: 3, everySeconds: 2 }, 7).map(({ at }) => at);
    expect(times).toEqual([0, 0, 0, 2, 2, 2, 4]);
  });

  it('poisson - gaps have the mean and the spread of an exponential', () => {
    const times = take({ kind: 'poisson', perSecond: 4 }, 4000).map(({ at }) => at);
    const gaps = times.map((at, index) => at - (times[index - 1] ?? 0));
    expect(Math.min(...gaps)).toBeGreaterThanOrEqual(0);
    expect(mean(gaps)).toBeGreaterThan(0.24);
    expect(mean(gaps)).toBeLessThan(0.26);
    // e^-1 of all gaps are longer than the mean.
    const longer = gaps.filter((gap) => gap > 0.25).length / gaps.length;
    expect(longer).toBeGreaterThan(0.34);
    expect(longer).toBeLessThan(0.395);
  });

  it('trace - begins with its first arrival, in order, with its own lengths', () => {
    const trace = parseTrace(
      '{"at": 12.5, "prompt": 7, "output": 3}\n\n{"timestamp": 10000, "input_length": 90, "output_length": 4, "hash_ids": [1]}\n',
      'x.jsonl',
    );
    expect(take({ kind: 'trace', arrivals: trace }, 9)).toEqual([
      { at: 0, lengths: { prompt: 90, output: 4 } },
      { at: 2.5, lengths: { prompt: 7, output: 3 } },
    ]);
  });

  it.each([
    ['{"at": 1, "prompt": 2, "output": 3}\nnot json', 'x.jsonl, line 2: not JSON'],
    ['{"at": 1, "prompt": 2}', 'x.jsonl, line 1: {"at"'],
    ['{"at": 1, "prompt": 2000000, "output": 1}', 'x.jsonl, line 1: at most 1048576'],
    ['null', 'x.jsonl, line 1'],
    ['\n', 'the trace has no arrivals'],
  ])('trace - %s is refused by line', (text, message) => expect(() => parseTrace(text, 'x.jsonl')).toThrow(message));
});
