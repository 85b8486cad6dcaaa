/** Log-probabilities in the two shapes of OpenAI's API. Values are the exact fp32 numbers: two that differ in one bit differ in JSON. */
import type { TokenLogprob } from '../engine/engine-types.ts';
import type { TextModel } from '../text/text-types.ts';

const decoder = new TextDecoder('utf-8');

export function tokenText(text: TextModel, token: number): string {
  return decoder.decode(text.tokenBytes(token));
}

function chatToken(text: TextModel, token: number, logprob: number) {
  return { token: tokenText(text, token), logprob, bytes: [...text.tokenBytes(token)] };
}

/** One entry of `choices[].logprobs.content`. */
export function chatLogprob(text: TextModel, entry: TokenLogprob) {
  return {
    ...chatToken(text, entry.token, entry.logprob),
    top_logprobs: entry.top.map((one) => chatToken(text, one.token, one.logprob)),
  };
}

/** `choices[].logprobs` of /v1/completions: parallel lists; `text_offset` counts characters of the returned text. */
export class CompletionLogprobs {
  readonly #text: TextModel;
  readonly tokens: string[] = [];
  readonly token_logprobs: (number | null)[] = [];
  readonly top_logprobs: (Record<string, number> | null)[] = [];
  readonly text_offset: number[] = [];
  #offset: number;

  constructor(text: TextModel, offset = 0) {
    this.#text = text;
    this.#offset = offset;
  }

  /** `entry` null: the first prompt token, which nothing precedes. */
  push(token: number, entry: TokenLogprob | null): void {
    const text = tokenText(this.#text, token);
    this.tokens.push(text);
    this.token_logprobs.push(entry?.logprob ?? null);
    this.top_logprobs.push(
      entry ? Object.fromEntries(entry.top.map((one) => [tokenText(this.#text, one.token), one.logprob])) : null,
    );
    this.text_offset.push(this.#offset);
    this.#offset += text.length;
  }

  /** Where the text of the next token begins. */
  get end(): number {
    return this.#offset;
  }

  /** The same entries in pieces of at most `size` tokens; at least one piece. */
  slices(size: number): CompletionLogprobs[] {
    const pieces: CompletionLogprobs[] = [];
    for (let from = 0; from === 0 || from < this.tokens.length; from += size) {
      const piece = new CompletionLogprobs(this.#text, this.text_offset[from + size] ?? this.#offset);
      piece.tokens.push(...this.tokens.slice(from, from + size));
      piece.token_logprobs.push(...this.token_logprobs.slice(from, from + size));
      piece.top_logprobs.push(...this.top_logprobs.slice(from, from + size));
      piece.text_offset.push(...this.text_offset.slice(from, from + size));
      pieces.push(piece);
    }
    return pieces;
  }

  toJSON() {
    const { tokens, token_logprobs, top_logprobs, text_offset } = this;
    return { tokens, token_logprobs, top_logprobs, text_offset };
  }
}
