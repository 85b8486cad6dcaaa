/**
 * `ModelFacts`: all a worker has to know of a model file to build its program and to find its slice, without the file: architecture, hyper-parameters,
 * tensor directory, digest. Plain JSON; it travels in `assign` and is checked where it arrives. Tokenizer data is not in it.
 *
 * Hyper-parameters are read by the names that all GGUF files share (`<architecture>.embedding_length` ...); what they mean for the computation is said in
 * `programs/`, one file an architecture.
 */
import type { TensorType } from '../programs/program.ts';
import { checkArchitecture } from '../programs/index.ts';
import { ggufLimits, type GgufFile } from './gguf-reader.ts';
import { ModelFileError, quoted } from './model-file-error.ts';
import { isTensorType, quantType } from './quant-types.ts';

export interface TensorFacts {
  name: string;
  type: TensorType;
  /** [values], [columns, rows], ...: the contiguous dimension first. */
  shape: number[];
  /** From the start of the file. */
  offset: number;
  bytes: number;
}

export interface ModelFacts {
  /** Raised when a field changes its meaning. */
  version: 1;
  architecture: string;
  /** The model's own name, for people. */
  name: string;
  /** sha256 of the whole file, lower-case hex. */
  sourceSha256: string;
  sourceBytes: number;
  layers: number;
  hiddenSize: number;
  heads: number;
  kvHeads: number;
  headSize: number;
  feedForwardSize: number;
  vocabularySize: number;
  contextTokensMax: number;
  normEpsilon: number;
  /** `scale` multiplies positions: 1 / factor of a linear scaling, else 1. */
  rope: { base: number; dimensions: number; scale: number };
  /** Tokens a query sees; null: the whole context. */
  slidingWindow: number | null;
  tensors: TensorFacts[];
}

const limits = {
  layersMax: 1_024,
  sizeMax: 1 << 20,
  headsMax: 4_096,
  headSizeMax: 1_024,
  contextMax: 1 << 24,
  vocabularyMax: 1 << 20,
  nameCharactersMax: 256,
} as const;

/** Keys that change what an attention or feed-forward block computes, with the value at which they change nothing. */
const neutralKeys: readonly [string, number][] = [
  ['expert_count', 0],
  ['attn_logit_softcapping', 0],
  ['final_logit_softcapping', 0],
  ['attention.scale', 0],
  ['attention.clamp_kqv', 0],
  ['attention.max_alibi_bias', 0],
  ['logit_scale', 1],
  ['embedding_scale', 1],
  ['residual_scale', 1],
];

/**
 * Facts of a file that has been read. What the architecture makes of them is checked by `checkModel` of `programs/index.ts`.
 * @param sourceSha256 digest of the whole file
 * @throws {ModelFileError} `unknown_architecture`, `missing_key`, `bad_value`, `bad_value_type`, `unsupported`, `inconsistent`
 */
export function readModelFacts(file: GgufFile, sourceSha256: string): ModelFacts {
  const architecture = file.getString('general.architecture');
  if (architecture === null) throw missing('general.architecture');
  if (!/^[a-z0-9_-]{1,64}$/.test(architecture))
    throw new ModelFileError('bad_value', `key general.architecture is ${quoted(architecture)}, which is not a name`, {
      key: 'general.architecture',
      value: architecture,
    });
  checkArchitecture(architecture);
  const splits = file.getNumber('split.count');
  if (splits !== null && splits > 1)
    throw new ModelFileError('unsupported', `the file is one of ${splits} parts; join them first (llama-gguf-split --merge)`, {
      key: 'split.count',
      value: splits,
      limit: 1,
    });
  const key = (name: string): string => `${architecture}.${name}`;
  const integer = (name: string, max: number, fallback?: number): number => {
    if (!file.has(key(name))) {
      if (fallback === undefined) throw missing(key(name));
      return fallback;
    }
    refuseArray(file, key(name));
    return checkInteger(key(name), file.getNumber(key(name)) ?? 0, max);
  };
  for (const [name, neutral] of neutralKeys) {
    if (!file.has(key(name))) continue;
    refuseArray(file, key(name));
    const value = file.getNumber(key(name)) ?? neutral;
    if (value !== neutral)
      throw new ModelFileError('unsupported', `key ${key(name)} is ${value}: models that need it are not supported`, {
        key: key(name),
        value,
        limit: neutral,
      });
  }
  const hiddenSize = integer('embedding_length', limits.sizeMax);
  const heads = integer('attention.head_count', limits.headsMax);
  const kvHeads = integer('attention.head_count_kv', limits.headsMax, heads);
  const headSize = readHeadSize(file, key, integer, hiddenSize, heads);
  const vocabularySize = readVocabularySize(file, key('vocab_size'));
  return {
    version: 1,
    architecture,
    name: (file.getString('general.name') ?? architecture).replace(/\p{Cc}/gu, ' ').slice(0, limits.nameCharactersMax),
    sourceSha256,
    sourceBytes: file.bytes,
    layers: integer('block_count', limits.layersMax),
    hiddenSize,
    heads,
    kvHeads,
    headSize,
    feedForwardSize: integer('feed_forward_length', limits.sizeMax),
    vocabularySize,
    contextTokensMax: integer('context_length', limits.contextMax),
    normEpsilon: positive(file, key('attention.layer_norm_rms_epsilon'), 1),
    rope: {
      base: positive(file, key('rope.freq_base'), 1e12, 10_000),
      dimensions: integer('rope.dimension_count', headSize, headSize),
      scale: readRopeScale(file, key),
    },
    slidingWindow: file.has(key('attention.sliding_window')) ? integer('attention.sliding_window', limits.contextMax) : null,
    tensors: file.tensors.map((tensor) => ({ ...tensor, shape: [...tensor.shape] })),
  };
}

