/**
 * The pre-norm decoder that several architectures share: per layer, norm → attention with grouped KV heads → residual, norm → gated feed-forward → residual.
 * An architecture file says what is its own (`DecoderTraits`); this file checks the tensors against the hyper-parameters and writes the operations for one
 * stage and one rank.
 *
 * Letters: H hidden size, D head size, F feed-forward size, V vocabulary size, N query heads, G KV heads.
 */
import type { ModelFacts, TensorFacts } from '../model-file/model-facts.ts';
import { ModelFileError } from '../model-file/model-file-error.ts';
import { quantType } from '../model-file/quant-types.ts';
import type { ActivationType, Program, Range } from './program.ts';
import { ProgramBuilder } from './program-builder.ts';
import {
  checkCut,
  columnSegments,
  featuresOf,
  groupValues,
  headsOf,
  kvHeadsOf,
  maximalSubtrees,
  modelUnits,
  tokenIdsOf,
  unitCut,
  unitSegments,
  type ModelCut,
  type ModelShape,
  type ModelUnits,
} from './units.ts';

export interface DecoderTraits {
  /** Which values of a head rope turns together; the file's q and k are laid out for it. */
  ropeStyle: 'adjacent' | 'half';
  activation: 'silu' | 'gelu_tanh';
  /** Biases of q, k and v. */
  attentionBias: 'required' | 'optional';
  /** Frequency factors of rope in tensor `rope_freqs.weight`. */
  ropeFactors: 'optional' | 'none';
}

/** Types of K and V: both int8, K in f16 and V in int8, or both f16. */
export type KvType = 'auto' | 'int8' | 'f16-int8' | 'f16';

export interface ProgramOptions {
  stage: number;
  rank: number;
  activations: ActivationType;
  /** `auto`: f16 beside int16 activations; else int8, but for K where k has a bias. */
  kvType: KvType;
  /** `per-kind` and `free`: faster arithmetic of one executor kind is allowed where there is any (BF16 weights). `exact` where nothing is said. */
  bits?: Program['bits'];
  /** Longest context wanted; null, 0 or more than the model's own: the model's own. */
  contextTokensMax: number | null;
}

const embeddingName = 'token_embd.weight';
const headName = 'output.weight';
const factorsName = 'rope_freqs.weight';
const keyBiasName = (layer: number): string => `blk.${layer}.attn_k.bias`;

/** What a cut depends on. @throws {ModelFileError} a `down` is missing */
export function decoderShape(facts: ModelFacts): ModelShape {
  const types = new Map(facts.tensors.map((tensor) => [tensor.name, tensor.type]));
  const downBlockValues = Array.from({ length: facts.layers }, (_, layer) => {
    const name = `blk.${layer}.ffn_down.weight`;
    const type = types.get(name);
    if (!type) throw new ModelFileError('missing_tensor', `tensor ${name} is missing`, { key: name });
    return quantType(type).blockValues;
  });
  const { layers, hiddenSize, heads, kvHeads, headSize, feedForwardSize, vocabularySize } = facts;
  return { layers, hiddenSize, heads, kvHeads, headSize, feedForwardSize, vocabularySize, downBlockValues };
}

interface ExpectedTensor {
  shape: number[];
  required: boolean;
}

