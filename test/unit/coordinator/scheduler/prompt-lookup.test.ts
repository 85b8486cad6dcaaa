import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { PromptLookup } from '../../../../coordinator/scheduler/prompt-lookup.ts';

/** Everything is prompt unless said otherwise. */
function lookupOf(tokens: number[], promptLength = tokens.length): PromptLookup {
  const lookup = new PromptLookup(tokens, promptLength);
  lookup.extend();
  return lookup;
}

describe('prompt lookup', () => {
  it('prompt lookup - drafts what followed the last tokens before, three of them or two', () => {
    expect(lookupOf([1, 2, 3, 4, 5, 9, 9, 1, 2, 3]).draft(2)).toEqual([4, 5]);
    expect(lookupOf([7, 2, 3, 4, 5, 1, 2, 3]).draft(4)).toEqual([4, 5, 1, 2]);
    expect(lookupOf([1, 2, 3, 4, 5, 6, 3]).draft(4)).toEqual([]);
    expect(lookupOf([]).draft(4)).toEqual([]);
  });

  it('prompt lookup - three equal tokens count for more than two that came later', () => {
    expect(lookupOf([1, 2, 3, 4, 8, 2, 3, 5, 1, 2, 3]).draft(1)).toEqual([4]);
    // Of equal matches the latest is taken.
    expect(lookupOf([1, 2, 3, 4, 1, 2, 3, 5, 6, 1, 2, 3]).draft(1)).toEqual([5]);
  });

  it('prompt lookup - follows a place as long as it is right, though a later one would match as well', () => {
    const tokens = [1, 2, 3, 4, 5, 6, 7, 8, 3, 4, 5, 9, 1, 2, 3];
    const lookup = lookupOf(tokens);
    for (const token of [4, 5]) {
      tokens.push(token);
      lookup.extend();
    }
    expect(lookup.draft(3)).toEqual([6, 7, 8]);
    // Something else came: what followed `5 9` before is expected now.
    tokens.push(9);
    lookup.extend();
    expect(lookup.draft(3)).toEqual([1, 2, 3]);
  });

  it('prompt lookup - a draft that reaches the end of the text goes on with itself', () => {
    expect(lookupOf([5, 1, 2, 3, 1, 2, 3]).draft(7)).toEqual([1, 2, 3, 1, 2, 3, 1]);
    expect(lookupOf([4, 4, 4, 4]).draft(3)).toEqual([4, 4, 4]);
  });

  it('prompt lookup - expects of a draft what drafts of the output were worth, by length of the match', () => {
    const repeated = [1, 2, 3, 4];
    const tokens = [...repeated, ...repeated];
    const lookup = lookupOf(tokens);
    // Nothing is known, and the prompt's own repetition does not count: 0.6 for each of 4 to 7 equal tokens, 0.8 for more.
    expect(lookup.expected(5).map((sum) => Math.round(sum * 1000))).toEqual([600, 960, 1176, 1306, 1409]);
    for (let i = 0; i < 100; i++) tokens.push(repeated[i % 4]!);
    lookup.extend();
    expect(lookup.expected(3)[2]).toBeGreaterThan(2.9);
    // A wrong one: the match is short again, and of short ones only `4 1`, then 2 was seen.
    tokens.push(1, 2, 4, 1, 2);
    lookup.extend();
    expect(lookup.draft(1)).toEqual([4]);
    expect(lookup.expected(1)[0]).toBeCloseTo(0.35 + 0.125 * 0.65, 9);
    tokens.push(77);
    lookup.extend();
    expect(lookup.expected(3)).toEqual([]);
  });

  it('prompt lookup - gives the same whether tokens come one by one or at once, and only what is in the text', () => {
    fc.assert(
      fc.property(
        fc.array(fc.integer({ min: 0, max: 5 }), { maxLength: 900 }),
        fc.integer({ min: 0, max: 900 }),
        (all, promptLength) => {
          const tokens: number[] = [];
          const lookup = new PromptLookup(tokens, promptLength);
          for (const token of all) {
            tokens.push(token);
            lookup.extend();
          }
          const draft = lookup.draft(9);
          const text = [...all, ...draft];
          const last = text.slice(all.length - 2, all.length);
          const occurs = all.some(
            (_, at) => at + 2 < all.length && last.length === 2 && all[at] === last[0] && all[at + 1] === last[1],
          );
          // Two tokens that occurred before are found: tables of this size lose nothing to others of the same hash, except by chance.
          if (!occurs) expect(draft).toEqual([]);
          if (draft.length === 0) return;
          const places = all
            .map((_, at) => at)
            .filter((at) => at + 2 < all.length && all[at] === last[0] && all[at + 1] === last[1]);
          expect(places.some((at) => draft.every((token, i) => text[at + 2 + i] === token))).toBe(true);
          const whole = new PromptLookup(tokens, promptLength);
          whole.extend();
          expect(whole.draft(9)).toEqual(draft);
          expect(whole.expected(9)).toEqual(lookup.expected(9));
        },
      ),
      { numRuns: 60 },
    );
  });

  it('prompt lookup - a token costs less than 2 us, in a text of 200,000', () => {
    const tokens: number[] = [];
    const lookup = new PromptLookup(tokens, 1);
    const began = performance.now();
    for (let i = 0; i < 200_000; i++) {
      tokens.push((i * i) % 50_021);
      lookup.extend();
    }
    expect(performance.now() - began).toBeLessThan(400);
    expect(lookup.draft(3)).toHaveLength(3);
  });
});
