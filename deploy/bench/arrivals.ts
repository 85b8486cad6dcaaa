/** When requests are sent. Closed loop: a stream sends its next request when the last is answered. Open loop: at times that do not depend on the server. */
import { readFileSync } from 'node:fs';
import { ShardmeshError } from '../../protocol/errors.ts';
import { lengthMax } from './length-distribution.ts';
import type { Random } from './random.ts';

export type Load =
  | { kind: 'closed'; streams: number }
  | { kind: 'poisson'; perSecond: number }
  /** `size` requests at once, again every `everySeconds`. */
  | { kind: 'burst'; size: number; everySeconds: number }
  | { kind: 'trace'; arrivals: readonly Arrival[] };

export interface Arrival {
  /** Seconds after the beginning. */
  at: number;
  /** null: drawn from the distributions. */
  lengths: { prompt: number; output: number } | null;
}

/** Arrivals of an open loop, in order; without end but for a trace. */
export function* arrivals(load: Exclude<Load, { kind: 'closed' }>, random: Random): Generator<Arrival, void> {
  switch (load.kind) {
    case 'poisson':
      for (let at = 0; ;) {
        at += random.exponential(1 / load.perSecond);
        yield { at, lengths: null };
      }
    case 'burst':
      for (let burst = 0; ; burst++)
        for (let one = 0; one < load.size; one++) yield { at: burst * load.everySeconds, lengths: null };
    case 'trace':
      yield* load.arrivals;
  }
}

/** The first number of `object` under one of `names`. */
function numberOf(object: Record<string, unknown>, ...names: string[]): number | null {
  for (const name of names) {
    const value = object[name];
    if (typeof value === 'number' && Number.isFinite(value) && value >= 0) return value;
  }
  return null;
}

/**
 * One JSON object a line: `{"at": seconds, "prompt": tokens, "output": tokens}`, or as published request traces have it `{"timestamp": milliseconds,
 * "input_length": tokens, "output_length": tokens}`. Lines may be in any order; the first arrival is the beginning.
 * @throws {ShardmeshError} `config_invalid`, naming the line
 */
export function parseTrace(text: string, path: string): Arrival[] {
  const list: Arrival[] = [];
  for (const [index, line] of text.split('\n').entries()) {
    if (line.trim() === '') continue;
    const where = `${path}, line ${index + 1}`;
    let value: unknown;
    try {
      value = JSON.parse(line);
    } catch (cause) {
      throw new ShardmeshError('config_invalid', `${where}: not JSON: ${(cause as Error).message}`, { cause });
    }
    const object = typeof value === 'object' && value !== null ? (value as Record<string, unknown>) : {};
    const milliseconds = numberOf(object, 'timestamp');
    const at = numberOf(object, 'at') ?? (milliseconds === null ? null : milliseconds / 1000);
    const prompt = numberOf(object, 'prompt', 'input_length');
    const output = numberOf(object, 'output', 'output_length');
    if (at === null || prompt === null || output === null)
      throw new ShardmeshError('config_invalid', `${where}: {"at": seconds, "prompt": tokens, "output": tokens} is needed`);
    if (Math.max(prompt, output) > lengthMax)
      throw new ShardmeshError('config_invalid', `${where}: at most ${lengthMax} tokens are possible`);
    list.push({ at, lengths: { prompt: Math.max(1, Math.round(prompt)), output: Math.max(1, Math.round(output)) } });
  }
  if (list.length === 0) throw new ShardmeshError('config_invalid', `${path}: the trace has no arrivals`);
  list.sort((a, b) => a.at - b.at);
  const begin = list[0]?.at ?? 0;
  return list.map(({ at, lengths }) => ({ at: at - begin, lengths }));
}

export function readTrace(path: string): Arrival[] {
  let text;
  try {
    text = readFileSync(path, 'utf8');
  } catch (cause) {
    throw new ShardmeshError('config_invalid', `--trace ${path}: ${(cause as Error).message}`, { cause });
  }
  return parseTrace(text, path);
}

export function describeLoad(load: Load): string {
  switch (load.kind) {
    case 'closed':
      return `${load.streams} stream${load.streams === 1 ? '' : 's'}`;
    case 'poisson':
      return `${load.perSecond} requests/s`;
    case 'burst':
      return `${load.size} every ${load.everySeconds} s`;
    case 'trace':
      return `trace of ${load.arrivals.length}`;
  }
}
