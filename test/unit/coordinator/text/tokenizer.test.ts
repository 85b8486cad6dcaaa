import { Tokenizer as NativeTokenizer } from 'tokenizers';
import { describe, expect, it } from 'vitest';
import { Tokenizer } from '../../../../coordinator/text/tokenizer.ts';
import { readVocabulary, toTokenizerJson } from '../../../../coordinator/text/vocabulary.ts';
import { bpeMetadata, sourceOf, spmMetadata } from './small-vocabulary.ts';

const plain = { special: 'plain', addBos: false } as const;
const parse = { special: 'parse', addBos: false } as const;

/** Words, digits, punctuation, white space and other scripts in an order that a small generator picks; the same every time. */
function mixedText(characters: number, seed: number): string {
  const parts = [
    'hello',
    ' hello',
    "'s",
    "'LL",
    '12345',
    ' ',
    '  ',
    '\n',
    '\r\n\n',
    '!?',
    '…',
    '𝐀𝐁',
    'é',
    'e\u0301',
    '日本',
    '😀',
    '\u00a0',
    '"',
    '/',
  ];
  let state = seed;
  let text = '';
  while (text.length < characters) {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    text += parts[(state >>> 8) % parts.length] ?? '';
  }
  return text;
}

describe('tokenizer', () => {
  it('tokenizer - gives the same tokens for a long text in pieces as the library for the whole, with every rule', async () => {
    for (const [index, pre] of ['smollm', 'gpt-2', 'qwen2', 'llama-bpe', 'tekken', 'gpt-4o'].entries()) {
      const vocabulary = readVocabulary(sourceOf(bpeMetadata({ 'tokenizer.ggml.pre': pre })));
      const text = mixedText(36_000, index);
      const whole = await NativeTokenizer.fromString(JSON.stringify(toTokenizerJson(vocabulary))).encode(text, null, {
        addSpecialTokens: false,
      });
      expect(await new Tokenizer(vocabulary).encode(text, plain), pre).toEqual(whole.getIds());
    }
  });

  it('tokenizer - puts the parts of a very long word together in order', async () => {
    const tokenizer = new Tokenizer(readVocabulary(sourceOf(bpeMetadata())));
    const word = Array.from({ length: 100_000 }, (_, index) => String.fromCharCode(97 + (index % 7))).join('');
    expect(await tokenizer.encode(word, plain)).toEqual([...Buffer.from(word)]);
  });

  it('tokenizer - keeps many special tokens and the texts between them in order', async () => {
    const tokenizer = new Tokenizer(readVocabulary(sourceOf(bpeMetadata())));
    const ids = await tokenizer.encode('a<|im_end|>bc<|im_start|>'.repeat(1_000), parse);
    expect(ids).toEqual(Array.from({ length: 1_000 }, () => [97, 262, 98, 99, 261]).flat());
    expect(await tokenizer.encode('<|im_end|>'.repeat(70_000), parse)).toEqual(Array<number>(70_000).fill(262));
  });

  it('tokenizer - takes parts as they are: numbers are tokens, text is plain', async () => {
    const tokenizer = new Tokenizer(readVocabulary(sourceOf(bpeMetadata())));
    expect(await tokenizer.encodeParts([261, '<|im_end|>', '<tool>', 262])).toEqual([
      261,
      ...Buffer.from('<|im_end|>'),
      264,
      262,
    ]);
  });

  it('tokenizer - makes nothing of an empty text, and a replacement character of half a character', async () => {
    const tokenizer = new Tokenizer(readVocabulary(sourceOf(bpeMetadata())));
    expect(await tokenizer.encode('', plain)).toEqual([]);
    expect(await tokenizer.encode('\ud83d', plain)).toEqual([0xef, 0xbf, 0xbd]);
  });

  it('tokenizer - leaves a long SentencePiece text whole, so that only its front gets a space', async () => {
    const tokenizer = new Tokenizer(readVocabulary(sourceOf(spmMetadata())));
    expect(await tokenizer.encode('hi hi '.repeat(10_000), plain)).toEqual([...Array<number>(20_000).fill(264), 259]);
  });

  it('tokenizer - ends in time on texts made to keep a pattern busy', async () => {
    const tokenizer = new Tokenizer(readVocabulary(sourceOf(bpeMetadata({ 'tokenizer.ggml.pre': 'llama-bpe' }))));
    const started = performance.now();
    for (const text of [`${' '.repeat(200_000)}x`, '\n'.repeat(200_000), `${"'".repeat(200_000)}s`, '<|im_end|'.repeat(20_000)]) {
      expect((await tokenizer.encode(text, parse)).length).toBe(text.length);
    }
    expect(performance.now() - started).toBeLessThan(15_000);
  });
});
