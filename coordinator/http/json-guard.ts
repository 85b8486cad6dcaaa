/**
 * Checks a request body before `JSON.parse` sees it. `JSON.parse` takes nesting a million deep, keeps the last of two equal keys and rounds whole numbers
 * beyond 2^53; a body that relies on any of these is refused here, in one linear pass without recursion.
 */
import { httpLimits } from '../../protocol/limits.ts';
import { ShardmeshError } from '../../protocol/errors.ts';

const decoder = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });
const forbiddenKeys = new Set(['__proto__', 'constructor', 'prototype']);

function invalid(message: string): ShardmeshError {
  return new ShardmeshError('invalid_json', message);
}

/** @throws {ShardmeshError} `invalid_json` */
export function parseJsonBody(body: Uint8Array): unknown {
  let text: string;
  try {
    text = decoder.decode(body);
  } catch (cause) {
    throw new ShardmeshError('invalid_json', 'The request body is not valid UTF-8.', { cause });
  }
  if (text.trim() === '') throw invalid('The request body is empty. A JSON object is needed.');
  scan(text);
  try {
    return JSON.parse(text) as unknown;
  } catch (cause) {
    throw new ShardmeshError('invalid_json', 'The request body is not valid JSON.', { cause });
  }
}

/** One frame of the scan: an object with the keys seen so far, or an array. */
interface Open {
  keys: Set<string> | null;
  expectsKey: boolean;
}

const numberPattern = /-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/y;

function scan(text: string): void {
  const open: Open[] = [];
  let at = 0;
  while (at < text.length) {
    const character = text.charCodeAt(at);
    const top = open.at(-1);
    if (character === 0x22) {
      const end = stringEnd(text, at);
      if (top?.keys && top.expectsKey) {
        checkKey(top.keys, text.slice(at, end));
        top.expectsKey = false;
      }
      at = end;
      continue;
    }
    if (character === 0x7b || character === 0x5b) {
      if (open.length >= httpLimits.jsonDepthMax)
        throw invalid(`The request body is nested deeper than ${httpLimits.jsonDepthMax} levels.`);
      open.push({ keys: character === 0x7b ? new Set() : null, expectsKey: character === 0x7b });
    } else if (character === 0x7d || character === 0x5d) {
      open.pop();
    } else if (character === 0x2c && top?.keys) {
      top.expectsKey = true;
    } else if (character === 0x2d || (character >= 0x30 && character <= 0x39)) {
      at = checkNumber(text, at);
      continue;
    }
    at++;
  }
}

/** Index after the closing quote. */
function stringEnd(text: string, start: number): number {
  for (let at = start + 1; at < text.length; at++) {
    const character = text.charCodeAt(at);
    if (character === 0x5c) at++;
    else if (character === 0x22) return at + 1;
  }
  throw invalid('The request body is not valid JSON: a string does not end.');
}

function checkKey(keys: Set<string>, quoted: string): void {
  let key: string;
  try {
    key = JSON.parse(quoted) as string;
  } catch (cause) {
    throw new ShardmeshError('invalid_json', 'The request body is not valid JSON: a key is malformed.', { cause });
  }
  if (forbiddenKeys.has(key)) throw invalid(`The key ${JSON.stringify(key)} is not allowed.`);
  if (keys.has(key)) throw invalid(`The key ${JSON.stringify(key.slice(0, 64))} appears twice in one object.`);
  keys.add(key);
}

function checkNumber(text: string, at: number): number {
  numberPattern.lastIndex = at;
  const match = numberPattern.exec(text);
  if (!match) throw invalid('The request body is not valid JSON: a number is malformed.');
  const value = Number(match[0]);
  if (!Number.isFinite(value)) throw invalid(`The number ${match[0].slice(0, 32)} is too large.`);
  if (/^-?\d+$/.test(match[0]) && !Number.isSafeInteger(value))
    throw invalid(`The whole number ${match[0].slice(0, 32)} is beyond 2^53 and would be rounded.`);
  return at + match[0].length;
}
