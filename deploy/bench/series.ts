/** What a plot needs of a run: figures over time, and percentile curves. Small enough to be kept in a file, however long the run was. */
import { ascending, quantile } from './quantiles.ts';
import { gapsMs, tokensUntil, tpotMs } from './request-record.ts';
import type { LoadRun } from './run-load.ts';

export interface Series {
  /** Middle of each bucket, seconds after the beginning. */
  seconds: number[];
  outputTokensPerSecond: number[];
  /** Requests that were out, at the middle of the bucket. */
  running: number[];
  /** Gaps that ended in the bucket; null: none did. */
  itlMsP50: (number | null)[];
  itlMsP99: (number | null)[];
  /** Requests by the time of their first text; at most `pointsMax`, evenly chosen. */
  firstTokens: { seconds: number[]; ttftMs: number[] };
  curves: Record<'ttftMs' | 'itlMs' | 'tpotMs' | 'e2eMs', number[]>;
}

export const bucketsMax = 120;
export const pointsMax = 2_000;
/** Percentiles of the curves: 0, 1, ... 99, then finer. */
export const curvePercentiles = [...Array.from({ length: 100 }, (_, percent) => percent), 99.5, 99.9, 100];

const curve = (values: readonly number[]): number[] => {
  const sorted = ascending(values);
  return sorted.length === 0 ? [] : curvePercentiles.map((percent) => quantile(sorted, percent / 100));
};

export function series({ records, startedAt, endedAt }: LoadRun): Series {
  const seconds = (endedAt - startedAt) / 1000;
  const width = Math.max(0.25, seconds / bucketsMax);
  const count = Math.max(1, Math.ceil(seconds / width));
  const good = records.filter(({ error }) => error === null);
  const bucketOf = (at: number): number => Math.floor((at - startedAt) / 1000 / width);

  const tokens = Array.from({ length: count }, () => 0);
  const gaps = Array.from({ length: count }, (): number[] => []);
  const running = Array.from({ length: count }, () => 0);
  for (const record of records) {
    const { chunkAt } = record;
    const each = chunkAt.length === 0 ? 0 : tokensUntil(record, Infinity) / chunkAt.length;
    for (const [index, at] of chunkAt.entries()) {
      const bucket = bucketOf(at);
      if (bucket >= count) continue;
      tokens[bucket] = (tokens[bucket] ?? 0) + each;
      if (index > 0) gaps[bucket]?.push(at - (chunkAt[index - 1] ?? at));
    }
    for (let bucket = Math.max(0, bucketOf(record.sentAt)); bucket < count; bucket++) {
      const middle = startedAt + (bucket + 0.5) * width * 1000;
      if (middle >= record.endedAt) break;
      if (middle >= record.sentAt) running[bucket] = (running[bucket] ?? 0) + 1;
    }
  }
  const first = good
    .flatMap(({ chunkAt, dueAt }) => (chunkAt[0] === undefined ? [] : [{ at: chunkAt[0], ttftMs: chunkAt[0] - dueAt }]))
    .sort((a, b) => a.at - b.at);
  const every = Math.max(1, Math.ceil(first.length / pointsMax));
  const points = first.filter((_, index) => index % every === 0);
  const atShare = (values: readonly number[], share: number): number | null =>
    values.length === 0 ? null : quantile(ascending(values), share);
  return {
    seconds: Array.from({ length: count }, (_, bucket) => (bucket + 0.5) * width),
    // The last bucket may be short.
    outputTokensPerSecond: tokens.map((sum, bucket) => sum / Math.min(width, seconds - bucket * width)),
    running,
    itlMsP50: gaps.map((values) => atShare(values, 0.5)),
    itlMsP99: gaps.map((values) => atShare(values, 0.99)),
    firstTokens: { seconds: points.map(({ at }) => (at - startedAt) / 1000), ttftMs: points.map(({ ttftMs }) => ttftMs) },
    curves: {
      ttftMs: curve(first.map(({ ttftMs }) => ttftMs)),
      itlMs: curve(good.flatMap(gapsMs)),
      tpotMs: curve(good.flatMap((record) => tpotMs(record) ?? [])),
      e2eMs: curve(good.map((record) => record.endedAt - record.dueAt)),
    },
  };
}
