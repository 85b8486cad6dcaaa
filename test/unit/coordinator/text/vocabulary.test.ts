import * as scriptTokenizers from '@huggingface/tokenizers';
import { Tokenizer as NativeTokenizer } from 'tokenizers';
import { describe, expect, it } from 'vitest';
import { preTokenizerNames, readVocabulary, toTokenizerJson } from '../../../../coordinator/text/vocabulary.ts';
import { bpeMetadata, sourceOf, spmMetadata } from './small-vocabulary.ts';
import type { Metadata } from './small-vocabulary.ts';

/** The types of that package do not resolve in an ES module. */
const { Tokenizer: ScriptTokenizer } = scriptTokenizers as unknown as {
  Tokenizer: new (json: object, config: object) => { encode(text: string, options: object): { ids: number[] } };
};

const read = (metadata: Metadata) => readVocabulary(sourceOf(metadata));
const problem = (metadata: Metadata): string => {
  try {
    read(metadata);
  } catch (error) {
    return `${(error as { code: string }).code}: ${(error as Error).message}`;
  }
  return 'none';
};
const without = (metadata: Metadata, key: string): Metadata => ({ ...metadata, [key]: undefined });

const texts = [
  "don't DON'T we'll  \n\n x1234567 ½ ⅓ ²³ ٣٤",
  'Привет, как дела? 日本語のテキスト naïve café',
  'for(let i=0;i<10;i++){console.log(`${i}`);}\r\n\t// 😀👩‍👩‍👧‍👦',
  '   leading, trailing   ',
  'MixedCASE CamelCaseWords ALLCAPS/path/to\n\n/file',
  'a\u0301 combining, \u200bzero width',
];