const missing = (key: string): ModelFileError => new ModelFileError('missing_key', `key ${key} is missing`, { key });

function refuseArray(file: GgufFile, key: string): void {
  if (file.metadata.get(key)?.type === 'array')
    throw new ModelFileError('unsupported', `key ${key} is an array: layers of different shapes are not supported`, {
      key,
      value: 'array',
    });
}

function checkInteger(key: string, value: number, max: number): number {
  if (!Number.isInteger(value) || value < 1 || value > max)
    throw new ModelFileError('bad_value', `key ${key} is ${value}, it must be a whole number from 1 to ${max}`, {
      key,
      value,
      limit: max,
    });
  return value;
}

function positive(file: GgufFile, key: string, max: number, fallback?: number): number {
  const value = file.getNumber(key) ?? fallback;
  if (value === undefined) throw missing(key);
  if (!(value > 0 && value <= max))
    throw new ModelFileError('bad_value', `key ${key} is ${value}, it must be above 0 and at most ${max}`, {
      key,
      value,
      limit: max,
    });
  return value;
}

function readHeadSize(
  file: GgufFile,
  key: (name: string) => string,
  integer: (name: string, max: number, fallback?: number) => number,
  hiddenSize: number,
  heads: number,
): number {
  if (!file.has(key('attention.key_length')) && hiddenSize % heads !== 0)
    throw new ModelFileError(
      'inconsistent',
      `key ${key('attention.head_count')} is ${heads}, which does not divide ${hiddenSize} (${key('embedding_length')})`,
      {
        key: key('attention.head_count'),
        value: heads,
        limit: hiddenSize,
      },
    );
  const headSize = integer('attention.key_length', limits.headSizeMax, hiddenSize / heads);
  const valueSize = integer('attention.value_length', limits.headSizeMax, headSize);
  if (valueSize !== headSize)
    throw new ModelFileError(
      'unsupported',
      `key ${key('attention.value_length')} is ${valueSize}, keys have ${headSize}: unequal sizes are not supported`,
      {
        key: key('attention.value_length'),
        value: valueSize,
        limit: headSize,
      },
    );
  return checkInteger(key('attention.key_length'), headSize, limits.headSizeMax);
}

/** Rows of the embedding; the tokenizer's own count and the declared one must be the same. */
function readVocabularySize(file: GgufFile, declaredKey: string): number {
  const name = 'token_embd.weight';
  const embedding = file.tensor(name);
  if (!embedding) throw new ModelFileError('missing_tensor', `tensor ${name} is missing`, { key: name });
  const rows = embedding.shape[1] ?? 1;
  const tokens = file.getStringArray('tokenizer.ggml.tokens')?.length ?? null;
  const declared = file.getNumber(declaredKey);
  const claims: [string, number | null][] = [
    ['tokenizer.ggml.tokens', tokens],
    [declaredKey, declared],
  ];
  for (const [key, count] of claims)
    if (count !== null && count !== rows)
      throw new ModelFileError('inconsistent', `${key} says ${count} tokens, tensor ${name} has ${rows} rows`, {
        key,
        value: count,
        limit: rows,
      });
  return checkInteger(`rows of ${name}`, rows, limits.vocabularyMax);
}

function readRopeScale(file: GgufFile, key: (name: string) => string): number {
  const type = file.getString(key('rope.scaling.type')) ?? (file.has(key('rope.scale_linear')) ? 'linear' : 'none');
  if (type === 'none') return 1;
  if (type !== 'linear')
    throw new ModelFileError('unsupported', `key ${key('rope.scaling.type')} is ${quoted(type)}: none and linear are supported`, {
      key: key('rope.scaling.type'),
      value: type,
      limit: 'linear',
    });
  const factorKey = file.has(key('rope.scaling.factor')) ? key('rope.scaling.factor') : key('rope.scale_linear');
  return Math.fround(1 / positive(file, factorKey, 1e6));
}

/**
 * Checks facts that came from elsewhere (an `assign` message) as the reader checks a file: nothing a program or a slice is built from is taken on trust.
 * @throws {ModelFileError} `bad_facts`, naming the field
 */