/** Every tensor the architecture knows, by name. */
function expectedTensors(facts: ModelFacts, traits: DecoderTraits): Map<string, ExpectedTensor> {
  const { hiddenSize: H, headSize: D, feedForwardSize: F, vocabularySize: V, heads: N, kvHeads: G } = facts;
  const expected = new Map<string, ExpectedTensor>();
  const expect = (name: string, shape: number[], required = true): void => void expected.set(name, { shape, required });
  const biases = traits.attentionBias === 'required';
  expect(embeddingName, [H, V]);
  expect('output_norm.weight', [H]);
  expect(headName, [H, V], false);
  if (traits.ropeFactors === 'optional') expect(factorsName, [facts.rope.dimensions / 2], false);
  for (let layer = 0; layer < facts.layers; layer++) {
    const at = `blk.${layer}.`;
    expect(`${at}attn_norm.weight`, [H]);
    expect(`${at}attn_q.weight`, [H, N * D]);
    expect(`${at}attn_k.weight`, [H, G * D]);
    expect(`${at}attn_v.weight`, [H, G * D]);
    expect(`${at}attn_output.weight`, [N * D, H]);
    expect(`${at}attn_q.bias`, [N * D], biases);
    expect(keyBiasName(layer), [G * D], biases);
    expect(`${at}attn_v.bias`, [G * D], biases);
    expect(`${at}attn_output.bias`, [H], false);
    expect(`${at}ffn_norm.weight`, [H]);
    expect(`${at}ffn_gate.weight`, [H, F]);
    expect(`${at}ffn_up.weight`, [H, F]);
    expect(`${at}ffn_down.weight`, [F, H]);
  }
  return expected;
}

/**
 * Holds hyper-parameters and tensors against each other: everything that is needed is there in the right shape, and nothing is there that would be ignored.
 * @throws {ModelFileError} `inconsistent`, `missing_tensor`, `unexpected_tensor`, `unsupported`
 */
export function checkDecoder(facts: ModelFacts, traits: DecoderTraits): void {
  const { architecture, heads, kvHeads, headSize, hiddenSize, feedForwardSize, rope } = facts;
  const refuse = (key: string, value: number, limit: number, why: string): never => {
    throw new ModelFileError('inconsistent', `key ${architecture}.${key} is ${value}: ${why}`, {
      key: `${architecture}.${key}`,
      value,
      limit,
    });
  };
  if (heads % kvHeads !== 0)
    refuse('attention.head_count_kv', kvHeads, heads, `${heads} query heads cannot share ${kvHeads} KV heads evenly`);
  if (rope.dimensions % 2 !== 0 || rope.dimensions > headSize)
    refuse('rope.dimension_count', rope.dimensions, headSize, `it must be even and at most the head size ${headSize}`);
  const widths: [string, number][] = [
    ['embedding_length', hiddenSize],
    ['attention.key_length', headSize],
    ['feed_forward_length', feedForwardSize],
  ];
  for (const [key, value] of widths)
    if (value % groupValues !== 0)
      refuse(key, value, groupValues, `widths that are no multiple of ${groupValues} are not supported`);
  const expected = expectedTensors(facts, traits);
  const present = new Map(facts.tensors.map((tensor) => [tensor.name, tensor]));
  for (const [name, { shape, required }] of expected) {
    const tensor = present.get(name);
    if (tensor) checkTensor(tensor, shape);
    else if (required)
      throw new ModelFileError(
        'missing_tensor',
        `tensor ${name} is missing; ${architecture} models with ${facts.layers} layers have it`,
        {
          key: name,
        },
      );
  }
  for (const name of present.keys())
    if (!expected.has(name))
      throw new ModelFileError(
        'unexpected_tensor',
        `tensor ${name} is not known to architecture ${architecture}; computing without it would be wrong`,
        {
          key: name,
        },
      );
}

function checkTensor({ name, shape, type }: TensorFacts, wanted: number[]): void {
  // Trailing dimensions of 1 say nothing.
  const sizes = [...shape];
  while (sizes.length > wanted.length && sizes.at(-1) === 1) sizes.pop();
  if (sizes.length !== wanted.length || sizes.some((size, axis) => size !== wanted[axis]))
    throw new ModelFileError(
      'inconsistent',
      `tensor ${name} has shape [${shape.join(', ')}], the hyper-parameters say [${wanted.join(', ')}]`,
      {
        key: name,
        value: shape.join(' x '),
        limit: wanted.join(' x '),
      },
    );
  if (wanted.length === 1 && quantType(type).blockValues !== 1)
    throw new ModelFileError('unsupported', `tensor ${name} is a vector of type ${type}; vectors must be F32, F16 or BF16`, {
      key: name,
      value: type,
    });
}

