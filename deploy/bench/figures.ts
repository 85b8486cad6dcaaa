/** From the records of a run to its figures. */
import { quantiles, type Quantiles } from './quantiles.ts';
import { meetsObjectives, type Objectives } from './objectives.ts';
import { gapsMs, outputTokens, tokensUntil, tpotMs } from './request-record.ts';
import type { LoadRun } from './run-load.ts';

export interface Figures {
  seconds: number;
  requests: number;
  failed: number;
  /** How many failed, by kind. */
  errors: Record<string, number>;
  requestsPerSecond: number;
  outputTokensPerSecond: number;
  /** Of prompts whose first token came within the run. */
  promptTokensPerSecond: number;
  promptTokens: Quantiles | null;
  outputTokens: Quantiles | null;
  cachedTokens: number;
  /** Due to first text. */
  ttftMs: Quantiles | null;
  /** Gaps between chunks of text, of all requests together: the pauses a reader sees. */
  itlMs: Quantiles | null;
  /** A request's mean time per output token after the first, by the server's own count of tokens. */
  tpotMs: Quantiles | null;
  /** Due to the end of the answer. */
  e2eMs: Quantiles | null;
  /** Output tokens by `usage` for each chunk with text. Far from 1, a gap between chunks is not a gap between tokens. */
  tokensPerChunk: number | null;
  /** Answers without `usage`: their chunks were counted as tokens. */
  withoutUsage: number;
  /** Answers that ended before the tokens asked for. */
  short: number;
  goodput: { share: number; requestsPerSecond: number } | null;
  /** How late requests were sent (open loop). */
  sendLagMs: Quantiles | null;
  clientCpuShare: number;
}

const present = <T>(values: readonly (T | null)[]): T[] => values.filter((value): value is T => value !== null);
const sum = (values: readonly number[]): number => values.reduce((total, value) => total + value, 0);

export function figures(run: LoadRun, objectives: Objectives | null): Figures {
  const { records, startedAt, endedAt, load } = run;
  const seconds = (endedAt - startedAt) / 1000;
  const good = records.filter(({ error }) => error === null);
  const errors: Record<string, number> = {};
  for (const { error } of records) if (error !== null) errors[error] = (errors[error] ?? 0) + 1;
  const prompts = records.filter(({ chunkAt }) => (chunkAt[0] ?? Infinity) <= endedAt);
  const met = objectives ? good.filter((record) => meetsObjectives(record, objectives) && record.endedAt <= endedAt).length : 0;
  const withUsage = good.filter(({ usage }) => usage !== null);
  const chunks = sum(withUsage.map(({ chunkAt }) => chunkAt.length));
  return {
    seconds,
    requests: records.length,
    failed: records.length - good.length,
    errors,
    requestsPerSecond: good.filter((record) => record.endedAt <= endedAt).length / seconds,
    outputTokensPerSecond: sum(records.map((record) => tokensUntil(record, endedAt))) / seconds,
    promptTokensPerSecond: sum(prompts.map(({ usage }) => usage?.promptTokens ?? 0)) / seconds,
    promptTokens: quantiles(withUsage.map(({ usage }) => usage?.promptTokens ?? 0)),
    outputTokens: quantiles(good.map(outputTokens)),
    cachedTokens: sum(withUsage.map(({ usage }) => usage?.cachedTokens ?? 0)),
    ttftMs: quantiles(good.flatMap(({ chunkAt, dueAt }) => (chunkAt[0] === undefined ? [] : [chunkAt[0] - dueAt]))),
    itlMs: quantiles(good.flatMap(gapsMs)),
    tpotMs: quantiles(present(good.map(tpotMs))),
    e2eMs: quantiles(good.map((record) => record.endedAt - record.dueAt)),
    tokensPerChunk: chunks === 0 ? null : sum(withUsage.map(outputTokens)) / chunks,
    withoutUsage: good.length - withUsage.length,
    short: good.filter((record) => outputTokens(record) < record.outputTokensAsked).length,
    goodput: objectives ? { share: records.length ? met / records.length : 0, requestsPerSecond: met / seconds } : null,
    sendLagMs: load.kind === 'closed' ? null : quantiles(records.map(({ sentAt, dueAt }) => sentAt - dueAt)),
    clientCpuShare: run.clientCpuShare,
  };
}
