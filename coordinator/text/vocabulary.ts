/**
 * The vocabulary of a GGUF model file, checked, and as the `tokenizer.json` object that the tokenizer library reads.
 *
 * Only tokens that ordinary text may become are given to the library. Special tokens are left out of its vocabulary altogether, so no text can
 * ever merge into one: finding them in a text is our own, explicit work (`special-tokens.ts`).
 */
import { ShardmeshError } from '../../protocol/errors.ts';

/** Metadata of a model file by key; `GgufFile` is one. null = the key is absent; another type than asked for is an error that names the key. */
export interface VocabularySource {
  getString(key: string): string | null;
  getNumber(key: string): number | null;
  getBoolean(key: string): boolean | null;
  getStringArray(key: string): readonly string[] | null;
  getNumberArray(key: string): ArrayLike<number> | null;
}

/** Numbers of `tokenizer.ggml.token_type`. */
export const tokenTypes = { normal: 1, unknown: 2, control: 3, userDefined: 4, unused: 5, byte: 6 } as const;

export const vocabularyLimits = {
  tokensMax: 1 << 20,
  mergesMax: 4 << 20,
  tokenBytesMax: 16 * 1024,
  /** Characters hashed while merges are derived from scores; 32,000 ordinary pieces need about 1.5 million. */
  mergeWorkMax: 256 << 20,
} as const;

export interface Vocabulary {
  /** 'bpe': byte-level BPE with a list of merges; 'spm': SentencePiece, merges by score, with byte tokens. */
  kind: 'bpe' | 'spm';
  /** Name of the pre-tokenizer ('bpe' only). */
  preTokenizer: string | null;
  tokens: readonly string[];
  /** One of `tokenTypes` each. User-defined tokens that mark the borders of a chat are counted as control tokens. */
  types: Uint8Array;
  /** 'bpe': pairs in the order of their rank. 'spm': derived from the scores. */
  merges: readonly (readonly [string, string])[];
  bosToken: number | null;
  /** Tokens that end a generation: eos, eot, eom and the well-known end tokens that the vocabulary holds as special tokens. Ascending. */
  endTokens: readonly number[];
  eosToken: number | null;
  unknownToken: number | null;
  paddingToken: number | null;
  /** The model file asks for BOS in front of every text. */
  addBos: boolean;
  /** 'spm' only: a space is put in front of a text before it is cut into pieces. */
  addSpacePrefix: boolean;
}

/** Tokens that end a turn, by the spelling that model makers gave them. */
const endTokenNames = new Set([
  '</s>',
  '<|endoftext|>',
  '<|end_of_text|>',
  '<|im_end|>',
  '<|eot_id|>',
  '<|eom_id|>',
  '<|end|>',
  '<|return|>',
  '<|call|>',
  '<|end_of_turn|>',
  '<end_of_turn>',
  '<end_of_utterance>',
  '<|end▁of▁sentence|>',
  '<｜end▁of▁sentence｜>',
  '<EOT>',
  '[EOT]',
  '[EOS]',
]);

/** Some converters call the border tokens of a chat user-defined. Text that spells them must stay text, so they count as control tokens. */
const spelledLikeControl = /^<[|｜][^|｜]*[|｜]>$/u;

/**
 * Reads and checks the vocabulary.
 * @throws {ShardmeshError} `model_invalid`, naming key, value and limit
 */
