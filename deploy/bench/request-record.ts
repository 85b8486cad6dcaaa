/** One request as the client saw it, and what can be said of it alone. */
import type { Answer } from './completion-client.ts';

export interface RequestRecord extends Answer {
  /** When it should have been sent: an open loop's clock does not wait for a client that is late. */
  dueAt: number;
  outputTokensAsked: number;
}

export const outputTokens = ({ usage, chunkAt }: RequestRecord): number => usage?.outputTokens ?? chunkAt.length;

/** Tokens of a record that had come by `time`: its tokens, spread evenly over its chunks. */
export function tokensUntil(record: RequestRecord, time: number): number {
  const { chunkAt } = record;
  const arrived = (chunkAt.at(-1) ?? Infinity) <= time ? chunkAt.length : chunkAt.filter((at) => at <= time).length;
  return chunkAt.length === 0 ? 0 : (outputTokens(record) * arrived) / chunkAt.length;
}

/** Mean time per token after the first; null for answers of one token. */
export function tpotMs(record: RequestRecord): number | null {
  const first = record.chunkAt[0];
  const last = record.chunkAt.at(-1);
  const tokens = outputTokens(record);
  if (first === undefined || last === undefined || tokens < 2) return null;
  return (last - first) / (tokens - 1);
}

export function gapsMs({ chunkAt }: Pick<RequestRecord, 'chunkAt'>): number[] {
  return chunkAt.slice(1).map((at, index) => at - (chunkAt[index] ?? at));
}
