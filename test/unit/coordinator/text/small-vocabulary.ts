/** Vocabularies of a few tokens whose ids a reader can check by hand. */
import { vocabularySource } from '../../../../coordinator/text/vocabulary.ts';
import type { VocabularySource } from '../../../../coordinator/text/vocabulary.ts';

export type Metadata = Record<string, unknown>;

/** The byte-level alphabet in the order of the bytes: byte b is token b. */
export const byteAlphabet: readonly string[] = (() => {
  const alphabet: string[] = [];
  let next = 0x100;
  for (let byte = 0; byte < 256; byte++) {
    const isPrintable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    alphabet.push(String.fromCharCode(isPrintable ? byte : next++));
  }
  return alphabet;
})();

/** Bytes 0..255, then `he` 256, `ll` 257, `hell` 258, `hello` 259, `Ġhello` 260, <|im_start|> 261, <|im_end|> 262, <|endoftext|> 263, <tool> 264, <|im_end|>x 265. */
export function bpeMetadata(changes: Metadata = {}): Metadata {
  const extra = ['he', 'll', 'hell', 'hello', 'Ġhello'];
  const special = ['<|im_start|>', '<|im_end|>', '<|endoftext|>', '<tool>', '<|im_end|>x'];
  return {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'gpt-2',
    'tokenizer.ggml.tokens': [...byteAlphabet, ...extra, ...special],
    'tokenizer.ggml.token_type': [...Array<number>(261).fill(1), 3, 3, 3, 4, 3],
    'tokenizer.ggml.merges': ['h e', 'l l', 'he ll', 'hell o', 'Ġ hello'],
    'tokenizer.ggml.bos_token_id': 261,
    'tokenizer.ggml.eos_token_id': 262,
    ...changes,
  };
}

/** `<unk>` 0, `<s>` 1, `</s>` 2, bytes <0x00> 3 to <0xFF> 258, then ▁ 259, h 260, i 261, ▁h 262, hi 263, ▁hi 264. */
export function spmMetadata(changes: Metadata = {}): Metadata {
  const bytes = Array.from({ length: 256 }, (_, byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`);
  return {
    'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.tokens': ['<unk>', '<s>', '</s>', ...bytes, '▁', 'h', 'i', '▁h', 'hi', '▁hi'],
    'tokenizer.ggml.token_type': [2, 3, 3, ...Array<number>(256).fill(6), 1, 1, 1, 1, 1, 1],
    'tokenizer.ggml.scores': new Float32Array([...Array<number>(259).fill(0), -5, -6, -7, -2, -3, -1]),
    'tokenizer.ggml.bos_token_id': 1,
    'tokenizer.ggml.eos_token_id': 2,
    'tokenizer.ggml.unknown_token_id': 0,
    ...changes,
  };
}

export function sourceOf(metadata: Metadata): VocabularySource {
  return vocabularySource((key) => metadata[key]);
}