export function readVocabulary(source: VocabularySource): Vocabulary {
  const model = source.getString('tokenizer.ggml.model');
  if (model === null)
    throw invalid('tokenizer.ggml.model is missing: the file has no vocabulary. Take a file with an embedded tokenizer');
  if (model !== 'gpt2' && model !== 'llama') {
    throw invalid(`tokenizer.ggml.model is ${quote(model)}; known are "gpt2" (byte-level BPE) and "llama" (SentencePiece)`);
  }
  const tokens = readTokens(source);
  const types = readTypes(source, tokens);
  const ids = indexTokens(tokens);
  const kind = model === 'gpt2' ? 'bpe' : 'spm';
  const readId = (name: string): number | null => readTokenId(source, name, tokens.length);
  const bosToken = readId('bos');
  const eosToken = readId('eos');
  const endTokens = new Set<number>();
  for (const id of [eosToken, readId('eot'), readId('eom')]) if (id !== null) endTokens.add(id);
  for (const name of endTokenNames) {
    const id = ids.get(name);
    if (id !== undefined && types[id] === tokenTypes.control) endTokens.add(id);
  }
  return {
    kind,
    preTokenizer: kind === 'bpe' ? readPreTokenizer(source) : null,
    tokens,
    types,
    merges: kind === 'bpe' ? readMerges(source, ids) : deriveMerges(source, tokens, types),
    bosToken,
    eosToken,
    unknownToken: readId('unknown'),
    paddingToken: readId('padding'),
    endTokens: [...endTokens].sort((a, b) => a - b),
    addBos: bosToken !== null && (source.getBoolean('tokenizer.ggml.add_bos_token') ?? kind === 'spm'),
    addSpacePrefix: kind === 'spm' && (source.getBoolean('tokenizer.ggml.add_space_prefix') ?? true),
  };
}

/** A token that ordinary text never becomes and that `decode` leaves out: control, unknown, unused. */
export function isSpecialType(type: number | undefined): boolean {
  return type === tokenTypes.control || type === tokenTypes.unknown || type === tokenTypes.unused;
}

/** The object that a `tokenizer.json` file would hold. Special and user-defined tokens are not in it. */
export function toTokenizerJson(vocabulary: Vocabulary): object {
  const { kind, tokens, types } = vocabulary;
  const vocab: Record<string, number> = Object.create(null) as Record<string, number>;
  tokens.forEach((token, id) => {
    if (types[id] === tokenTypes.normal || types[id] === tokenTypes.byte) vocab[token] = id;
  });
  // A merge may lead through a token that is matched as a whole elsewhere; one that leads to a special token is dropped.
  const ids = indexTokens(tokens);
  const merges = vocabulary.merges.filter(([left, right]) => {
    const parts = [left, right, left + right];
    if (parts.some((part) => isSpecialType(types[ids.get(part) ?? -1]))) return false;
    for (const part of parts) vocab[part] = ids.get(part) ?? 0;
    return true;
  });
  const rules = kind === 'bpe' ? preTokenizers[vocabulary.preTokenizer ?? ''] : undefined;
  return {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: [],
    normalizer: kind === 'spm' ? spmNormalizer(vocabulary.addSpacePrefix) : null,
    pre_tokenizer: rules === undefined ? null : preTokenizerJson(rules),
    post_processor: null,
    decoder: null,
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: kind === 'spm',
      byte_fallback: kind === 'spm',
      ignore_merges: rules?.wholeWords ?? false,
      vocab,
      merges,
    },
  };
}

/** Adapts anything that gives metadata by key. */
export function vocabularySource(get: (key: string) => unknown): VocabularySource {
  const read = <T>(key: string, type: string, accepts: (value: unknown) => boolean): T | null => {
    const value = get(key);
    if (value === undefined || value === null) return null;
    if (!accepts(value)) throw invalid(`${key} is ${describe(value)}; it must be ${type}`);
    return value as T;
  };
  return {
    getString: (key) => read(key, 'a string', (value) => typeof value === 'string'),
    getBoolean: (key) => read(key, 'true or false', (value) => typeof value === 'boolean'),
    getNumber: (key) => {
      const value = read<number | bigint>(
        key,
        'a number',
        (candidate) => typeof candidate === 'number' || typeof candidate === 'bigint',
      );
      return value === null ? null : Number(value);
    },
    getStringArray: (key) =>
      read(key, 'a list of strings', (value) => Array.isArray(value) && value.every((entry) => typeof entry === 'string')),
    getNumberArray: (key) => read(key, 'a list of numbers', isNumberList),
  };
}

// --- pre-tokenizers

interface PreTokenizerRules {
  /** Splits applied one after another: every match of a pattern becomes a piece of its own. */
  patterns: readonly string[];
  /** A piece that is a token as it stands is taken whole, before any merge. */
  wholeWords?: boolean;
}