/** What one rank of one stage holds, in heads, features and token ids. */
interface Shard {
  units: ModelUnits;
  layers: Range;
  rank: number;
  ranks: number;
  first: boolean;
  last: boolean;
  heads: Range;
  kvHeads: Range;
  features: Range;
  attentionUnits: Range[];
  feedForwardUnits: Range[];
  /** Token ids of each rank. */
  vocabulary: Range[];
  ownVocabulary: Range;
}

function shardOf(units: ModelUnits, cut: ModelCut, stage: number, rank: number): Shard {
  checkCut(units, cut);
  const here = cut.stages[stage];
  const own = here?.ranks[rank];
  if (!here || !own)
    throw new RangeError(
      `stage ${stage} rank ${rank} is not in the placement of ${cut.stages.length} stages and ${here?.ranks.length ?? 0} ranks`,
    );
  const heads = headsOf(units, own.attentionUnits);
  const vocabulary = here.ranks.map((one) => tokenIdsOf(units, one.vocabularyUnits));
  return {
    units,
    layers: { ...here.layers },
    rank,
    ranks: here.ranks.length,
    first: stage === 0,
    last: stage === cut.stages.length - 1,
    heads,
    kvHeads: kvHeadsOf(units, heads),
    features: featuresOf(units, own.feedForwardUnits),
    attentionUnits: here.ranks.map((one) => ({ ...one.attentionUnits })),
    feedForwardUnits: here.ranks.map((one) => ({ ...one.feedForwardUnits })),
    vocabulary,
    ownVocabulary: vocabulary[rank] ?? { from: 0, to: 0 },
  };
}

const length = (range: Range): number => range.to - range.from;
const times = (range: Range, factor: number): Range => ({ from: range.from * factor, to: range.to * factor });

function kvTypeOf(activations: ActivationType, keyBias: boolean): Exclude<KvType, 'auto'> {
  if (activations === 'int16') return 'f16';
  return keyBias ? 'f16-int8' : 'int8';
}

/** The program of one rank of one stage. @throws {CutError} the cut does not cover the model */
export function buildDecoder(facts: ModelFacts, traits: DecoderTraits, cut: ModelCut, options: ProgramOptions): Program {
  const { stage, rank, activations } = options;
  const shard = shardOf(modelUnits(decoderShape(facts)), cut, stage, rank);
  const builder = new ProgramBuilder(facts);
  addStart(builder, facts, shard);
  for (let layer = shard.layers.from; layer < shard.layers.to; layer++) {
    addAttention(builder, facts, traits, shard, layer);
    addFeedForward(builder, facts, traits, shard, layer);
  }
  addEnd(builder, facts, shard);
  // One type for all layers of the model, so that every stage decides alike.
  const kvType = options.kvType === 'auto' ? kvTypeOf(activations, builder.has(keyBiasName(0))) : options.kvType;
  const key = kvType === 'int8' ? 'int8' : 'f16';
  const value = kvType === 'f16' ? 'f16' : 'int8';
  const hasBf16 = facts.tensors.some(({ shape, type }) => shape.length > 1 && type === 'BF16');
  return {
    architecture: facts.architecture,
    bits: hasBf16 ? (options.bits ?? 'exact') : 'exact',
    activations,
    stage,
    stages: cut.stages.length,
    rank,
    ranks: shard.ranks,
    layers: shard.layers,
    hiddenSize: facts.hiddenSize,
    vocabularySize: facts.vocabularySize,
    contextTokensMax: Math.min(options.contextTokensMax || facts.contextTokensMax, facts.contextTokensMax),
    buffers: builder.buffers,
    weights: builder.weights,
    kv: { layers: length(shard.layers), heads: length(shard.kvHeads), headSize: facts.headSize, key, value },
    operations: builder.operations,
  };
}

