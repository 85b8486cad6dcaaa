/** `--slo ttft=500ms,itl=50ms`: what an answer must keep to count for goodput. */
import { ShardmeshError } from '../../protocol/errors.ts';
import { ascending, quantile } from './quantiles.ts';
import { gapsMs, tpotMs, type RequestRecord } from './request-record.ts';

const names = ['ttft', 'itl', 'tpot', 'e2e'] as const;
type ObjectiveName = (typeof names)[number];

/** Milliseconds; of `itl` the 99th percentile of a request's gaps is meant, of `tpot` their mean by tokens. */
export type Objectives = Partial<Record<ObjectiveName, number>>;

/** @throws {ShardmeshError} `config_invalid`, naming the part */
export function parseObjectives(text: string): Objectives {
  const objectives: Objectives = {};
  for (const part of text.split(',')) {
    const match = /^(\w+)=(\d+(?:\.\d+)?)(ms|s)$/.exec(part.trim());
    const name = names.find((one) => one === match?.[1]);
    if (!match || !name)
      throw new ShardmeshError(
        'config_invalid',
        `--slo "${part}": ${names.join(', ')} with a time is needed, e.g. ttft=500ms,itl=50ms`,
      );
    objectives[name] = Number(match[2]) * (match[3] === 's' ? 1000 : 1);
  }
  return objectives;
}

export function meetsObjectives(record: RequestRecord, { ttft, itl, tpot, e2e }: Objectives): boolean {
  const first = record.chunkAt[0];
  if (first === undefined) return false;
  if (ttft !== undefined && first - record.dueAt > ttft) return false;
  if (e2e !== undefined && record.endedAt - record.dueAt > e2e) return false;
  if (tpot !== undefined && (tpotMs(record) ?? 0) > tpot) return false;
  const gaps = itl === undefined ? [] : ascending(gapsMs(record));
  return itl === undefined || gaps.length === 0 || quantile(gaps, 0.99) <= itl;
}