export function parseModelFacts(json: string): ModelFacts {
  let value: unknown;
  try {
    value = JSON.parse(json);
  } catch (cause) {
    throw new ModelFileError('bad_facts', `the model description is not JSON: ${(cause as Error).message}`, { cause });
  }
  const facts = asRecord(value, 'at the top');
  if (facts['version'] !== 1)
    throw badFacts('version', facts['version'], 'it must be 1; coordinator and worker are of different releases');
  const rope = asRecord(facts['rope'], 'rope');
  const text = (field: string, pattern: RegExp): string => {
    const found = facts[field];
    if (typeof found !== 'string' || !pattern.test(found)) throw badFacts(field, found, `it must match ${pattern.source}`);
    return found;
  };
  const integer = (field: string, max: number): number => factsInteger(field, facts[field], 1, max);
  const sourceBytes = integer('sourceBytes', Number.MAX_SAFE_INTEGER);
  const headSize = integer('headSize', limits.headSizeMax);
  return {
    version: 1,
    architecture: text('architecture', /^[a-z0-9_-]{1,64}$/),
    name: text('name', /^[^\p{Cc}]{0,256}$/u),
    sourceSha256: text('sourceSha256', /^[0-9a-f]{64}$/),
    sourceBytes,
    layers: integer('layers', limits.layersMax),
    hiddenSize: integer('hiddenSize', limits.sizeMax),
    heads: integer('heads', limits.headsMax),
    kvHeads: integer('kvHeads', limits.headsMax),
    headSize,
    feedForwardSize: integer('feedForwardSize', limits.sizeMax),
    vocabularySize: integer('vocabularySize', limits.vocabularyMax),
    contextTokensMax: integer('contextTokensMax', limits.contextMax),
    normEpsilon: factsPositive('normEpsilon', facts['normEpsilon'], 1),
    rope: {
      base: factsPositive('rope.base', rope['base'], 1e12),
      dimensions: factsInteger('rope.dimensions', rope['dimensions'], 1, headSize),
      scale: factsPositive('rope.scale', rope['scale'], 1e6),
    },
    slidingWindow: facts['slidingWindow'] === null ? null : integer('slidingWindow', limits.contextMax),
    tensors: parseTensors(facts['tensors'], sourceBytes),
  };
}

function parseTensors(value: unknown, sourceBytes: number): TensorFacts[] {
  if (!Array.isArray(value) || value.length > ggufLimits.tensorsMax)
    throw badFacts('tensors', value, `it must be a list of at most ${ggufLimits.tensorsMax}`);
  const names = new Set<string>();
  let end = 0;
  return value.map((item: unknown, index): TensorFacts => {
    const at = `tensors[${index}]`;
    const { name, type, shape, offset, bytes } = asRecord(item, at);
    if (typeof name !== 'string' || !/^[\x21-\x7e]{1,64}$/.test(name) || names.has(name))
      throw badFacts(`${at}.name`, name, 'it must be a name of its own');
    names.add(name);
    if (!isTensorType(type)) throw badFacts(`${at}.type`, type, 'it must be a supported tensor type');
    if (!Array.isArray(shape) || shape.length < 1 || shape.length > ggufLimits.dimensionsMax)
      throw badFacts(`${at}.shape`, shape, 'it must have 1 to 4 dimensions');
    const sizes = shape.map((size: unknown, axis) => factsInteger(`${at}.shape[${axis}]`, size, 1, Number.MAX_SAFE_INTEGER));
    const { blockValues, blockBytes } = quantType(type);
    const exact = (sizes.reduce((product, size) => product * BigInt(size), 1n) / BigInt(blockValues)) * BigInt(blockBytes);
    if ((sizes[0] ?? 0) % blockValues !== 0 || exact !== BigInt(factsInteger(`${at}.bytes`, bytes, 1, sourceBytes)))
      throw badFacts(`${at}.bytes`, bytes, `shape ${sizes.join(' x ')} of ${type} takes ${exact}`);
    const from = factsInteger(`${at}.offset`, offset, end, sourceBytes);
    end = from + Number(exact);
    if (end > sourceBytes) throw badFacts(`${at}.offset`, from, `the file has ${sourceBytes} bytes`);
    return { name, type, shape: sizes, offset: from, bytes: Number(exact) };
  });
}

function asRecord(value: unknown, field: string): Record<string, unknown> {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) throw badFacts(field, value, 'it must be an object');
  return value as Record<string, unknown>;
}

function factsInteger(field: string, value: unknown, min: number, max: number): number {
  if (typeof value !== 'number' || !Number.isSafeInteger(value) || value < min || value > max)
    throw badFacts(field, value, `it must be a whole number from ${min} to ${max}`);
  return value;
}

function factsPositive(field: string, value: unknown, max: number): number {
  if (typeof value !== 'number' || !(value > 0 && value <= max))
    throw badFacts(field, value, `it must be above 0 and at most ${max}`);
  return value;
}

function badFacts(field: string, value: unknown, why: string): ModelFileError {
  const shown = describe(value);
  return new ModelFileError('bad_facts', `field ${field} of the model description is ${shown}: ${why}`, {
    key: field,
    value: shown,
  });
}

function describe(value: unknown): string {
  if (typeof value === 'string') return quoted(value);
  if (typeof value === 'number' || typeof value === 'boolean' || value === null || value === undefined) return String(value);
  return Array.isArray(value) ? `a list of ${value.length}` : `of type ${typeof value}`;
}