/** Hidden states enter: embedding rows in the first stage, the stage before in the others. */
function addStart(builder: ProgramBuilder, facts: ModelFacts, shard: Shard): void {
  const residual = builder.buffer('residual', facts.hiddenSize);
  if (!shard.first) {
    builder.add({ op: 'receive_hidden', buffer: residual });
    return;
  }
  // A rank that looks rows up and also multiplies by them (tied, first stage is last stage) holds one matrix for both.
  const tied = shard.last && !builder.has(headName);
  const weight = builder.rows(embeddingName, shard.ownVocabulary, tied ? 'matrix' : 'embedding');
  builder.add({ op: 'embed', weight, out: residual, vocabulary: shard.vocabulary, rank: shard.rank });
  if (shard.ranks > 1) builder.add({ op: 'gather_rows', buffer: residual, vocabulary: shard.vocabulary });
}

function addAttention(builder: ProgramBuilder, facts: ModelFacts, traits: DecoderTraits, shard: Shard, layer: number): void {
  const { hiddenSize, headSize, normEpsilon } = facts;
  const { heads, kvHeads, units, rank } = shard;
  const at = `blk.${layer}.`;
  const localLayer = layer - shard.layers.from;
  const queryRows = times(heads, headSize);
  const kvRows = times(kvHeads, headSize);
  const residual = builder.buffer('residual', hiddenSize);
  const normed = builder.buffer('normed', hiddenSize);
  const q = builder.buffer('q', length(queryRows));
  const k = builder.buffer('k', length(kvRows));
  const v = builder.buffer('v', length(kvRows));
  const attended = builder.buffer('attended', length(queryRows));
  const segments = columnSegments(hiddenSize);
  builder.add({
    op: 'rms_norm',
    in: residual,
    weight: builder.vector(`${at}attn_norm.weight`),
    epsilon: normEpsilon,
    out: normed,
  });
  const products: [string, string, Range][] = [
    ['attn_q', q, queryRows],
    ['attn_k', k, kvRows],
    ['attn_v', v, kvRows],
  ];
  for (const [name, out, rows] of products) {
    const weight = builder.rows(`${at}${name}.weight`, rows);
    builder.add({ op: 'linear', in: normed, weight, bias: builder.optionalVector(`${at}${name}.bias`, rows), segments, out });
  }
  const factors = traits.ropeFactors === 'optional' ? builder.optionalVector(factorsName) : null;
  const rope = {
    headSize,
    dimensions: facts.rope.dimensions,
    style: traits.ropeStyle,
    base: facts.rope.base,
    scale: facts.rope.scale,
    factors,
  };
  const group = facts.heads / facts.kvHeads;
  builder.add(
    { op: 'rope', buffer: q, heads: length(heads), ...rope },
    { op: 'rope', buffer: k, heads: length(kvHeads), ...rope },
    { op: 'store_kv', k, v, layer: localLayer },
    {
      op: 'attention',
      q,
      out: attended,
      layer: localLayer,
      heads: length(heads),
      headSize,
      kvHead: Array.from({ length: length(heads) }, (_, head) => Math.floor((heads.from + head) / group) - kvHeads.from),
      scale: Math.fround(1 / Math.sqrt(headSize)),
      window: facts.slidingWindow,
    },
  );
  const cut = unitCut(units.attention.units, shard.attentionUnits);
  const widths = unitsIn(shard.attentionUnits[rank]).map((unit) => length(headsOf(units, unit)) * headSize);
  builder.add(
    {
      op: 'linear_partial',
      in: attended,
      weight: builder.columns(`${at}attn_output.weight`, queryRows),
      segments: unitSegments(widths),
      cut,
      rank,
      width: hiddenSize,
    },
    { op: 'all_reduce', cut, rank, bias: builder.optionalVector(`${at}attn_output.bias`), residual },
  );
}

