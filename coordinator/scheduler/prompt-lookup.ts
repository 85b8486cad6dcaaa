/**
 * Prompt lookup: guesses how a sequence goes on from what followed the same tokens earlier in it. Where a text repeats its prompt (code that is edited, a summary
 * that quotes) such drafts are right for long stretches, and they cost next to nothing.
 *
 *   tokens   a b c d e f . . . . . . a b c          the last three occurred before, so the draft is d e f . . .
 *                  ^ source                ^ next
 *
 * Earlier places are found as compressors find them: a table keeps, for each hash of n tokens, the place behind the latest n tokens with this hash, and the tokens
 * themselves say whether they are equal. A place that was found is followed as long as it is right. Whether it was is noted for every output token, asked for or
 * not: so it is known what drafts are worth before any was computed.
 */
const longest = 3;
const shortest = 2;
const entriesMin = 256;
/**
 * Share of expected tokens that come, before anything was seen, as stories and summaries of a small model have it. By length of the match: 2..3, 4..7, 8..15,
 * 16 tokens and more.
 */
const firstRates = [0.35, 0.6, 0.8, 0.9];
const rateWeight = 0.125;

const classOf = (length: number): number => Math.min(Math.floor(Math.log2(length)), firstRates.length) - 1;

export class PromptLookup {
  /** The sequence's own list, which grows. */
  readonly #tokens: readonly number[];
  readonly #promptLength: number;
  /** Tokens taken in. */
  #known = 0;
  /** By length of match, from the shortest: place behind the latest match of a hash; 0: none. */
  #tables: Int32Array[] = [];
  /** Place of the token that is expected next; null: the last tokens occurred nowhere else. */
  #source: number | null = null;
  /** Tokens before `source` that equal the last ones, as far as they were followed. */
  #length = 0;
  /** Share of expected tokens that came, by length of the match. */
  readonly #rates = Float64Array.from(firstRates);

  constructor(tokens: readonly number[], promptLength: number) {
    this.#tokens = tokens;
    this.#promptLength = promptLength;
    this.#grow();
  }

  /** Takes in what has been added to the tokens. */
  extend(): void {
    if (2 * this.#tokens.length > this.#tables[0]!.length) this.#grow();
    while (this.#known < this.#tokens.length) this.#take(this.#known++);
  }

  /** How many of a draft's first `count` tokens will be right, by what was right so far: [0] of one token, [1] of two ... Empty: there is nothing to go by. */
  expected(count: number): number[] {
    const sums: number[] = [];
    if (this.#source === null) return sums;
    let all = 1;
    for (let i = 0; i < count; i++) {
      all *= this.#rates[classOf(this.#length + i)]!;
      sums.push((sums.at(-1) ?? 0) + all);
    }
    return sums;
  }

  /** The tokens that are expected next. A source so near the end that it runs into its own draft repeats it. */
  draft(count: number): number[] {
    const draft: number[] = [];
    if (this.#source === null) return draft;
    for (let i = 0; i < count; i++) draft.push(this.#tokens[this.#source + i] ?? draft[this.#source + i - this.#known]!);
    return draft;
  }

  #take(at: number): void {
    const token = this.#tokens[at]!;
    if (this.#source !== null) {
      const right = this.#tokens[this.#source] === token;
      if (at >= this.#promptLength) {
        const index = classOf(this.#length);
        this.#rates[index]! += rateWeight * ((right ? 1 : 0) - this.#rates[index]!);
      }
      this.#source = right ? this.#source + 1 : null;
      this.#length++;
    }
    for (let n = Math.min(longest, at + 1); n >= shortest; n--) {
      const table = this.#tables[n - shortest]!;
      const index = this.#hash(at, n) & (table.length - 1);
      const place = table[index]!;
      if (this.#source === null && place > 0 && this.#equal(place - 1, at, n)) {
        this.#source = place;
        this.#length = n;
      }
      table[index] = at + 1;
    }
  }

  /** Of the `n` tokens that end at `at`. */
  #hash(at: number, n: number): number {
    let hash = 0;
    for (let i = at - n + 1; i <= at; i++) hash = Math.imul(hash ^ this.#tokens[i]!, 0x9e3779b1);
    return hash ^ (hash >>> 15);
  }

  #equal(one: number, other: number, n: number): boolean {
    for (let i = 0; i < n; i++) if (this.#tokens[one - i] !== this.#tokens[other - i]) return false;
    return true;
  }

  /** Tables for twice as many tokens as there are, filled again. */
  #grow(): void {
    let entries = entriesMin;
    while (entries < 4 * this.#tokens.length) entries *= 2;
    this.#tables = Array.from({ length: longest - shortest + 1 }, (_, i) => {
      const table = new Int32Array(entries);
      const n = shortest + i;
      for (let at = n - 1; at < this.#known; at++) table[this.#hash(at, n) & (entries - 1)] = at + 1;
      return table;
    });
  }
}