const gpt2Pattern = String.raw`'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`;
/** The pattern that GPT-4 introduced, by the most digits that it keeps together. */
const contractionsPattern = (digits: string): string =>
  String.raw`(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|${digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`;
/** Words cut where the case changes: o200k and tekken. */
const casedPattern = (suffix: string, digits: string): string => {
  const upper = String.raw`[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]`;
  const lower = String.raw`[\p{Ll}\p{Lm}\p{Lo}\p{M}]`;
  const lead = String.raw`[^\r\n\p{L}\p{N}]?`;
  return (
    `${lead}${upper}*${lower}+${suffix}|${lead}${upper}+${lower}*${suffix}|` +
    String.raw`${digits}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+`
  );
};

const singleDigits: PreTokenizerRules = { patterns: [String.raw`\p{N}`, gpt2Pattern] };
/**
 * Decimal digits only are set apart: with them the reference figures of SmolLM2 are met, in which `⅓` stays with the space before it. Its vocabulary has no token of
 * two digits, so nothing but such characters (fractions, superscripts, Roman numerals) can tell this rule from `singleDigits`.
 */
const smollm: PreTokenizerRules = { patterns: [String.raw`\p{Nd}`, gpt2Pattern] };
const gpt2: PreTokenizerRules = { patterns: [gpt2Pattern] };
const llama3: PreTokenizerRules = { patterns: [contractionsPattern(String.raw`\p{N}{1,3}`)], wholeWords: true };
const cl100k: PreTokenizerRules = { patterns: [contractionsPattern(String.raw`\p{N}{1,3}`)] };
const qwen2: PreTokenizerRules = { patterns: [contractionsPattern(String.raw`\p{N}`)] };

/**
 * Rules by the name in `tokenizer.ggml.pre`. Only those that can be stated exactly: a wrong rule gives wrong tokens without any error.
 * In all of them a letter or digit is never in one piece with a following character that is neither letter, digit, mark nor apostrophe;
 * `tokenizer.ts` cuts long texts there.
 */
const preTokenizers: Readonly<Record<string, PreTokenizerRules>> = Object.assign(
  Object.create(null) as Record<string, PreTokenizerRules>,
  {
    smollm,
    starcoder: singleDigits,
    refact: singleDigits,
    codeshell: singleDigits,
    'gpt-2': gpt2,
    'phi-2': gpt2,
    olmo: gpt2,
    'llama-bpe': llama3,
    llama3,
    'llama-v3': llama3,
    falcon3: llama3,
    dbrx: cl100k,
    'smaug-bpe': cl100k,
    qwen2,
    'deepseek-r1-qwen': qwen2,
    tekken: { patterns: [casedPattern('', String.raw`\p{N}`)], wholeWords: true },
    'gpt-4o': { patterns: [casedPattern(String.raw`(?i:'s|'t|'re|'ve|'m|'ll|'d)?`, String.raw`\p{N}{1,3}`)] },
  },
);

export const preTokenizerNames: readonly string[] = Object.keys(preTokenizers);

function preTokenizerJson(rules: PreTokenizerRules): object {
  return {
    type: 'Sequence',
    pretokenizers: [
      ...rules.patterns.map((pattern) => ({ type: 'Split', pattern: { Regex: pattern }, behavior: 'Isolated', invert: false })),
      { type: 'ByteLevel', add_prefix_space: false, trim_offsets: false, use_regex: false },
    ],
  };
}

function spmNormalizer(addSpacePrefix: boolean): object {
  const replace = { type: 'Replace', pattern: { String: ' ' }, content: '▁' };
  return addSpacePrefix ? { type: 'Sequence', normalizers: [{ type: 'Prepend', prepend: '▁' }, replace] } : replace;
}

// --- reading

