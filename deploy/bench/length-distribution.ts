/** How many tokens a prompt or an answer has: drawn from a distribution that a command line can name. */
import { readFileSync } from 'node:fs';
import { ShardmeshError } from '../../protocol/errors.ts';
import type { Random } from './random.ts';

export type LengthDistribution =
  | { kind: 'fixed'; tokens: number }
  | { kind: 'uniform'; from: number; to: number }
  | { kind: 'normal'; mean: number; deviation: number }
  /** `exp` of a normal number: half of all lengths are below `median`; `sigma` is the deviation of their logarithm. */
  | { kind: 'lognormal'; median: number; sigma: number }
  | { kind: 'list'; tokens: number[] };

export const lengthMax = 1_048_576;

const usage = 'a length is 128, 64-256, normal:MEAN:DEVIATION, lognormal:MEDIAN:SIGMA or file:PATH (one length a line)';

const wrong = (text: string, why: string): ShardmeshError => new ShardmeshError('config_invalid', `length "${text}": ${why}`);

function tokens(text: string, whole: string): number {
  const value = Number(text);
  if (!/^\d+$/.test(text)) throw wrong(whole, usage);
  if (value < 1 || value > lengthMax) throw wrong(whole, `${value} is not from 1 to ${lengthMax}`);
  return value;
}

function spread(text: string | undefined, whole: string): number {
  const value = Number(text);
  if (text === undefined || !/^\d+(\.\d+)?$/.test(text)) throw wrong(whole, usage);
  return value;
}

/** @throws {ShardmeshError} `config_invalid`, with what is possible */
export function parseLengthDistribution(text: string): LengthDistribution {
  const [kind = '', ...rest] = text.split(':');
  if (kind === 'file') return { kind: 'list', tokens: readLengths(rest.join(':')) };
  if (kind === 'normal' && rest.length === 2)
    return { kind, mean: tokens(rest[0] ?? '', text), deviation: spread(rest[1], text) };
  if (kind === 'lognormal' && rest.length === 2)
    return { kind, median: tokens(rest[0] ?? '', text), sigma: spread(rest[1], text) };
  const range = /^(\d+)-(\d+)$/.exec(text);
  if (!range) return { kind: 'fixed', tokens: tokens(text, text) };
  const from = tokens(range[1] ?? '', text);
  const to = tokens(range[2] ?? '', text);
  if (to < from) throw wrong(text, `${to} is less than ${from}`);
  return { kind: 'uniform', from, to };
}

function readLengths(path: string): number[] {
  let content;
  try {
    content = readFileSync(path, 'utf8');
  } catch (cause) {
    throw new ShardmeshError('config_invalid', `lengths of ${path}: ${(cause as Error).message}`, { cause });
  }
  const lines = content.split('\n').map((line) => line.trim());
  const lengths = lines.filter((line) => line !== '').map((line) => tokens(line, line));
  if (lengths.length === 0) throw new ShardmeshError('config_invalid', `lengths of ${path}: the file has none`);
  return lengths;
}

/** A whole number from 1 to `lengthMax`. */
export function drawLength(distribution: LengthDistribution, random: Random): number {
  const drawn = draw(distribution, random);
  return Math.min(lengthMax, Math.max(1, Math.round(drawn)));
}

function draw(distribution: LengthDistribution, random: Random): number {
  switch (distribution.kind) {
    case 'fixed':
      return distribution.tokens;
    case 'uniform':
      return random.integer(distribution.from, distribution.to);
    case 'normal':
      return distribution.mean + distribution.deviation * random.normal();
    case 'lognormal':
      return distribution.median * Math.exp(distribution.sigma * random.normal());
    case 'list':
      return distribution.tokens[random.integer(0, distribution.tokens.length - 1)] ?? 1;
  }
}
