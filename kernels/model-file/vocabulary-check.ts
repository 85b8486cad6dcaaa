/**
 * Checks of the tokenizer's arrays in a model file: types, and lengths against each other. What the tokenizer makes of them is not decided here; only that it
 * can index one array by another without surprises.
 */
import type { GgufFile, GgufScalarType } from './gguf-reader.ts';
import { ModelFileError, quoted } from './model-file-error.ts';

export const vocabularyLimits = {
  tokensMax: 1 << 20,
  tokenBytesMax: 16 * 1024,
  mergesMax: 1 << 21,
  mergeBytesMax: 32 * 1024,
} as const;

const tokensKey = 'tokenizer.ggml.tokens';

/** @throws {ModelFileError} `bad_value_type`, `bad_vocabulary` */
export function checkVocabulary(file: GgufFile): void {
  const tokens = file.getStringArray(tokensKey);
  if (!tokens) {
    for (const key of ['tokenizer.ggml.scores', 'tokenizer.ggml.token_type', 'tokenizer.ggml.merges'])
      if (file.has(key)) throw new ModelFileError('bad_vocabulary', `key ${key} is there but ${tokensKey} is not`, { key });
    return;
  }
  checkLength(tokensKey, tokens.length, vocabularyLimits.tokensMax);
  if (tokens.length === 0)
    throw new ModelFileError('bad_vocabulary', `key ${tokensKey} has no elements`, { key: tokensKey, value: 0 });
  checkTexts(tokensKey, tokens, vocabularyLimits.tokenBytesMax);
  checkParallel(file, 'tokenizer.ggml.scores', ['f32'], tokens.length);
  checkParallel(file, 'tokenizer.ggml.token_type', ['i32', 'u32'], tokens.length);
  const merges = file.getStringArray('tokenizer.ggml.merges');
  if (merges) {
    checkLength('tokenizer.ggml.merges', merges.length, vocabularyLimits.mergesMax);
    checkTexts('tokenizer.ggml.merges', merges, vocabularyLimits.mergeBytesMax);
  }
  for (const [key, found] of file.metadata) {
    if (!/^tokenizer\.ggml\.[a-z_]+_token_id$/.test(key)) continue;
    const id = file.getNumber(key);
    if (id === null || !Number.isInteger(id) || id < 0 || id >= tokens.length)
      throw new ModelFileError(
        'bad_vocabulary',
        `key ${key} is ${String(found.value)}, limit ${tokens.length - 1} (last token)`,
        {
          key,
          value: id ?? 0,
          limit: tokens.length - 1,
        },
      );
  }
}

function checkLength(key: string, length: number, limit: number): void {
  if (length > limit)
    throw new ModelFileError('bad_vocabulary', `key ${key} has ${length} elements, limit ${limit}`, {
      key,
      value: length,
      limit,
    });
}

function checkTexts(key: string, texts: readonly string[], limit: number): void {
  texts.forEach((text, index) => {
    // A UTF-16 unit is at most 3 bytes of UTF-8, so most texts need not be measured.
    if (text.length * 3 <= limit) return;
    const bytes = Buffer.byteLength(text);
    if (bytes > limit)
      throw new ModelFileError(
        'bad_vocabulary',
        `element ${index} of ${key} (${quoted(text)}) has ${bytes} bytes, limit ${limit}`,
        {
          key,
          value: bytes,
          limit,
        },
      );
  });
}

function checkParallel(file: GgufFile, key: string, types: readonly GgufScalarType[], length: number): void {
  const found = file.metadata.get(key);
  if (!found) return;
  if (found.type !== 'array' || !types.includes(found.elements)) {
    const type = found.type === 'array' ? `array of ${found.elements}` : found.type;
    throw new ModelFileError('bad_value_type', `key ${key} has type ${type}, an array of ${types.join(' or ')} is needed`, {
      key,
      value: type,
      limit: types.join(' or '),
    });
  }
  if (found.value.length !== length)
    throw new ModelFileError('bad_vocabulary', `key ${key} has ${found.value.length} elements, ${tokensKey} has ${length}`, {
      key,
      value: found.value.length,
      limit: length,
    });
  if (found.elements === 'f32' && (found.value as Float32Array).some((score) => !Number.isFinite(score)))
    throw new ModelFileError('bad_vocabulary', `key ${key} has an element that is not finite`, { key });
}
