/**
 * Units, segments and cuts, from a model's shapes alone (design: "Units, segments, cuts"). Units are fixed by the model and never by the number of ranks, so the
 * tree that joins their sums, and with it every bit, is the same however the model is cut.
 */
import type { Range, UnitCut } from './program.ts';

/** Values of a quantisation group of activations; every unit border and segment border lies on one. */
export const groupValues = 32;
export const unitsMax = 16;
const unitsWanted = 8;
export const vocabularyUnitIds = 1_024;
const columnSegmentsMax = 8;

/** What a cut depends on. */
export interface ModelShape {
  layers: number;
  hiddenSize: number;
  heads: number;
  kvHeads: number;
  headSize: number;
  feedForwardSize: number;
  vocabularySize: number;
  /** Values of a block of `down`, one for each layer. */
  downBlockValues: number[];
}

export interface ModelUnits {
  layers: number;
  /** Unit u is query heads [u * headsPerUnit, (u + 1) * headsPerUnit), the last may be short. */
  attention: { units: number; headsPerUnit: number; heads: number; kvHeads: number };
  /** Unit u is features [u * valuesPerUnit, ...), the last may be short. */
  feedForward: { units: number; valuesPerUnit: number; values: number };
  /** Unit u is token ids [u * 1024, ...), the last may be short. */
  vocabulary: { units: number; ids: number };
}

/** Shares of a model that one rank holds, in units. Same fields as in a placement. */
export interface RankUnits {
  attentionUnits: Range;
  feedForwardUnits: Range;
  vocabularyUnits: Range;
}

export interface StageCut {
  layers: Range;
  ranks: RankUnits[];
}

/** How a model is cut: stages cut layers, ranks cut every layer. A placement is this plus the worker of each rank. */
export interface ModelCut {
  stages: StageCut[];
}

/** `parts` null: `count` equal shares; else one positive share a rank (`--tp 3:2:1`) or the layers of each stage (`--pp 10:20`). */
export interface CutShares {
  count: number;
  parts: number[] | null;
}

export type CutErrorCode = 'too_many_ranks' | 'too_many_stages' | 'bad_shares' | 'bad_shape' | 'bad_cut';

/** The model cannot be cut this way. */
export class CutError extends Error {
  readonly code: CutErrorCode;

  constructor(code: CutErrorCode, message: string) {
    super(message);
    this.name = 'CutError';
    this.code = code;
  }
}

/** @throws {CutError} `bad_shape`: a width that no whole group of 32 divides */
export function modelUnits(shape: ModelShape): ModelUnits {
  const { heads, kvHeads, headSize, feedForwardSize, vocabularySize, hiddenSize } = shape;
  if (heads < 1 || kvHeads < 1 || heads % kvHeads !== 0)
    throw new CutError('bad_shape', `${heads} query heads cannot share ${kvHeads} KV heads evenly`);
  const widths: [string, number][] = [
    ['hidden size', hiddenSize],
    ['head size', headSize],
    ['feed-forward size', feedForwardSize],
  ];
  for (const [name, value] of widths)
    if (value < groupValues || value % groupValues !== 0)
      throw new CutError('bad_shape', `${name} is ${value}, it must be a multiple of ${groupValues}`);
  if (vocabularySize < 1) throw new CutError('bad_shape', `vocabulary size is ${vocabularySize}, limit 1`);
  const headsPerUnit = attentionUnitHeads(heads, kvHeads);
  const valuesPerUnit = feedForwardUnitValues(feedForwardSize, shape.downBlockValues);
  return {
    layers: shape.layers,
    attention: { units: Math.ceil(heads / headsPerUnit), headsPerUnit, heads, kvHeads },
    feedForward: { units: Math.ceil(feedForwardSize / valuesPerUnit), valuesPerUnit, values: feedForwardSize },
    vocabulary: { units: Math.ceil(vocabularySize / vocabularyUnitIds), ids: vocabularySize },
  };
}