function readTokens(source: VocabularySource): readonly string[] {
  const key = 'tokenizer.ggml.tokens';
  const tokens = source.getStringArray(key);
  if (tokens === null || tokens.length === 0) throw invalid(`${key} is missing or empty: the file has no vocabulary`);
  if (tokens.length > vocabularyLimits.tokensMax) {
    throw invalid(`${key} has ${tokens.length} entries; the limit is ${vocabularyLimits.tokensMax}`);
  }
  tokens.forEach((token, id) => {
    // A UTF-16 unit is at most 3 bytes, so short tokens need no counting.
    if (token.length * 3 <= vocabularyLimits.tokenBytesMax) return;
    const bytes = Buffer.byteLength(token);
    if (bytes > vocabularyLimits.tokenBytesMax) {
      throw invalid(`${key}[${id}] is ${bytes} bytes long; the limit is ${vocabularyLimits.tokenBytesMax}`);
    }
  });
  return tokens;
}

function readTypes(source: VocabularySource, tokens: readonly string[]): Uint8Array {
  const key = 'tokenizer.ggml.token_type';
  const given = source.getNumberArray(key);
  const types = new Uint8Array(tokens.length).fill(tokenTypes.normal);
  if (given === null) return types;
  if (given.length !== tokens.length) {
    throw invalid(`${key} has ${given.length} entries and tokenizer.ggml.tokens has ${tokens.length}; they must be equal`);
  }
  for (let id = 0; id < tokens.length; id++) {
    const type = given[id] ?? 0;
    if (!Number.isInteger(type) || type < tokenTypes.normal || type > tokenTypes.byte) {
      throw invalid(`${key}[${id}] is ${type}; it must be a whole number from ${tokenTypes.normal} to ${tokenTypes.byte}`);
    }
    const token = tokens[id] ?? '';
    const isControl = type === tokenTypes.userDefined && (spelledLikeControl.test(token) || endTokenNames.has(token));
    types[id] = isControl ? tokenTypes.control : type;
  }
  return types;
}

function indexTokens(tokens: readonly string[]): Map<string, number> {
  const ids = new Map<string, number>();
  tokens.forEach((token, id) => {
    if (token === '') return;
    const first = ids.get(token);
    if (first !== undefined)
      throw invalid(`tokenizer.ggml.tokens: ${first} and ${id} are both ${quote(token)}; tokens must be distinct`);
    ids.set(token, id);
  });
  return ids;
}

function readTokenId(source: VocabularySource, name: string, tokenCount: number): number | null {
  const key = `tokenizer.ggml.${name}_token_id`;
  const id = source.getNumber(key);
  if (id === null) return null;
  if (!Number.isInteger(id) || id < 0 || id >= tokenCount) {
    // Writers that have no such token store all ones.
    if (id === 0xffff_ffff) return null;
    throw invalid(`${key} is ${id}; the vocabulary has ${tokenCount} tokens, 0 to ${tokenCount - 1}`);
  }
  return id;
}

function readPreTokenizer(source: VocabularySource): string {
  const key = 'tokenizer.ggml.pre';
  const name = source.getString(key);
  const known = `known are ${preTokenizerNames.join(', ')}`;
  if (name === null) {
    throw invalid(
      `${key} is missing, so the rules that cut text into words are not known (${known}). Convert the model again with a newer converter`,
    );
  }
  if (preTokenizers[name] === undefined) throw invalid(`${key} is ${quote(name)}; ${known}`);
  return name;
}

function readMerges(source: VocabularySource, ids: Map<string, number>): [string, string][] {
  const key = 'tokenizer.ggml.merges';
  const merges = source.getStringArray(key);
  if (merges === null) throw invalid(`${key} is missing: a "gpt2" vocabulary needs its merges`);
  if (merges.length > vocabularyLimits.mergesMax) {
    throw invalid(`${key} has ${merges.length} entries; the limit is ${vocabularyLimits.mergesMax}`);
  }
  return merges.map((merge, rank) => {
    // The first character is never the separator: a token may begin with a space.
    const space = merge.indexOf(' ', 1);
    if (space === -1 || space === merge.length - 1)
      throw invalid(`${key}[${rank}] is ${quote(merge)}; it must be two tokens with a space between`);
    const left = merge.slice(0, space);
    const right = merge.slice(space + 1);
    for (const part of [left, right, left + right]) {
      if (!ids.has(part)) throw invalid(`${key}[${rank}] is ${quote(merge)}, but ${quote(part)} is not in tokenizer.ggml.tokens`);
    }
    return [left, right];
  });
}

