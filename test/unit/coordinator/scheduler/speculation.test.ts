import { describe, expect, it } from 'vitest';
import { PromptLookup } from '../../../../coordinator/scheduler/prompt-lookup.ts';
import { chooseDrafts } from '../../../../coordinator/scheduler/speculation.ts';

/** A sequence whose last tokens occurred before, after `right` of 100 output tokens that came as expected (the others did not). */
function lookupWith(right: number): PromptLookup {
  const tokens = Array.from({ length: 120 }, (_, i) => i % 4);
  for (let i = 0; i < 100; i++) tokens.push(i < right ? i % 4 : 1_000 + i);
  tokens.push(0, 1, 2);
  const lookup = new PromptLookup(tokens, 120);
  lookup.extend();
  return lookup;
}

/** A step planned ahead takes 2 ms, a round 3 ms and `rowMs` for each row. */
const timesOf = (rowMs: number) => ({
  tokensPerMs: (sequences: number) => sequences / 2,
  roundMs: (rows: number) => 3 + rowMs * rows,
});

const nothing = new PromptLookup([1, 2, 3], 3);

describe('speculation', () => {
  it('speculation - drafts as many tokens as pay by what a row costs', () => {
    const good = lookupWith(100);
    // Eight rows bring nearly eight tokens.
    expect(chooseDrafts([good], [100], 16, timesOf(0))).toEqual([7]);
    expect(chooseDrafts([good], [3], 16, timesOf(0))).toEqual([3]);
    expect(chooseDrafts([good], [100], 3, timesOf(0))).toEqual([2]);
    // A row that costs as much as a step planned ahead never pays.
    expect(chooseDrafts([good], [100], 16, timesOf(2))).toBeNull();
  });

  it('speculation - has no drafts where nothing is expected, nothing was measured, or no row is left', () => {
    expect(chooseDrafts([nothing], [100], 16, timesOf(0))).toBeNull();
    expect(chooseDrafts([], [], 16, timesOf(0))).toBeNull();
    expect(chooseDrafts([lookupWith(100)], [100], 16, { ...timesOf(0), tokensPerMs: () => null })).toBeNull();
    expect(chooseDrafts([lookupWith(100)], [100], 1, timesOf(0))).toBeNull();
    expect(chooseDrafts([lookupWith(100)], [0], 16, timesOf(0))).toBeNull();
  });

  it('speculation - weighs what one sequence gains against what all others wait', () => {
    const good = lookupWith(100);
    const others = (count: number) => Array.from({ length: count }, () => nothing);
    const limits = new Array<number>(9).fill(100);
    expect(chooseDrafts([nothing, good], limits, 16, timesOf(0))).toEqual([0, 7]);
    // Seven others that get a token in 3 ms instead of 2 lose 3.5 - 2.3 tokens a ms, one that gets 8 gains 2.2.
    expect(chooseDrafts([good, ...others(7)], limits, 16, timesOf(0))).not.toBeNull();
    expect(chooseDrafts([good, ...others(7)], limits, 16, timesOf(0.2))).toBeNull();
    // Rows go where they are the likeliest to be right.
    const [first, second] = chooseDrafts([lookupWith(90), good], limits, 9, timesOf(0))!;
    expect(second).toBe(7);
    expect(first).toBe(0);
  });
});