/** The smallest divisor of the KV-group size that gives at most 16 units, if that gives at least 8; else the fewest heads that give at most 16. */
function attentionUnitHeads(heads: number, kvHeads: number): number {
  const group = heads / kvHeads;
  for (let divisor = 1; divisor <= group; divisor++)
    if (group % divisor === 0 && heads / divisor <= unitsMax) {
      if (heads / divisor >= unitsWanted) return divisor;
      break;
    }
  return Math.ceil(heads / unitsMax);
}

/** The smallest multiple of L that gives at most 16 units; L = lcm(32, block size of every layer's down). */
function feedForwardUnitValues(values: number, downBlockValues: readonly number[]): number {
  const step = downBlockValues.reduce(leastCommonMultiple, groupValues);
  return Math.ceil(values / (step * unitsMax)) * step;
}

const greatestCommonDivisor = (a: number, b: number): number => (b === 0 ? a : greatestCommonDivisor(b, a % b));
const leastCommonMultiple = (a: number, b: number): number => (a / greatestCommonDivisor(a, b)) * b;

/** Query heads of a range of attention units. */
export const headsOf = ({ attention }: ModelUnits, units: Range): Range => scaled(units, attention.headsPerUnit, attention.heads);

/** KV heads that query heads [from, to) read. */
export function kvHeadsOf({ attention }: ModelUnits, heads: Range): Range {
  const group = attention.heads / attention.kvHeads;
  return { from: Math.floor(heads.from / group), to: Math.ceil(heads.to / group) };
}

/** Features of a range of feed-forward units. */
export const featuresOf = ({ feedForward }: ModelUnits, units: Range): Range =>
  scaled(units, feedForward.valuesPerUnit, feedForward.values);

/** Token ids of a range of vocabulary units. */
export const tokenIdsOf = ({ vocabulary }: ModelUnits, units: Range): Range => scaled(units, vocabularyUnitIds, vocabulary.ids);

const scaled = (units: Range, each: number, total: number): Range => ({
  from: Math.min(units.from * each, total),
  to: Math.min(units.to * each, total),
});

/**
 * Segments of a column-parallel product: ⌈groups/8⌉, at most 8, as equal as can be, the longer first.
 * @param columns K, a multiple of 32
 * @returns ends in groups of 32, ascending; the last is K / 32
 */
export function columnSegments(columns: number): number[] {
  const groups = columns / groupValues;
  const count = Math.min(columnSegmentsMax, Math.ceil(groups / 8));
  return ends(equalParts(groups, count));
}

/** Ends of each own unit of a row-parallel product, in local groups of 32. @param widths values of each own unit, ascending */
export const unitSegments = (widths: readonly number[]): number[] => ends(widths.map((width) => width / groupValues));

function ends(sizes: readonly number[]): number[] {
  let end = 0;
  return sizes.map((size) => (end += size));
}

/** `total` in `count` parts as equal as can be, the longer first. */
function equalParts(total: number, count: number): number[] {
  return Array.from({ length: count }, (_, part) => Math.floor(total / count) + (part < total % count ? 1 : 0));
}

/** Consecutive ranges of these sizes, from 0. */
function ranges(sizes: readonly number[]): Range[] {
  let from = 0;
  return sizes.map((size) => ({ from, to: (from += size) }));
}

/** A maximal subtree of the reduction tree: `count` consecutive units from `first`. */
export interface Subtree {
  first: number;
  count: number;
}

/** Maximal subtrees inside `own` of the tree over `units` leaves; tree(n) = tree(⌈n/2⌉) + tree(rest). A rank sends one vector for each. */
export function maximalSubtrees(units: number, own: Range, first = 0): Subtree[] {
  if (own.to <= first || own.from >= first + units) return [];
  if (own.from <= first && own.to >= first + units) return [{ first, count: units }];
  const left = Math.ceil(units / 2);
  return [...maximalSubtrees(left, own, first), ...maximalSubtrees(units - left, own, first + left)];
}

/** `ranks` of a row-parallel product as an operation names them. */
export const unitCut = (units: number, own: Range[]): UnitCut => ({ units, ranks: own });

