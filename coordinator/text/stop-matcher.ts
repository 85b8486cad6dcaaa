/** Stop strings, found across token borders, in time linear in the text (Aho and Corasick 1975). */
import { ShardmeshError } from '../../protocol/errors.ts';
import { httpLimits } from '../../protocol/limits.ts';

interface State {
  next: Map<number, State>;
  /** State of the longest proper suffix that also begins a stop string. */
  fallback: State | null;
  /** Characters read from the beginning of a stop string. */
  depth: number;
  /** Longest stop string that ends here. */
  match: string | null;
}

export interface StopResult {
  /** Text that is certainly not part of a stop string. */
  text: string;
  /** The stop string that was found; everything from it on is swallowed. */
  stopped: string | null;
}

/** Built once for a request, shared by its choices. */
export class StopStrings {
  readonly root: State;

  /** @throws {ShardmeshError} `invalid_value` (param `stop`): 1..16 strings of 1..256 characters */
  constructor(strings: readonly string[]) {
    const { stopStringsMax, stopStringCharactersMax } = httpLimits;
    if (strings.length < 1 || strings.length > stopStringsMax) {
      throw invalid(`stop has ${strings.length} strings; it must have 1 to ${stopStringsMax}`);
    }
    this.root = { next: new Map(), fallback: null, depth: 0, match: null };
    strings.forEach((string, index) => {
      const length = [...string].length;
      if (length < 1 || length > stopStringCharactersMax) {
        throw invalid(`stop[${index}] has ${length} characters; it must have 1 to ${stopStringCharactersMax}`);
      }
      // Output text is well-formed, so such a string can never occur; and half a character must never be held back.
      if (/\p{Surrogate}/u.test(string))
        throw invalid(`stop[${index}] has a surrogate without its other half; send well-formed text`);
      this.#add(string);
    });
    this.#link();
  }

  #add(string: string): void {
    let state = this.root;
    for (let i = 0; i < string.length; i++) {
      const unit = string.charCodeAt(i);
      let next = state.next.get(unit);
      if (next === undefined)
        state.next.set(unit, (next = { next: new Map(), fallback: null, depth: state.depth + 1, match: null }));
      state = next;
    }
    state.match = string;
  }

  /** Breadth first: a state's fallback is shallower than the state, so it is linked already. */
  #link(): void {
    const queue: State[] = [this.root];
    for (const state of queue) {
      for (const [unit, child] of state.next) {
        child.fallback = state.fallback === null ? this.root : advance(state.fallback, unit);
        child.match ??= child.fallback.match;
        queue.push(child);
      }
    }
  }
}

/**
 * Cuts one stream of text at the stop string that is complete first; of several that end at the same character, at the longest.
 * What may still become a stop string is held back.
 */
export class StopMatcher {
  #state: State;
  #held = '';
  #stopped: string | null = null;

  /** @param strings none: all text passes */
  constructor(strings: StopStrings | null) {
    this.#state = strings?.root ?? passThrough;
  }

  /** The string that stopped the stream; `null` while it runs. */
  get stopped(): string | null {
    return this.#stopped;
  }

  push(text: string): StopResult {
    if (this.#stopped !== null) return { text: '', stopped: this.#stopped };
    const before = this.#held.length;
    const all = this.#held + text;
    for (let position = before; position < all.length; position++) {
      this.#state = advance(this.#state, all.charCodeAt(position));
      const match = this.#state.match;
      if (match !== null) {
        this.#stopped = match;
        this.#held = '';
        return { text: all.slice(0, position + 1 - match.length), stopped: match };
      }
    }
    const certain = all.length - this.#state.depth;
    this.#held = all.slice(certain);
    return { text: all.slice(0, certain), stopped: null };
  }

  /** What was held back, now that nothing follows. */
  flush(): string {
    const text = this.#held;
    this.#held = '';
    return text;
  }
}

const passThrough: State = { next: new Map(), fallback: null, depth: 0, match: null };

function advance(from: State, unit: number): State {
  let state = from;
  for (;;) {
    const next = state.next.get(unit);
    if (next !== undefined) return next;
    if (state.fallback === null) return state;
    state = state.fallback;
  }
}

function invalid(message: string): ShardmeshError {
  return new ShardmeshError('invalid_value', `${message}.`, { param: 'stop' });
}
