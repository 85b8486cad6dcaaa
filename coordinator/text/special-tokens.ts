/** Finds tokens that are spelled out in a text. Longest match at the leftmost place, as every tokenizer with added tokens does it. */

interface TrieNode {
  next: Map<number, TrieNode>;
  token: number | null;
}

/** Characters looked at before `split` lets the caller take a breath. */
const scanCharacters = 128 * 1024;

export class SpecialTokenFinder {
  readonly #root: TrieNode = { next: new Map(), token: null };
  readonly #lengthMax: number;
  readonly #texts = new Map<number, string>();
  readonly isEmpty: boolean;

  /** @param tokens text and id; empty texts are skipped */
  constructor(tokens: Iterable<readonly [string, number]>) {
    let lengthMax = 0;
    for (const [text, id] of tokens) {
      if (text === '') continue;
      let node = this.#root;
      for (let i = 0; i < text.length; i++) {
        const unit = text.charCodeAt(i);
        let next = node.next.get(unit);
        if (next === undefined) node.next.set(unit, (next = { next: new Map(), token: null }));
        node = next;
      }
      node.token = id;
      this.#texts.set(id, text);
      lengthMax = Math.max(lengthMax, text.length);
    }
    this.#lengthMax = lengthMax;
    this.isEmpty = lengthMax === 0;
  }

  /**
   * Cuts a text into tokens (numbers) and the text between them. An empty string means nothing: it comes after each `scanCharacters`
   * without a find, so that the caller can yield to the event loop.
   */
  *split(text: string): Generator<string | number> {
    if (this.isEmpty) {
      if (text !== '') yield text;
      return;
    }
    let start = 0;
    let breathAt = scanCharacters;
    let position = 0;
    while (position < text.length) {
      if (position >= breathAt) {
        breathAt = position + scanCharacters;
        yield '';
      }
      const match = this.#longestAt(text, position);
      if (match === null) {
        position++;
        continue;
      }
      if (start < position) yield text.slice(start, position);
      yield match.token;
      position += match.length;
      start = position;
    }
    if (start < text.length) yield text.slice(start);
  }

  /**
   * The text with `mark` put into every token that it spells, overlapping ones included, and behind the text if it ends in the beginning of one.
   * @param everywhere also behind each character that any token begins with, so that no cut of the text holds the beginning of a token
   */
  shield(text: string, mark: string, everywhere: boolean): string {
    let shielded = '';
    let start = 0;
    for (let position = 0; position < text.length; position++) {
      if (!this.#root.next.has(text.charCodeAt(position))) continue;
      if (!everywhere && this.#longestAt(text, position) === null) continue;
      shielded += text.slice(start, position + 1) + mark;
      start = position + 1;
    }
    shielded += text.slice(start);
    return !everywhere && this.#endsInBeginning(text) ? shielded + mark : shielded;
  }

  textOf(token: number): string | undefined {
    return this.#texts.get(token);
  }

  /** Whether any character of the text could begin a token. */
  mayBegin(text: string): boolean {
    for (let i = 0; i < text.length; i++) if (this.#root.next.has(text.charCodeAt(i))) return true;
    return false;
  }

  #longestAt(text: string, position: number): { token: number; length: number } | null {
    let node = this.#root.next.get(text.charCodeAt(position));
    let found: { token: number; length: number } | null = null;
    for (let end = position + 1; node !== undefined; end++) {
      if (node.token !== null) found = { token: node.token, length: end - position };
      if (end >= text.length) break;
      node = node.next.get(text.charCodeAt(end));
    }
    return found;
  }

  #endsInBeginning(text: string): boolean {
    for (let position = Math.max(0, text.length - this.#lengthMax + 1); position < text.length; position++) {
      let node: TrieNode | undefined = this.#root;
      for (let i = position; i < text.length && node !== undefined; i++) node = node.next.get(text.charCodeAt(i));
      if (node !== undefined) return true;
    }
    return false;
  }
}