/**
 * Cuts a model into stages and ranks.
 *
 * Equal shares: no rank holds more than ⌈units/ranks⌉ units of a kind; among those cuts the one with the fewest KV heads held twice, then the fewest vectors to send
 * (cuts at nodes of the tree), then the most even, then the longer ranks first. Explicit shares: largest remainder for each kind of unit, at least one each.
 *
 * @throws {CutError} `too_many_ranks`, `too_many_stages`, `bad_shares`
 */
export function cutModel(units: ModelUnits, tensorParallel: CutShares, pipelineParallel: CutShares): ModelCut {
  const layers = cutLayers(units.layers, pipelineParallel);
  checkShares('--tp', tensorParallel);
  const ranks = cutRanks(units, tensorParallel);
  return { stages: layers.map((range) => ({ layers: range, ranks: ranks.map(copyOf) })) };
}

const copyOf = (rank: RankUnits): RankUnits => ({
  attentionUnits: { ...rank.attentionUnits },
  feedForwardUnits: { ...rank.feedForwardUnits },
  vocabularyUnits: { ...rank.vocabularyUnits },
});

function checkShares(option: string, { count, parts }: CutShares): void {
  const text = parts ? parts.join(':') : String(count);
  if (!Number.isInteger(count) || count < 1)
    throw new CutError('bad_shares', `${option} ${text}: a count of at least 1 is needed`);
  if (!parts) return;
  if (parts.length !== count)
    throw new CutError('bad_shares', `${option} ${text}: ${parts.length} shares are given for ${count}`);
  if (parts.some((part) => !Number.isSafeInteger(part) || part < 1 || part > 1 << 20))
    throw new CutError('bad_shares', `${option} ${text}: every share must be a whole number from 1 to ${1 << 20}`);
}

function cutLayers(layers: number, shares: CutShares): Range[] {
  checkShares('--pp', shares);
  if (!shares.parts) {
    if (shares.count > layers)
      throw new CutError('too_many_stages', `--pp ${shares.count}: the model has ${layers} layers, a stage needs at least one`);
    return ranges(equalParts(layers, shares.count));
  }
  const sum = shares.parts.reduce((total, part) => total + part, 0);
  if (sum !== layers)
    throw new CutError(
      'bad_shares',
      `--pp ${shares.parts.join(':')} names ${sum} layers, the model has ${layers}; the numbers are layers per stage`,
    );
  return ranges(shares.parts);
}

function cutRanks(units: ModelUnits, shares: CutShares): RankUnits[] {
  const { attention, feedForward, vocabulary } = units;
  const kinds: [string, number][] = [
    ['attention units', attention.units],
    ['feed-forward units', feedForward.units],
    ['vocabulary units', vocabulary.units],
  ];
  for (const [kind, count] of kinds)
    if (shares.count > count)
      throw new CutError(
        'too_many_ranks',
        `--tp ${shares.parts?.join(':') ?? shares.count}: ${shares.count} ranks, but the model has ${count} ${kind} and each rank needs one; at most ${Math.min(...kinds.map(([, most]) => most))} ranks are possible`,
      );
  const { parts } = shares;
  const group = attention.heads / attention.kvHeads;
  const splitsKvHead = (border: number): boolean => (border * attention.headsPerUnit) % group !== 0;
  const cut = parts
    ? {
        attention: largestRemainder(attention.units, parts),
        feedForward: largestRemainder(feedForward.units, parts),
        vocabulary: largestRemainder(vocabulary.units, parts),
      }
    : {
        attention: preferredSizes(attention.units, shares.count, splitsKvHead),
        feedForward: preferredSizes(feedForward.units, shares.count, () => false),
        vocabulary: equalParts(vocabulary.units, shares.count),
      };
  const attentionUnits = ranges(cut.attention);
  const feedForwardUnits = ranges(cut.feedForward);
  const vocabularyUnits = ranges(cut.vocabulary);
  return Array.from({ length: shares.count }, (_, rank) => ({
    attentionUnits: attentionUnits[rank] ?? none,
    feedForwardUnits: feedForwardUnits[rank] ?? none,
    vocabularyUnits: vocabularyUnits[rank] ?? none,
  }));
}

const none: Range = { from: 0, to: 0 };

