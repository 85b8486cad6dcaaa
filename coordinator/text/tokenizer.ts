/** Text to tokens. The work is done by the `tokenizers` package on its own threads; this file cuts text so that the event loop stays free. */
import { setImmediate as nextTurn } from 'node:timers/promises';
import { Tokenizer as NativeTokenizer } from 'tokenizers';
import { ShardmeshError } from '../../protocol/errors.ts';
import { SpecialTokenFinder } from './special-tokens.ts';
import { toTokenizerJson, tokenTypes } from './vocabulary.ts';
import type { Vocabulary } from './vocabulary.ts';

/**
 * Most UTF-16 units handed over in one call: taking over its token ids costs the event loop a few milliseconds at worst. Only a text without any
 * place to cut is longer: a run of one kind of character, as no prompt that fits a context has it (`tokensMax` refuses it first).
 */
const callCharacters = 16 * 1024;
const callPieces = 256;
/** A place where every pre-tokenizer cuts, whatever follows and whatever came before (see `preTokenizers` in vocabulary.ts). */
const safeCut = /[\p{L}\p{N}](?=[^\p{L}\p{N}\p{M}\p{Cs}'’])/gu;

const withoutSpecial = { addSpecialTokens: false } as const;

export class Tokenizer {
  readonly #native: NativeTokenizer;
  readonly #vocabulary: Vocabulary;
  /** User-defined tokens: matched whole in any text. */
  readonly #plainFinder: SpecialTokenFinder;
  readonly #parseFinder: SpecialTokenFinder;

  /** Takes a quarter of a second for 50,000 tokens. */
  constructor(vocabulary: Vocabulary) {
    this.#vocabulary = vocabulary;
    this.#native = NativeTokenizer.fromString(JSON.stringify(toTokenizerJson(vocabulary)));
    this.#plainFinder = new SpecialTokenFinder(tokensOfTypes(vocabulary, [tokenTypes.userDefined]));
    this.#parseFinder = new SpecialTokenFinder(
      tokensOfTypes(vocabulary, [tokenTypes.userDefined, tokenTypes.control, tokenTypes.unknown]),
    );
  }

  /**
   * Token ids of a text.
   * @param options.special 'parse': text that spells a special token becomes that token; 'plain': it stays text
   * @param options.addBos put BOS in front where the model file asks for it and the text does not already begin with it
   * @param options.tokensMax most tokens
   * @throws {ShardmeshError} `context_length_exceeded`: more than `tokensMax`; the rest of the text is not looked at
   */
  async encode(text: string, options: { special: 'parse' | 'plain'; addBos: boolean; tokensMax?: number }): Promise<number[]> {
    const finder = options.special === 'parse' ? this.#parseFinder : this.#plainFinder;
    const ids = await this.#encodePieces(finder.split(text), options.tokensMax);
    const { bosToken, addBos } = this.#vocabulary;
    // Where BOS makes it one too many, the engine says so: it knows the context.
    if (options.addBos && addBos && bosToken !== null && ids[0] !== bosToken) ids.unshift(bosToken);
    return ids;
  }

  /** Token ids of a text whose special tokens are already found: numbers are taken as they are, strings are plain text. */
  async encodeParts(parts: Iterable<string | number>, tokensMax?: number): Promise<number[]> {
    return this.#encodePieces(this.#splitPlain(parts), tokensMax);
  }

  *#splitPlain(parts: Iterable<string | number>): Generator<string | number> {
    for (const part of parts) {
      if (typeof part === 'number') yield part;
      else yield* this.#plainFinder.split(part);
    }
  }

  async #encodePieces(pieces: Iterable<string | number>, tokensMax = Infinity): Promise<number[]> {
    const ids: number[] = [];
    let group: (string | number)[] = [];
    let characters = 0;
    const flush = async (): Promise<void> => {
      await this.#encodeGroup(group, ids, tokensMax);
      group = [];
      characters = 0;
    };
    for (const piece of pieces) {
      if (piece === '') {
        await nextTurn();
        continue;
      }
      if (typeof piece === 'number') {
        group.push(piece);
      } else {
        // SentencePiece puts its space in front of each piece of text, so only the other kind may be cut.
        const chunks = this.#vocabulary.kind === 'bpe' ? cutSafely(piece) : [piece];
        for (const chunk of chunks) {
          if (characters > 0 && characters + chunk.length > callCharacters) await flush();
          group.push(chunk);
          characters += chunk.length;
        }
      }
      if (group.length >= callPieces) await flush();
    }
    if (group.length > 0) await flush();
    return ids;
  }

  async #encodeGroup(group: readonly (string | number)[], ids: number[], tokensMax: number): Promise<void> {
    const texts = group.filter((piece) => typeof piece === 'string');
    const encodings =
      texts.length === 1
        ? [await this.#native.encode(texts[0] ?? '', null, withoutSpecial)]
        : texts.length === 0
          ? []
          : await this.#native.encodeBatch(texts, withoutSpecial);
    // Counted before any id is taken over: that is the part that holds up the event loop.
    const count = encodings.reduce((sum, encoding) => sum + encoding.getLength(), ids.length + group.length - texts.length);
    if (count > tokensMax) {
      throw new ShardmeshError(
        'context_length_exceeded',
        `The prompt has at least ${count} tokens; the most that fit are ${tokensMax}. Shorten the prompt.`,
      );
    }
    let next = 0;
    for (const piece of group) {
      if (typeof piece === 'number') {
        ids.push(piece);
        continue;
      }
      const encoding = encodings[next++];
      if (encoding === undefined) throw new Error(`the tokenizer gave ${encodings.length} results for ${texts.length} texts`);
      for (const id of encoding.getIds()) ids.push(id);
    }
  }
}

/** Pieces of at most `callCharacters`, as far as there are places where a cut changes no token. */
function* cutSafely(text: string): Generator<string> {
  let start = 0;
  while (text.length - start > callCharacters) {
    // The last good place in reach; looking back from the far end, a little at a time, because most texts have one within a few characters.
    let cut = lastSafeCut(text, start, start + callCharacters);
    if (cut === null) {
      safeCut.lastIndex = start + callCharacters - 1;
      const match = safeCut.exec(text);
      cut = match === null ? text.length : match.index + match[0].length;
    }
    yield text.slice(start, cut);
    start = cut;
  }
  if (start < text.length) yield text.slice(start);
}

function lastSafeCut(text: string, start: number, end: number): number | null {
  for (let from = end - 256; from > start; from -= 2_048) {
    const window = text.slice(from, Math.min(end, from + 2_048));
    safeCut.lastIndex = 0;
    let last: number | null = null;
    for (let match = safeCut.exec(window); match !== null; match = safeCut.exec(window))
      last = from + match.index + match[0].length;
    if (last !== null) return last;
  }
  return null;
}

function* tokensOfTypes(vocabulary: Vocabulary, types: readonly number[]): Generator<[string, number]> {
  for (const [id, token] of vocabulary.tokens.entries()) if (types.includes(vocabulary.types[id] ?? 0)) yield [token, id];
}