/**
 * The merges of a SentencePiece vocabulary: each way of cutting a piece into two pieces, best score first. Of equal scores the longer left part first,
 * then the longer right part, then the order of the vocabulary; so they rank as in the converter of Hugging Face transformers.
 */
function deriveMerges(source: VocabularySource, tokens: readonly string[], types: Uint8Array): [string, string][] {
  const key = 'tokenizer.ggml.scores';
  const scores = source.getNumberArray(key);
  if (scores === null) throw invalid(`${key} is missing: a "llama" vocabulary needs its scores`);
  if (scores.length !== tokens.length) {
    throw invalid(`${key} has ${scores.length} entries and tokenizer.ggml.tokens has ${tokens.length}; they must be equal`);
  }
  const pieces = new Map<string, number>();
  const bytesSeen = new Set<string>();
  tokens.forEach((token, id) => {
    if (types[id] === tokenTypes.normal) pieces.set(token, id);
    if (types[id] === tokenTypes.byte) {
      if (byteOfToken(token) === null)
        throw invalid(`tokenizer.ggml.tokens[${id}] is ${quote(token)} and typed as a byte; a byte is spelled <0x00> to <0xFF>`);
      bytesSeen.add(token);
    }
  });
  if (bytesSeen.size !== 256) {
    throw invalid(
      `tokenizer.ggml.tokens has ${bytesSeen.size} byte tokens (<0x00> to <0xFF>); a "llama" vocabulary needs all 256`,
    );
  }
  const merges: { left: string; right: string; score: number; leftId: number; rightId: number }[] = [];
  let work = 0;
  for (const [piece, id] of pieces) {
    const score = scores[id] ?? 0;
    if (!Number.isFinite(score)) throw invalid(`${key}[${id}] is ${score}; it must be a finite number`);
    work += piece.length * piece.length;
    if (work > vocabularyLimits.mergeWorkMax) {
      throw invalid(
        `tokenizer.ggml.tokens: deriving merges needs more than ${vocabularyLimits.mergeWorkMax} character steps; the tokens are too long`,
      );
    }
    const local: typeof merges = [];
    for (let cut = 1; cut < piece.length; cut++) {
      const left = piece.slice(0, cut);
      const leftId = pieces.get(left);
      if (leftId === undefined) continue;
      const right = piece.slice(cut);
      const rightId = pieces.get(right);
      if (rightId !== undefined) local.push({ left, right, score, leftId, rightId });
    }
    local.sort((a, b) => a.leftId - b.leftId || a.rightId - b.rightId);
    merges.push(...local);
    if (merges.length > vocabularyLimits.mergesMax)
      throw invalid(`tokenizer.ggml.tokens gives more than ${vocabularyLimits.mergesMax} merges`);
  }
  merges.sort((a, b) => b.score - a.score || b.left.length - a.left.length || b.right.length - a.right.length);
  return merges.map(({ left, right }) => [left, right]);
}

/** 0x41 for `<0x41>`; `null` for any other text. */
export function byteOfToken(token: string): number | null {
  const match = /^<0x([0-9A-F]{2})>$/.exec(token);
  return match === null ? null : parseInt(match[1] ?? '', 16);
}

// --- errors

function invalid(message: string): ShardmeshError {
  return new ShardmeshError('model_invalid', `${message}.`);
}

/** A text for an error message: JSON, at most 64 characters of it. */
function quote(text: string): string {
  return JSON.stringify(text.length <= 64 ? text : `${text.slice(0, 64)}…`);
}

function describe(value: unknown): string {
  if (typeof value === 'string') return quote(value);
  if (Array.isArray(value))
    return `a list of ${value.length} entries (${[...new Set(value.slice(0, 8).map((entry) => typeof entry))].join(', ')} …)`;
  if (typeof value === 'number' || typeof value === 'boolean') return String(value);
  return `a value of type ${typeof value}`;
}

function isNumberList(value: unknown): boolean {
  if (Array.isArray(value)) return value.every((entry) => typeof entry === 'number');
  return (
    ArrayBuffer.isView(value) && !(value instanceof DataView || value instanceof BigInt64Array || value instanceof BigUint64Array)
  );
}