/** Shares of `total` in proportion to `parts` by largest remainder (ties to the lower rank), at least one each. */
export function largestRemainder(total: number, parts: readonly number[]): number[] {
  const sum = parts.reduce((all, part) => all + part, 0);
  const sizes = parts.map((part) => Math.floor((total * part) / sum));
  // total * part - size * sum is the remainder in units of 1 / sum: an exact integer, so ties are ties.
  const byRemainder = parts
    .map((part, rank) => ({ rank, remainder: total * part - (sizes[rank] ?? 0) * sum }))
    .sort((a, b) => b.remainder - a.remainder || a.rank - b.rank);
  let left = total - sizes.reduce((all, size) => all + size, 0);
  for (const { rank } of byRemainder) if (left-- > 0) sizes[rank] = (sizes[rank] ?? 0) + 1;
  for (let rank = 0; rank < sizes.length; rank++)
    if (sizes[rank] === 0) {
      const largest = sizes.indexOf(Math.max(...sizes));
      sizes[largest] = (sizes[largest] ?? 0) - 1;
      sizes[rank] = 1;
    }
  return sizes;
}

/** Best of all ways to give `units` to `count` ranks, none with more than ⌈units/count⌉. There are at most 16 units, so all are tried. */
function preferredSizes(units: number, count: number, splits: (border: number) => boolean): number[] {
  const most = Math.ceil(units / count);
  let best: number[] = [];
  let bestCost: number[] | null = null;
  const sizes: number[] = [];
  const place = (left: number): void => {
    const ranksLeft = count - sizes.length;
    if (ranksLeft === 0) {
      const cost = costOf(units, sizes, splits);
      if (!bestCost || isLess(cost, bestCost)) {
        best = [...sizes];
        bestCost = cost;
      }
      return;
    }
    // Longer first, so that of equal costs the one with the longer ranks first is kept.
    for (let size = Math.min(most, left - (ranksLeft - 1)); size >= 1 && left - size <= most * (ranksLeft - 1); size--) {
      sizes.push(size);
      place(left - size);
      sizes.pop();
    }
  };
  place(units);
  return best;
}

/** KV heads held twice, vectors sent, unevenness. */
function costOf(units: number, sizes: readonly number[], splits: (border: number) => boolean): number[] {
  const own = ranges(sizes);
  const shared = own.slice(1).filter((range) => splits(range.from)).length;
  const vectors = own.reduce((sum, range) => sum + maximalSubtrees(units, range).length, 0);
  const unevenness = sizes.reduce((sum, size) => sum + size * size, 0);
  return [shared, vectors, unevenness];
}

function isLess(a: readonly number[], b: readonly number[]): boolean {
  for (let i = 0; i < a.length; i++) {
    const difference = (a[i] ?? 0) - (b[i] ?? 0);
    if (difference !== 0) return difference < 0;
  }
  return false;
}

/**
 * Checks that a cut (one that came with a placement) covers the model: layers and units of every kind, in order, without gaps, at least one each.
 * @throws {CutError} `bad_cut`
 */
export function checkCut(units: ModelUnits, cut: ModelCut): void {
  covers(
    'layers',
    units.layers,
    cut.stages.map((stage) => stage.layers),
  );
  cut.stages.forEach((stage, index) => {
    const of = (pick: (rank: RankUnits) => Range): Range[] => stage.ranks.map(pick);
    covers(
      `attention units of stage ${index}`,
      units.attention.units,
      of((rank) => rank.attentionUnits),
    );
    covers(
      `feed-forward units of stage ${index}`,
      units.feedForward.units,
      of((rank) => rank.feedForwardUnits),
    );
    covers(
      `vocabulary units of stage ${index}`,
      units.vocabulary.units,
      of((rank) => rank.vocabularyUnits),
    );
  });
}

function covers(what: string, total: number, parts: readonly Range[]): void {
  let end = 0;
  for (const { from, to } of parts) {
    if (from !== end || to <= from || !Number.isInteger(to))
      throw new CutError('bad_cut', `${what} of the placement: range ${from}..${to} follows ${end}`);
    end = to;
  }
  if (end !== total) throw new CutError('bad_cut', `${what} of the placement end at ${end}, the model has ${total}`);
}