function addFeedForward(builder: ProgramBuilder, facts: ModelFacts, traits: DecoderTraits, shard: Shard, layer: number): void {
  const { hiddenSize, normEpsilon } = facts;
  const { features, units, rank } = shard;
  const at = `blk.${layer}.`;
  const residual = builder.buffer('residual', hiddenSize);
  const normed = builder.buffer('normed', hiddenSize);
  const gate = builder.buffer('gate', length(features));
  const up = builder.buffer('up', length(features));
  const gated = builder.buffer('gated', length(features));
  const segments = columnSegments(hiddenSize);
  const cut = unitCut(units.feedForward.units, shard.feedForwardUnits);
  const widths = unitsIn(shard.feedForwardUnits[rank]).map((unit) => length(featuresOf(units, unit)));
  builder.add(
    { op: 'rms_norm', in: residual, weight: builder.vector(`${at}ffn_norm.weight`), epsilon: normEpsilon, out: normed },
    { op: 'linear', in: normed, weight: builder.rows(`${at}ffn_gate.weight`, features), bias: null, segments, out: gate },
    { op: 'linear', in: normed, weight: builder.rows(`${at}ffn_up.weight`, features), bias: null, segments, out: up },
    { op: 'gated_activation', gate, up, out: gated, activation: traits.activation },
    {
      op: 'linear_partial',
      in: gated,
      weight: builder.columns(`${at}ffn_down.weight`, features),
      segments: unitSegments(widths),
      cut,
      rank,
      width: hiddenSize,
    },
    { op: 'all_reduce', cut, rank, bias: null, residual },
  );
}

/** Each unit of a range as a range of its own. */
const unitsIn = (range: Range | undefined): Range[] =>
  range ? Array.from({ length: length(range) }, (_, index) => ({ from: range.from + index, to: range.from + index + 1 })) : [];

/** Hidden states leave: to the stage after, or through the output head of the last stage. */
function addEnd(builder: ProgramBuilder, facts: ModelFacts, shard: Shard): void {
  const { hiddenSize, vocabularySize, normEpsilon } = facts;
  const residual = builder.buffer('residual', hiddenSize);
  if (!shard.last) {
    builder.add({ op: 'send_hidden', buffer: residual });
    return;
  }
  const selected = builder.buffer('selected', hiddenSize, 'output');
  const normed = builder.buffer('selected_normed', hiddenSize, 'output');
  const logits = builder.buffer('logits', vocabularySize, 'output');
  const own = shard.ranks > 1 ? builder.buffer('own_logits', length(shard.ownVocabulary), 'output') : logits;
  const weight = builder.rows(builder.has(headName) ? headName : embeddingName, shard.ownVocabulary);
  builder.add(
    { op: 'select_rows', in: residual, out: selected },
    { op: 'rms_norm', in: selected, weight: builder.vector('output_norm.weight'), epsilon: normEpsilon, out: normed },
    { op: 'linear', in: normed, weight, bias: null, segments: columnSegments(hiddenSize), out: own },
  );
  // With one rank the head writes the whole vocabulary itself. `logits` of the other ranks is named but never written.
  if (shard.ranks > 1) builder.add({ op: 'gather_logits', in: own, out: logits, vocabulary: shard.vocabulary, rank: shard.rank });
  if (shard.rank === 0) builder.add({ op: 'sample', logits });
}

/** Vectors a rank sends in each reduction of a layer: [attention, feed-forward]. For the planner. */
export function vectorsSent(units: ModelUnits, rank: { attentionUnits: Range; feedForwardUnits: Range }): [number, number] {
  return [
    maximalSubtrees(units.attention.units, rank.attentionUnits).length,
    maximalSubtrees(units.feedForward.units, rank.feedForwardUnits).length,
  ];
}
