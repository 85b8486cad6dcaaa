import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Detokenizer, TokenBytes } from '../../../../coordinator/text/detokenizer.ts';
import { readVocabulary } from '../../../../coordinator/text/vocabulary.ts';
import { bpeMetadata, byteAlphabet, sourceOf, spmMetadata } from './small-vocabulary.ts';

const table = new TokenBytes(readVocabulary(sourceOf(bpeMetadata())));

/** Token b of the small vocabulary is byte b. */
function pushAll(tokens: number[]): string[] {
  const detokenizer = new Detokenizer(table);
  return [...tokens.map((token) => detokenizer.push(token)), detokenizer.flush()];
}

describe('detokenizer', () => {
  it('detokenizer - knows all 256 bytes of the byte-level alphabet', () => {
    expect(new Set(byteAlphabet).size).toBe(256);
    for (let byte = 0; byte < 256; byte++) expect([...table.of(byte)]).toEqual([byte]);
  });

  it('detokenizer - holds back half a character until it is whole', () => {
    expect(pushAll([...Buffer.from('é😀')])).toEqual(['', 'é', '', '', '', '😀', '']);
  });

  it('detokenizer - replaces a broken character as soon as it cannot be completed', () => {
    expect(pushAll([0xe2, 0x82, 0x41])).toEqual(['', '', '\ufffdA', '']);
    expect(pushAll([0xf0, 0x80, 0x80])).toEqual(['', '\ufffd\ufffd', '\ufffd', '']);
    expect(pushAll([0xff])).toEqual(['\ufffd', '']);
    expect(pushAll([0xed, 0xa0, 0x80])).toEqual(['', '\ufffd\ufffd', '\ufffd', '']);
  });

  it('detokenizer - flushes a broken tail as one replacement character', () => {
    expect(pushAll([0x61, 0xf0, 0x9f, 0x98])).toEqual(['a', '', '', '', '\ufffd']);
  });

  it('detokenizer - gives no text for special tokens, not even inside a character', () => {
    expect(pushAll([0xc3, 262, 0xa9])).toEqual(['', '', 'é', '']);
  });

  it('detokenizer - keeps a byte order mark', () => {
    expect(pushAll([0xef, 0xbb, 0xbf, 0x61])).toEqual(['', '', '\ufeff', 'a', '']);
  });

  it('detokenizer - gives what a decoder gives for all bytes at once', () => {
    const whole = new TextDecoder('utf-8', { ignoreBOM: true });
    const utf8 = fc.string({ unit: 'binary', maxLength: 4 }).map((text) => [...Buffer.from(text)]);
    // Bytes at the borders of the well-formed ranges, so that every rule is met often.
    const border = fc.constantFrom(
      0x00,
      0x7f,
      0x80,
      0x8f,
      0x90,
      0x9f,
      0xa0,
      0xbf,
      0xc0,
      0xc1,
      0xc2,
      0xdf,
      0xe0,
      0xe1,
      0xed,
      0xef,
      0xf0,
      0xf1,
      0xf4,
      0xf5,
      0xff,
    );
    const piece = fc.oneof(utf8, fc.array(border, { maxLength: 4 }), fc.array(fc.nat(255), { maxLength: 3 }));
    fc.assert(
      fc.property(fc.array(piece, { maxLength: 12 }), (pieces) => {
        const bytes = pieces.flat();
        expect(pushAll(bytes).join('')).toBe(whole.decode(Uint8Array.from(bytes)));
      }),
      { numRuns: 1_000 },
    );
  });

  it('detokenizer - reads byte tokens and word borders of a SentencePiece vocabulary', () => {
    const spm = new TokenBytes(readVocabulary(sourceOf(spmMetadata())));
    const detokenizer = new Detokenizer(spm);
    const texts = [1, 264, 3 + 0xc3, 3 + 0xa9, 264, 2].map((token) => detokenizer.push(token));
    expect(texts).toEqual(['', ' hi', '', 'é', ' hi', '']);
  });
});
