/**
 * Whether drafts pay now. How many tokens a sequence's next step will give is not known until the result is here, so with drafts in it nothing can be planned ahead:
 * every result is followed by the way to the coordinator and back, and a rejected row was computed for nothing. Against that stand the drafts that will be right.
 *
 *   planned ahead    sequences / ms of a step                                 tokens a ms
 *   with drafts      (sequences + drafts that will be right) / ms of a round  tokens a ms
 *
 * Both times are measured; many sequences, or a machine on which rows cost as much as steps, thus end drafts by themselves. Pure.
 */
import type { PromptLookup } from './prompt-lookup.ts';

export interface SpeculationTimes {
  /** Tokens that so many sequences get in a ms when their steps are planned ahead; null: not measured. */
  tokensPerMs(sequences: number): number | null;
  /** From a result to the next, of a step of so many rows planned between them. */
  roundMs(rows: number): number;
}

/** Above, rows cost as much as they bring, and nobody needs to remember what the sequences said. */
export const draftSequencesMax = 8;
/** Most rows of a step that has drafts. */
export const draftRowsMax = 16;
/** Most drafts of a sequence in a step. */
const draftTokensMax = 7;
/** Estimates are no better than this. */
const gainMin = 1.05;

/**
 * How many draft tokens each sequence gets; null: none pay.
 * @param rowsMax  most rows of the step
 * @param limits  most drafts of each sequence
 */
export function chooseDrafts(
  lookups: readonly PromptLookup[],
  limits: readonly number[],
  rowsMax: number,
  times: SpeculationTimes,
): number[] | null {
  const plain = times.tokensPerMs(lookups.length);
  if (plain === null) return null;
  const expected = lookups.map((lookup, i) => lookup.expected(Math.min(limits[i]!, draftTokensMax)));
  const counts = lookups.map(() => 0);
  let tokens = lookups.length;
  let best: number[] | null = null;
  let bestRate = gainMin * plain;
  for (let rows = lookups.length + 1; rows <= rowsMax; rows++) {
    // The next row goes to the sequence whose next draft is the likeliest to be right.
    let next = -1;
    let gain = 0;
    for (const [i, sums] of expected.entries()) {
      const count = counts[i]!;
      const more = count < sums.length ? sums[count]! - (sums[count - 1] ?? 0) : 0;
      if (more > gain) [next, gain] = [i, more];
    }
    if (next < 0) break;
    counts[next]!++;
    tokens += gain;
    const rate = tokens / times.roundMs(rows);
    if (rate > bestRate) [best, bestRate] = [counts.slice(), rate];
  }
  return best;
}