describe('vocabulary', () => {
  it('vocabulary - cuts words as the pattern of each pre-tokenizer says', () => {
    const words = (pre: string, text: string): string[] => {
      const json = toTokenizerJson(read(bpeMetadata({ 'tokenizer.ggml.pre': pre })));
      const cut = NativeTokenizer.fromString(JSON.stringify(json)).getPreTokenizer()?.preTokenizeString(text) ?? [];
      return cut.map(([word]) => word.replaceAll('Ġ', '_'));
    };
    expect(words('smollm', "it's 123 a")).toEqual(['it', "'s", '_', '1', '2', '3', '_a']);
    expect(words('gpt-2', "it's 123  a")).toEqual(['it', "'s", '_123', '_', '_a']);
    expect(words('qwen2', "IT'S 12 a!\n")).toEqual(['IT', "'S", '_', '1', '2', '_a', '!Ċ']);
    expect(words('llama-bpe', '12345 (a)')).toEqual(['123', '45', '_(', 'a', ')']);
    expect(words('tekken', 'CamelCase 12')).toEqual(['Camel', 'Case', '_', '1', '2']);
    expect(words('gpt-4o', "CamelCase's 1234")).toEqual(['Camel', "Case's", '_', '123', '4']);
  });

  it('vocabulary - gives the same tokens in the script implementation, with every pre-tokenizer', async () => {
    for (const pre of preTokenizerNames) {
      // That implementation has no inline flags; what they cover is spelled out.
      const json = JSON.parse(
        JSON.stringify(toTokenizerJson(read(bpeMetadata({ 'tokenizer.ggml.pre': pre })))).replaceAll(
          "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
          "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
        ),
      ) as object;
      const native = NativeTokenizer.fromString(JSON.stringify(json));
      const script = new ScriptTokenizer(json, {});
      for (const text of texts) {
        const ids = (await native.encode(text, null, { addSpecialTokens: false })).getIds();
        expect({ pre, text, ids: script.encode(text, { add_special_tokens: false }).ids }).toEqual({ pre, text, ids });
      }
    }
  });

  it('vocabulary - leaves special tokens out of what text can become', () => {
    const json = toTokenizerJson(read(bpeMetadata())) as { model: { vocab: Record<string, number> } };
    expect(Object.keys(json.model.vocab)).toHaveLength(261);
    expect(json.model.vocab['<|im_end|>']).toBeUndefined();
  });

  it('vocabulary - drops a merge that leads to a special token', () => {
    const types = [...Array<number>(261).fill(1), 3, 3, 3, 4, 3];
    types[259] = 3;
    const json = toTokenizerJson(
      read(bpeMetadata({ 'tokenizer.ggml.token_type': types, 'tokenizer.ggml.merges': ['h e', 'l l', 'he ll', 'hell o'] })),
    );
    expect((json as { model: { merges: unknown } }).model.merges).toEqual([
      ['h', 'e'],
      ['l', 'l'],
      ['he', 'll'],
    ]);
  });

  it('vocabulary - counts user-defined tokens that border a chat as special', () => {
    const types = [...Array<number>(261).fill(1), 4, 4, 4, 4, 4];
    const vocabulary = read(bpeMetadata({ 'tokenizer.ggml.token_type': types }));
    expect([...vocabulary.types.slice(261)]).toEqual([3, 3, 3, 4, 4]);
  });

  it('vocabulary - derives the merges of a SentencePiece vocabulary from its scores', () => {
    // ▁hi (-1): ▁h + i before ▁ + hi (longer left part); then ▁h (-2), then hi (-3).
    expect(read(spmMetadata()).merges).toEqual([
      ['▁h', 'i'],
      ['▁', 'hi'],
      ['▁', 'h'],
      ['h', 'i'],
    ]);
  });

  it('vocabulary - refuses unknown kinds and pre-tokenizers by name', () => {
    expect(problem({})).toMatch(/^model_invalid: tokenizer\.ggml\.model is missing/);
    expect(problem(bpeMetadata({ 'tokenizer.ggml.model': 'rwkv' }))).toBe(
      'model_invalid: tokenizer.ggml.model is "rwkv"; known are "gpt2" (byte-level BPE) and "llama" (SentencePiece).',
    );
    expect(problem(bpeMetadata({ 'tokenizer.ggml.pre': 'superbpe' }))).toMatch(
      /^model_invalid: tokenizer\.ggml\.pre is "superbpe"; known are smollm, /,
    );
    expect(problem(bpeMetadata({ 'tokenizer.ggml.pre': 'constructor' }))).toMatch(
      /tokenizer\.ggml\.pre is "constructor"; known are/,
    );
    expect(problem(without(bpeMetadata(), 'tokenizer.ggml.pre'))).toMatch(/tokenizer\.ggml\.pre is missing/);
  });

  it('vocabulary - checks counts against each other', () => {
    expect(problem(bpeMetadata({ 'tokenizer.ggml.token_type': [1, 1] }))).toBe(
      'model_invalid: tokenizer.ggml.token_type has 2 entries and tokenizer.ggml.tokens has 266; they must be equal.',
    );
    expect(problem(spmMetadata({ 'tokenizer.ggml.scores': new Float32Array(3) }))).toBe(
      'model_invalid: tokenizer.ggml.scores has 3 entries and tokenizer.ggml.tokens has 265; they must be equal.',
    );
    expect(problem(without(bpeMetadata(), 'tokenizer.ggml.merges'))).toMatch(/tokenizer\.ggml\.merges is missing/);
    expect(problem(without(spmMetadata(), 'tokenizer.ggml.scores'))).toMatch(/tokenizer\.ggml\.scores is missing/);
    expect(problem(bpeMetadata({ 'tokenizer.ggml.tokens': [] }))).toMatch(/tokenizer\.ggml\.tokens is missing or empty/);
  });

  it('vocabulary - checks every value it indexes with', () => {
    expect(problem(bpeMetadata({ 'tokenizer.ggml.eos_token_id': 266 }))).toBe(
      'model_invalid: tokenizer.ggml.eos_token_id is 266; the vocabulary has 266 tokens, 0 to 265.',
    );
    expect(problem(bpeMetadata({ 'tokenizer.ggml.merges': ['h e', 'x yz'] }))).toBe(
      'model_invalid: tokenizer.ggml.merges[1] is "x yz", but "yz" is not in tokenizer.ggml.tokens.',
    );
    expect(problem(bpeMetadata({ 'tokenizer.ggml.merges': ['he'] }))).toMatch(
      /tokenizer\.ggml\.merges\[0\] is "he"; it must be two tokens/,
    );
    expect(problem(bpeMetadata({ 'tokenizer.ggml.token_type': [...Array<number>(265).fill(1), 9] }))).toMatch(
      /token_type\[265\] is 9; it must be/,
    );
    const scores = new Float32Array(265);
    scores[262] = Number.NaN;
    expect(problem(spmMetadata({ 'tokenizer.ggml.scores': scores }))).toMatch(
      /tokenizer\.ggml\.scores\[262\] is NaN; it must be a finite number/,
    );
  });

  it('vocabulary - refuses tokens that are too long or come twice', () => {
    const tokens = bpeMetadata()['tokenizer.ggml.tokens'] as string[];
    expect(problem(bpeMetadata({ 'tokenizer.ggml.tokens': [...tokens.slice(0, 265), 'é'.repeat(8_193)] }))).toBe(
      'model_invalid: tokenizer.ggml.tokens[265] is 16386 bytes long; the limit is 16384.',
    );
    expect(problem(bpeMetadata({ 'tokenizer.ggml.tokens': [...tokens.slice(0, 265), 'he'] }))).toBe(
      'model_invalid: tokenizer.ggml.tokens: 256 and 265 are both "he"; tokens must be distinct.',
    );
  });

  it('vocabulary - refuses pieces made to keep the derivation of merges busy', () => {
    const bomb = Array.from({ length: 20 }, (_, index) => '▁'.repeat(5_000 + index));
    const metadata = spmMetadata();
    const tokens = [...(metadata['tokenizer.ggml.tokens'] as string[]), ...bomb];
    const types = [...(metadata['tokenizer.ggml.token_type'] as number[]), ...bomb.map(() => 1)];
    const scores = new Float32Array(tokens.length);
    expect(
      problem({
        ...metadata,
        'tokenizer.ggml.tokens': tokens,
        'tokenizer.ggml.token_type': types,
        'tokenizer.ggml.scores': scores,
      }),
    ).toMatch(/deriving merges needs more than 268435456 character steps/);
  });

  it('vocabulary - names the key and the type of a value of another type', () => {
    expect(problem(bpeMetadata({ 'tokenizer.ggml.tokens': [1, 2] }))).toBe(
      'model_invalid: tokenizer.ggml.tokens is a list of 2 entries (number …); it must be a list of strings.',
    );
    expect(problem(bpeMetadata({ 'tokenizer.ggml.model': 7 }))).toBe(
      'model_invalid: tokenizer.ggml.model is 7; it must be a string.',
    );
  });
});
