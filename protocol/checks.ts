/**
 * Checks of decoded values, put together like the types they guard. A check returns its value unchanged or throws a `Mismatch`; objects and arrays add
 * their part of the path on the way out, so that a right message costs no string.
 */
import { isId } from './ids.ts';

export type Check<T> = (value: unknown) => T;

/** What is wrong, and where: path parts from the inside out. */
export class Mismatch extends Error {
  readonly path: (string | number)[] = [];
}

const fail = (expected: string, value: unknown): never => {
  throw new Mismatch(`must be ${expected}, got ${describe(value)}`);
};

/** A value in an error message: short, and never more than the start of a text. */
export function describe(value: unknown): string {
  if (value === null) return 'null';
  if (value === undefined) return 'nothing';
  if (typeof value === 'string')
    return value.length > 40 ? `${JSON.stringify(value.slice(0, 40))}… (${value.length} characters)` : JSON.stringify(value);
  if (typeof value === 'number' || typeof value === 'boolean') return String(value);
  if (typeof value === 'bigint') return 'a 64-bit integer';
  if (Array.isArray(value)) return `a list of ${value.length}`;
  return typeof value === 'object' ? 'an object' : typeof value;
}

export const integer =
  (min: number, max: number): Check<number> =>
  (value) =>
    typeof value === 'number' && Number.isInteger(value) && value >= min && value <= max
      ? value
      : fail(`an integer of ${min} to ${max}`, value);

/** Finite, both ends allowed. */
export const real =
  (min: number, max: number): Check<number> =>
  (value) =>
    typeof value === 'number' && value >= min && value <= max ? value : fail(`a number of ${min} to ${max}`, value);

const unsigned64Max = 0xffff_ffff_ffff_ffffn;
export const unsigned64: Check<bigint> = (value) =>
  typeof value === 'bigint' && value >= 0n && value <= unsigned64Max ? value : fail('an unsigned 64-bit integer', value);

export const boolean: Check<boolean> = (value) => (typeof value === 'boolean' ? value : fail('true or false', value));

export const text =
  (charactersMax: number): Check<string> =>
  (value) =>
    typeof value === 'string' && value.length <= charactersMax
      ? value
      : fail(`a text of at most ${charactersMax} characters`, value);

export const pattern =
  (expression: RegExp, expected: string): Check<string> =>
  (value) =>
    typeof value === 'string' && expression.test(value) ? value : fail(expected, value);

export const id: Check<string> = (value) => (isId(value) ? value : fail('an id', value));

export const oneOf =
  <T extends string>(...names: T[]): Check<T> =>
  (value) =>
    typeof value === 'string' && (names as string[]).includes(value) ? (value as T) : fail(names.join(', '), value);

export const nullable =
  <T>(check: Check<T>): Check<T | null> =>
  (value) =>
    value === null ? null : check(value);

export const list =
  <T>(check: Check<T>, countMax: number, countMin = 0): Check<T[]> =>
  (value) => {
    if (!Array.isArray(value) || value.length > countMax || value.length < countMin)
      return fail(`a list of ${countMin} to ${countMax}`, value);
    let at = 0;
    try {
      for (; at < value.length; at++) check(value[at]);
    } catch (error) {
      throw within(error, at);
    }
    return value as T[];
  };

/** A list of integers, without a call for each: prompts are long. */
export const integers =
  (countMax: number, min: number, max: number): Check<number[]> =>
  (value) => {
    if (!Array.isArray(value) || value.length > countMax) return fail(`a list of at most ${countMax}`, value);
    for (let at = 0; at < value.length; at++) {
      const entry: unknown = value[at];
      if (typeof entry !== 'number' || !Number.isInteger(entry) || entry < min || entry > max)
        throw within(new Mismatch(`must be an integer of ${min} to ${max}, got ${describe(entry)}`), at);
    }
    return value as number[];
  };

export const pair =
  <A, B>(first: Check<A>, second: Check<B>): Check<[A, B]> =>
  (value) => {
    if (!Array.isArray(value) || value.length !== 2) return fail('a pair', value);
    first(value[0]);
    second(value[1]);
    return value as [A, B];
  };

/** An object with exactly these fields. `also` checks what the fields must be to each other. */
export function record<T extends object>(fields: { [K in keyof T]-?: Check<T[K]> }, also?: (value: T) => void): Check<T> {
  const names = Object.keys(fields);
  const checks: Check<unknown>[] = Object.values(fields);
  return (value) => {
    if (typeof value !== 'object' || value === null || Array.isArray(value)) return fail('an object', value);
    const given = value as Record<string, unknown>;
    let name: string | undefined;
    try {
      for (let i = 0; i < names.length; i++) {
        name = names[i] ?? '';
        checks[i]?.(given[name]);
      }
    } catch (error) {
      throw within(error, name ?? '');
    }
    // All names are there, so more keys than names means unknown ones.
    const keys = Object.keys(given);
    if (keys.length !== names.length) {
      const unknown = keys.find((key) => !names.includes(key));
      throw new Mismatch(`has the unknown field ${describe(unknown)}`);
    }
    also?.(value as T);
    return value as T;
  };
}

export const demand = (condition: boolean, message: string): void => {
  if (!condition) throw new Mismatch(message);
};

function within(error: unknown, part: string | number): Error {
  if (!(error instanceof Mismatch)) return error as Error;
  error.path.push(part);
  return error;
}

/** `sequences[3].newBlocks[0]` */
export function pathText(root: string, mismatch: Mismatch): string {
  let path = root;
  for (let i = mismatch.path.length - 1; i >= 0; i--) {
    const part = mismatch.path[i];
    path += typeof part === 'number' ? `[${part}]` : `.${part}`;
  }
  return path;
}
