/** Tokens to text. Bytes of every token in one table; a decoder that never emits half a UTF-8 character. */
import { byteOfToken, isSpecialType, tokenTypes } from './vocabulary.ts';
import type { Vocabulary } from './vocabulary.ts';

/** Whole sequences only are handed to it, so it keeps no state between calls. A byte order mark is text like any other. */
const utf8 = new TextDecoder('utf-8', { ignoreBOM: true });

export class TokenBytes {
  readonly tokenCount: number;
  /** All tokens' bytes, one after another; token i is [offsets[i], offsets[i + 1]). */
  readonly #bytes: Uint8Array;
  readonly #offsets: Uint32Array;
  readonly #special: Uint8Array;

  constructor(vocabulary: Vocabulary) {
    const { tokens, types } = vocabulary;
    this.tokenCount = tokens.length;
    this.#special = Uint8Array.from(types, (type) => (isSpecialType(type) ? 1 : 0));
    this.#offsets = new Uint32Array(tokens.length + 1);
    const parts = tokens.map((token, id) => bytesOfToken(vocabulary.kind, token, types[id] ?? 0));
    parts.forEach((part, id) => (this.#offsets[id + 1] = (this.#offsets[id] ?? 0) + part.length));
    this.#bytes = new Uint8Array(this.#offsets[tokens.length] ?? 0);
    parts.forEach((part, id) => this.#bytes.set(part, this.#offsets[id]));
  }

  /** @throws {RangeError} no such token */
  of(token: number): Uint8Array {
    this.#check(token);
    return this.#bytes.slice(this.#offsets[token], this.#offsets[token + 1]);
  }

  /** @throws {RangeError} no such token */
  isSpecial(token: number): boolean {
    this.#check(token);
    return this.#special[token] === 1;
  }

  /** Bytes of a list of tokens, special ones left out unless `special`. */
  join(tokens: readonly number[], special: boolean): Uint8Array {
    let length = 0;
    for (const token of tokens) {
      this.#check(token);
      if (special || this.#special[token] === 0) length += (this.#offsets[token + 1] ?? 0) - (this.#offsets[token] ?? 0);
    }
    const joined = new Uint8Array(length);
    let at = 0;
    for (const token of tokens) {
      if (!special && this.#special[token] === 1) continue;
      const part = this.#bytes.subarray(this.#offsets[token], this.#offsets[token + 1]);
      joined.set(part, at);
      at += part.length;
    }
    return joined;
  }

  #check(token: number): void {
    if (Number.isInteger(token) && token >= 0 && token < this.tokenCount) return;
    throw new RangeError(
      `token ${token} does not exist; the vocabulary has ${this.tokenCount} tokens, 0 to ${this.tokenCount - 1}`,
    );
  }
}

/**
 * Incremental detokenizer: the texts of all pushes and the flush, joined, are what a TextDecoder gives for the bytes of all tokens.
 * Special tokens give no text.
 */
export class Detokenizer {
  readonly #table: TokenBytes;
  /** The beginning of a character whose rest has not come yet: 0 to 3 bytes. */
  #held: Uint8Array = new Uint8Array(0);

  constructor(table: TokenBytes) {
    this.#table = table;
  }

  /** Text that is certain now; empty while a character is incomplete. */
  push(token: number): string {
    if (this.#table.isSpecial(token)) return '';
    return this.#decode(this.#table.of(token));
  }

  /** The rest: a replacement character for a broken tail. The detokenizer can be used again afterwards. */
  flush(): string {
    const text = utf8.decode(this.#held);
    this.#held = new Uint8Array(0);
    return text;
  }

  #decode(fresh: Uint8Array): string {
    let bytes = fresh;
    if (this.#held.length > 0) {
      bytes = new Uint8Array(this.#held.length + fresh.length);
      bytes.set(this.#held);
      bytes.set(fresh, this.#held.length);
    }
    const complete = bytes.length - incompleteTail(bytes);
    this.#held = bytes.slice(complete);
    return complete === 0 ? '' : utf8.decode(bytes.subarray(0, complete));
  }
}

export function decodeUtf8(bytes: Uint8Array): string {
  return utf8.decode(bytes);
}

/**
 * Length of a beginning of a UTF-8 character at the end that later bytes may complete: 0..3. A lead byte always begins a new character, so
 * decoding what stands before it and decoding from it on are independent.
 */
function incompleteTail(bytes: Uint8Array): number {
  for (let length = 1; length <= Math.min(3, bytes.length); length++) {
    const lead = bytes[bytes.length - length] ?? 0;
    if (lead < 0x80) return 0;
    if (lead < 0xc0) continue;
    return mayContinue(lead, length === 1 ? undefined : bytes[bytes.length - length + 1], length) ? length : 0;
  }
  return 0;
}

/** Whether `length` bytes, of which the rest after `lead` are continuation bytes, are a proper beginning of a well-formed character (Unicode, table 3-7). */
function mayContinue(lead: number, second: number | undefined, length: number): boolean {
  const size = lead >= 0xc2 && lead <= 0xdf ? 2 : lead >= 0xe0 && lead <= 0xef ? 3 : lead >= 0xf0 && lead <= 0xf4 ? 4 : 0;
  if (length >= size) return false;
  if (second === undefined) return true;
  const from = lead === 0xe0 ? 0xa0 : lead === 0xf0 ? 0x90 : 0x80;
  const to = lead === 0xed ? 0x9f : lead === 0xf4 ? 0x8f : 0xbf;
  return second >= from && second <= to;
}

const encoder = new TextEncoder();

function bytesOfToken(kind: 'bpe' | 'spm', token: string, type: number): Uint8Array {
  if (isSpecialType(type)) return encoder.encode(token);
  if (kind === 'spm') {
    const byte = type === tokenTypes.byte ? byteOfToken(token) : null;
    return byte === null ? encoder.encode(token.replaceAll('▁', ' ')) : Uint8Array.of(byte);
  }
  if (type === tokenTypes.userDefined) return encoder.encode(token);
  const bytes: number[] = [];
  for (const character of token) {
    const byte = byteOfCharacter.get(character);
    if (byte === undefined) bytes.push(...encoder.encode(character));
    else bytes.push(byte);
  }
  return Uint8Array.from(bytes);
}

/**
 * The byte-level alphabet of GPT-2: printable Latin-1 characters stand for themselves, the other 68 bytes, ascending, for U+0100, U+0101, …
 * (openai/gpt-2: src/encoder.py, bytes_to_unicode)
 */
const byteOfCharacter: ReadonlyMap<string, number> = (() => {
  const map = new Map<string, number>();
  let next = 0x100;
  for (let byte = 0; byte < 256; byte++) {
    const isPrintable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    map.set(String.fromCharCode(isPrintable ? byte : next++), byte);
  }
  return map;
})();
