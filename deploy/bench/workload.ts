/** What is asked: conversations of one or more turns whose prompts have drawn lengths. The same seed gives the same texts. */
import { drawLength, type LengthDistribution } from './length-distribution.ts';
import { Random } from './random.ts';

export interface WorkloadOptions {
  seed: number;
  promptTokens: LengthDistribution;
  outputTokens: LengthDistribution;
  /** Turns of a conversation; each sends all turns before it, with the answers that came. */
  turns: number;
  /** Prompts begin with one of `groups` texts of `tokens` tokens; null: no prompt begins like another. */
  sharedPrefix: { tokens: number; groups: number } | null;
}

export interface Turn {
  text: string;
  outputTokens: number;
}

/**
 * Words that are one token each, with the space before them, in every vocabulary we know of. So a text of n words has n tokens, give or take the few that a
 * server puts around it; what it really had is in `usage` and is what gets reported.
 */
const words = (
  'time year people way day man thing woman life child world school state family student group country problem hand part place case week ' +
  'company system program question work government number night point home water room mother area money story fact month lot right study book ' +
  'eye job word business issue side kind head house service friend father power hour game line end member law car city community name ' +
  'president team minute idea body information back parent face others level office door health person art war history party result change ' +
  'morning reason research girl guy moment air teacher force education'
).split(' ');

export class Workload {
  readonly #options: WorkloadOptions;
  readonly #random: Random;
  readonly #prefixes: string[];

  constructor(options: WorkloadOptions) {
    this.#options = options;
    this.#random = new Random(options.seed);
    const { tokens, groups } = options.sharedPrefix ?? { tokens: 0, groups: 0 };
    this.#prefixes = Array.from({ length: groups }, () => this.text(tokens));
  }

  /** @param lengths  in place of drawn ones, as a trace has them; with a shared prefix they are what follows it */
  conversation(lengths: { prompt: number; output: number } | null): Turn[] {
    const { promptTokens, outputTokens, turns } = this.#options;
    const prefix =
      this.#prefixes.length > 0 ? `${this.#prefixes[this.#random.integer(0, this.#prefixes.length - 1)] ?? ''} ` : '';
    return Array.from({ length: turns }, (_, turn) => ({
      text: (turn === 0 ? prefix : '') + this.text(lengths?.prompt ?? drawLength(promptTokens, this.#random)),
      outputTokens: lengths?.output ?? drawLength(outputTokens, this.#random),
    }));
  }

  text(tokens: number): string {
    return Array.from({ length: tokens }, () => words[this.#random.integer(0, words.length - 1)] ?? '').join(' ');
  }
}
