import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { StopMatcher, StopStrings } from '../../../../coordinator/text/stop-matcher.ts';

/** Pushes the pieces one after another. */
function run(stops: string[], pieces: string[]): { texts: string[]; rest: string; stopped: string | null } {
  const matcher = new StopMatcher(new StopStrings(stops));
  const texts = pieces.map((piece) => matcher.push(piece).text);
  return { texts, rest: matcher.flush(), stopped: matcher.stopped };
}

/** The stop string that is complete first; of those that end together the longest. */
function search(stops: string[], text: string): { before: string; stopped: string | null } {
  for (let end = 1; end <= text.length; end++) {
    const found = stops.filter((stop) => text.slice(0, end).endsWith(stop)).sort((a, b) => b.length - a.length)[0];
    if (found !== undefined) return { before: text.slice(0, end - found.length), stopped: found };
  }
  return { before: text, stopped: null };
}

describe('stop matcher', () => {
  it('stop matcher - finds a stop string across pushes and swallows it and the rest', () => {
    expect(run(['\n\nUser:'], ['Hi', '\n', '\nUs', 'er: x', 'y'])).toEqual({
      texts: ['Hi', '', '', '', ''],
      rest: '',
      stopped: '\n\nUser:',
    });
  });

  it('stop matcher - gives back what turned out not to be a stop string, as early as it can', () => {
    expect(run(['END'], ['aE', 'N', 'x', 'EEN', 'E'])).toEqual({ texts: ['a', '', 'ENx', 'E', 'EN'], rest: 'E', stopped: null });
  });

  it('stop matcher - takes the stop string that is complete first, of those that end together the longest', () => {
    expect(run(['abcd', 'bc'], ['xabcd'])).toEqual({ texts: ['xa'], rest: '', stopped: 'bc' });
    expect(run(['c', 'bc', 'abc'], ['xabc'])).toEqual({ texts: ['x'], rest: '', stopped: 'abc' });
  });

  it('stop matcher - holds nothing back without stop strings', () => {
    const matcher = new StopMatcher(null);
    expect(matcher.push('abc')).toEqual({ text: 'abc', stopped: null });
    expect(matcher.flush()).toBe('');
  });

  it('stop matcher - refuses too many, empty, long and broken strings', () => {
    const build = (strings: string[]) => () => new StopStrings(strings);
    expect(build([])).toThrow('stop has 0 strings; it must have 1 to 16.');
    expect(build(Array<string>(17).fill('a'))).toThrow('stop has 17 strings; it must have 1 to 16.');
    expect(build(['a', ''])).toThrow('stop[1] has 0 characters; it must have 1 to 256.');
    expect(build(['😀'.repeat(257)])).toThrow('stop[0] has 257 characters; it must have 1 to 256.');
    expect(build(['😀'.repeat(256)])).not.toThrow();
    expect(build(['\ud83d'])).toThrow('stop[0] has a surrogate without its other half; send well-formed text.');
  });

  it('stop matcher - never gives half a character', () => {
    expect(run(['😀!'], ['a😀', '😁'])).toEqual({ texts: ['a', '😀😁'], rest: '', stopped: null });
  });

  it('stop matcher - agrees with a search of the whole text, however it is cut', () => {
    const word = (maxLength: number) => fc.string({ unit: fc.constantFrom('a', 'b', 'c'), minLength: 1, maxLength });
    fc.assert(
      fc.property(
        fc.array(word(4), { minLength: 1, maxLength: 5 }),
        fc.array(fc.string({ unit: fc.constantFrom('a', 'b', 'c'), maxLength: 5 }), { maxLength: 12 }),
        (stops, pieces) => {
          const { texts, rest, stopped } = run(stops, pieces);
          expect({ before: texts.join('') + rest, stopped }).toEqual(search(stops, pieces.join('')));
        },
      ),
      { numRuns: 2_000 },
    );
  });

  it('stop matcher - takes time linear in the text for the worst stop strings', () => {
    const matcher = new StopMatcher(new StopStrings(Array.from({ length: 16 }, (_, index) => 'a'.repeat(240 + index) + 'b')));
    const started = performance.now();
    let given = 0;
    for (let i = 0; i < 1_000; i++) given += matcher.push('a'.repeat(1_000)).text.length;
    // The longest beginning of a stop string, 255 times a, is held back.
    expect(given).toBe(1_000_000 - 255);
    expect(performance.now() - started).toBeLessThan(3_000);
  });
});
