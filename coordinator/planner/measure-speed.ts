/**
 * Measures, in about a second, what the speed model needs to know of this machine: how fast the native executor walks through weights like those of the model
 * (generated, same shapes and types), and what a reduction between two ranks over shared memory costs. Nothing of the model file but its header is looked at.
 */
import { randomBytes } from 'node:crypto';
import {
  outputNumbers,
  type Addon,
  type ExecutorOptions,
  type Isa,
  type NativeTcp,
  type PeerLink,
  type SlotSampling,
  type StepDone,
  type StepInput,
} from '../../kernels/index.ts';
import type { ModelFacts, TensorFacts } from '../../kernels/model-file/model-facts.ts';
import { quantType, rowBytes } from '../../kernels/model-file/quant-types.ts';
import { sliceOf } from '../../kernels/model-file/slice.ts';
import { buildProgram, cutModel, unitsOfModel, type KvType } from '../../kernels/programs/index.ts';
import type { ActivationType, Program, TensorType } from '../../kernels/programs/program.ts';
import { median } from './measure-host.ts';
import type { KernelSpeed, LinkSpeed } from './speed-model.ts';

export interface MeasureOptions {
  addon: Addon;
  facts: ModelFacts;
  kind: 'cpu' | 'reference';
  isa: Isa | null;
  activations: ActivationType;
  kvType: KvType;
  /** Logical cores that may compute. */
  cores: number[];
  /** Bytes of generated weights; more is truer where caches are large, and takes longer. */
  sampleBytesMax?: number;
}

export interface MeasuredKernels {
  isa: string;
  points: KernelSpeed[];
  /** Sampling and hand-over of a step of one token. */
  stepSeconds: number;
  sampleBytes: number;
}

const sampleBytesDefault = 128 * 1024 ** 2;
const batch = 8;
/** Time for one point after its warm-up step. */
const pointMs = 120;
const repeatsMin = 5;
const repeatsMax = 60;

/** Speed at one token and at eight, on one core and on all. */
export async function measureKernels(options: MeasureOptions): Promise<MeasuredKernels> {
  const { facts, cores } = options;
  const sample = sampleFacts(facts, options.sampleBytesMax ?? sampleBytesDefault);
  const program = wholeProgram(sample, options);
  const bytes = matrixBytes(program, sample);
  const points: KernelSpeed[] = [];
  let stepSeconds = 0;
  let isa = '';
  for (const threads of [...new Set([1, cores.length])]) {
    const rank = await loadRank(options, sample, program, cores.slice(0, threads));
    isa = rank.isa;
    try {
      rank.connect([]);
      for (const tokens of [1, batch]) {
        const typical = await typicalStep([rank], tokens);
        points.push({ threads, tokens, bytesPerSecond: bytes / (typical.computeUs / 1e6) });
        if (tokens === 1) stepSeconds = typical.fixedUs / 1e6;
      }
    } finally {
      await rank.dispose();
    }
  }
  return { isa, points, stepSeconds, sampleBytes: bytes };
}

/**
 * One reduction between two ranks of this process, over shared memory or over sealed tcp on loopback, publishing, waiting and joining included: what a step of two equal ranks takes longer than the step
 * of one rank alone with the same amount of work, at one token and at eight.
 * @returns null where it cannot be measured: with one core
 */
export async function measureReduction(options: MeasureOptions, driver: 'shm' | 'tcp' = 'shm'): Promise<LinkSpeed | null> {
  const { cores, activations, kvType } = options;
  const [first, second] = cores;
  if (first === undefined || second === undefined) return null;
  const facts = linkFacts(options.facts);
  const cut = cutModel(unitsOfModel(facts), { count: 2, parts: null }, { count: 1, parts: null });
  const pair: MeasuredRank[] = [];
  const tcp: NativeTcp[] = [];
  const half = halfOf(facts);
  const alone = await loadRank(options, half, wholeProgram(half, options), [first]);
  try {
    for (const [rank, core] of [first, second].entries()) {
      const program = buildProgram(facts, cut, { stage: 0, rank, activations, kvType, contextTokensMax: contextTokens });
      pair.push(await loadRank(options, facts, program, [core]));
    }
    const segments = pair.map((rank) => rank.openSegment());
    if (driver === 'tcp') await meet(options.addon, tcp);
    for (const [self, rank] of pair.entries())
      rank.connect(
        segments.flatMap((segment, other): PeerLink[] =>
          other === self
            ? []
            : [{ peer: { stage: 0, rank: other }, ...(driver === 'tcp' ? { driver } : { driver, ...segment }) }],
        ),
        tcp[self],
      );
    alone.connect([]);
    // Embedding rows and logits are exchanged as well.
    const exchanges = 2 * facts.layers + 2;
    const cost = async (tokens: number): Promise<number> =>
      ((await typicalStep(pair, tokens)).computeUs - (await typicalStep([alone], tokens)).computeUs) / 1e6 / exchanges;
    const small = Math.max(await cost(1), exchangeSecondsMin);
    const large = Math.max(await cost(batch), small);
    const vectorBytes = facts.hiddenSize * 4;
    // A copy between two cores is never faster than this; noise may say so.
    const bytesPerSecond = Math.min(((batch - 1) * vectorBytes) / (large - small), copyBytesPerSecondMax);
    return { seconds: Math.max(small - vectorBytes / bytesPerSecond, exchangeSecondsMin), bytesPerSecond };
  } finally {
    await Promise.all([alone, ...pair].map((rank) => rank.dispose()));
    for (const endpoint of tcp) endpoint.close();
  }
}

/** Two endpoints with a connection between them. */
async function meet(addon: MeasureOptions['addon'], tcp: NativeTcp[]): Promise<void> {
  for (let rank = 0; rank < 2; rank++) tcp.push(addon.openTcp('127.0.0.1', 0));
  const key = randomBytes(32);
  await Promise.all(
    tcp.map((endpoint, rank) => {
      const peers = [{ peer: { stage: 0, rank: 1 - rank }, address: `127.0.0.1:${tcp[1 - rank]?.port}` }];
      return endpoint.meet({ self: { stage: 0, rank }, epoch: 1, key, peers, timeoutMs: 2_000 });
    }),
  );
}

const exchangeSecondsMin = 0.3e-6;
const copyBytesPerSecondMax = 20e9;
const contextTokens = 64;
const blockTokens = 16;

/** Bytes of the matrices that a step of a program reads. */
export function matrixBytes(program: Pick<Program, 'weights'>, facts: Pick<ModelFacts, 'tensors' | 'sourceSha256'>): number {
  return sliceOf(program, facts)
    .entries.filter((entry) => program.weights[entry.weight]?.use === 'matrix')
    .reduce((sum, entry) => sum + entry.bytes, 0);
}

/** The program of one rank that holds all of a model. */
function wholeProgram(facts: ModelFacts, { activations, kvType }: Pick<MeasureOptions, 'activations' | 'kvType'>): Program {
  const cut = cutModel(unitsOfModel(facts), { count: 1, parts: null }, { count: 1, parts: null });
  return buildProgram(facts, cut, { stage: 0, rank: 0, activations, kvType, contextTokensMax: contextTokens });
}

/** A model of the same shapes and types with as few layers as fit `bytesMax`; head and, where one layer is too large, feed-forward and heads shrink too. */
export function sampleFacts(facts: ModelFacts, bytesMax: number): ModelFacts {
  let sample = { ...facts, layers: 1 };
  const layerBytes = (one: ModelFacts): number =>
    sum(
      resized(one)
        .filter(inLayers)
        .map((tensor) => tensor.bytes),
    );
  const restBytes = (one: ModelFacts): number =>
    sum(
      resized(one)
        .filter((tensor) => !inLayers(tensor))
        .map((tensor) => tensor.bytes),
    );
  while (restBytes(sample) > bytesMax / 2 && sample.vocabularySize > 2_048)
    sample = { ...sample, vocabularySize: Math.max(2_048, Math.ceil(sample.vocabularySize / 2)) };
  while (layerBytes(sample) > bytesMax && (sample.feedForwardSize > 1_024 || sample.kvHeads > 1)) {
    const kvHeads = Math.max(1, sample.kvHeads >> 1);
    sample = {
      ...sample,
      feedForwardSize: sample.feedForwardSize > 1_024 ? (sample.feedForwardSize >> 9) << 8 : sample.feedForwardSize,
      kvHeads,
      heads: (sample.heads / sample.kvHeads) * kvHeads,
    };
  }
  const layers = Math.floor((bytesMax - restBytes(sample)) / layerBytes(sample));
  return finished({ ...sample, layers: Math.min(facts.layers, Math.max(1, layers)) });
}

/** Few small layers with the hidden size of the model: what is left of a step is reductions. */
export function linkFacts(facts: ModelFacts): ModelFacts {
  return finished({
    ...facts,
    layers: Math.min(facts.layers, 8),
    kvHeads: 2,
    heads: 2,
    feedForwardSize: 512,
    vocabularySize: 2_048,
  });
}

/** What each of two equal ranks of `linkFacts` has to do. */
const halfOf = (facts: ModelFacts): ModelFacts =>
  finished({
    ...facts,
    heads: 1,
    kvHeads: 1,
    feedForwardSize: facts.feedForwardSize / 2,
    vocabularySize: facts.vocabularySize / 2,
  });

const finished = (facts: ModelFacts): ModelFacts => ({ ...facts, tensors: resized(facts) });

const inLayers = (tensor: Pick<TensorFacts, 'name'>): boolean => tensor.name.startsWith('blk.');

/** The tensors of the layers that are left, in the shapes that the hyper-parameters now say. */
function resized(facts: ModelFacts): TensorFacts[] {
  const { hiddenSize, headSize, heads, kvHeads, feedForwardSize, vocabularySize } = facts;
  const sizes: Record<string, number[]> = {
    token_embd: [hiddenSize, vocabularySize],
    output: [hiddenSize, vocabularySize],
    attn_q: [hiddenSize, heads * headSize],
    attn_k: [hiddenSize, kvHeads * headSize],
    attn_v: [hiddenSize, kvHeads * headSize],
    attn_output: [heads * headSize, hiddenSize],
    ffn_gate: [hiddenSize, feedForwardSize],
    ffn_up: [hiddenSize, feedForwardSize],
    ffn_down: [feedForwardSize, hiddenSize],
  };
  let offset = 0;
  return facts.tensors.flatMap((tensor) => {
    const [, layer, name = '', kind] = /^(?:blk\.(\d+)\.)?(\w+)\.(\w+)$/.exec(tensor.name) ?? [];
    if (layer !== undefined && Number(layer) >= facts.layers) return [];
    const size = sizes[name];
    // A bias is as long as its matrix has rows.
    const shape = size ? (kind === 'bias' ? size.slice(1) : size) : tensor.shape;
    const type = fitting(tensor.type, shape[0] ?? 0);
    const bytes = rowBytes(type, shape[0] ?? 0) * shape.slice(1).reduce((product, rows) => product * rows, 1);
    const placed = { name: tensor.name, type, shape, offset, bytes };
    offset += bytes;
    return [placed];
  });
}

/** The type itself, or for rows that are no whole blocks of it, the one of blocks of 32 nearest to it. */
function fitting(type: TensorType, columns: number): TensorType {
  if (columns % quantType(type).blockValues === 0) return type;
  return type === 'Q4_K' ? 'Q4_1' : type === 'Q5_K' ? 'Q5_1' : 'Q8_0';
}

/** Blocks of one type: random integers, small scales, no infinities. */
export function generatedBlocks(type: TensorType, bytes: number): Uint8Array {
  const { blockBytes, scaleOffsets } = quantType(type);
  const pattern = new Uint8Array(Math.min(bytes, 512 * blockBytes));
  const view = new DataView(pattern.buffer);
  if (scaleOffsets.length === 0) {
    // 0.0625 with alternating signs, in the format's own bits: sums stay small.
    const bits = { F32: 0x3d80_0000, F16: 0x2c00, BF16: 0x3d80 }[type as 'F32' | 'F16' | 'BF16'];
    for (let at = 0, index = 0; at < pattern.length; at += blockBytes, index++)
      if (blockBytes === 4) view.setUint32(at, index % 2 ? bits : (bits | 0x8000_0000) >>> 0, true);
      else view.setUint16(at, index % 2 ? bits : bits | 0x8000, true);
  } else {
    let state = 0x2545_f491;
    for (let at = 0; at < pattern.length; at++) {
      state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
      pattern[at] = state >>> 24;
    }
    for (let block = 0; block + blockBytes <= pattern.length; block += blockBytes)
      for (const offset of scaleOffsets) view.setUint16(block + offset, 0x1400, true);
  }
  const blocks = new Uint8Array(bytes);
  for (let at = 0; at < bytes; at += pattern.length) blocks.set(pattern.subarray(0, Math.min(pattern.length, bytes - at)), at);
  return blocks;
}

interface StepTime {
  /** The step without sampling. */
  computeUs: number;
  /** Sampling, and from the event loop to the compute thread and back. */
  fixedUs: number;
}

/** An executor with generated weights, and its steps as promises. */
interface MeasuredRank {
  readonly isa: string;
  openSegment(): { pid: number; fd: number; bytes: number };
  connect(peers: PeerLink[], tcp?: NativeTcp): void;
  step(input: StepInput): Promise<StepDone>;
  readonly lastStep: number;
  dispose(): Promise<void>;
}

async function loadRank(options: MeasureOptions, facts: ModelFacts, program: Program, cores: number[]): Promise<MeasuredRank> {
  let lastStep = 0;
  const waiting = new Map<number, { resolve: (done: StepDone) => void; reject: (error: Error) => void }>();
  const settings: ExecutorOptions = {
    kind: options.kind,
    isa: options.isa,
    program,
    cores,
    threads: cores.length,
    spin: true,
    blockTokens,
    kvBlocks: batch * Math.ceil(contextTokens / blockTokens),
    stepTokensMax: batch,
    sequencesMax: batch,
  };
  const executor = options.addon.createExecutor(settings, {
    onStep: (done) => waiting.get(done.step)?.resolve(done),
    onFrame: () => undefined,
    onStepFailed: (step, code, message) => waiting.get(step)?.reject(new Error(`a measured step failed (${code}): ${message}`)),
  });
  try {
    for (const { weight, type, bytes } of sliceOf(program, facts).entries)
      await executor.loadWeight(weight, generatedBlocks(type, bytes));
  } catch (error) {
    await executor.dispose();
    throw error;
  }
  return {
    isa: executor.isa,
    get lastStep() {
      return lastStep;
    },
    openSegment: () => executor.openSegment(),
    connect: (peers, tcp) => {
      if (peers.length === 0) executor.openSegment();
      executor.connect(peers, tcp);
      executor.openSlots(
        Array.from({ length: batch }, (_, slot) => ({
          slot,
          sampling: greedy,
          promptTokens: Int32Array.of(0),
          outputTokens: new Int32Array(0),
        })),
      );
    },
    step: (input) =>
      new Promise((resolve, reject) => {
        lastStep = input.step;
        waiting.set(input.step, { resolve, reject });
        executor.submit(input);
      }),
    dispose: () => executor.dispose(),
  };
}

const greedy: SlotSampling = {
  temperature: 0,
  topP: 1,
  topK: 0,
  minP: 0,
  seed: 0n,
  choice: 0,
  repetitionPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  logitBias: [],
  logprobs: null,
};

/** Of several steps at the same positions, the middle one: a mesh runs at the pace of typical steps, not of the luckiest. Steps of `ranks` run at the same time. */
async function typicalStep(ranks: readonly MeasuredRank[], tokens: number): Promise<StepTime> {
  const computeUs: number[] = [];
  const fixedUs: number[] = [];
  const begin = performance.now();
  for (let repeat = 0; repeat <= repeatsMax; repeat++) {
    const submitted = performance.now();
    const input = decodeStep(Math.max(...ranks.map((rank) => rank.lastStep)) + 1, tokens);
    const done = await Promise.all(ranks.map((rank) => rank.step(input)));
    const wallUs = (performance.now() - submitted) * 1000;
    // The first step warms caches and pages up.
    if (repeat === 0) continue;
    const total = Math.max(...done.map(({ timings }) => timings.totalUs));
    const sample = Math.max(...done.map(({ timings }) => timings.sampleUs));
    computeUs.push(total - sample);
    fixedUs.push(sample + Math.max(0, wallUs - total));
    if (repeat >= repeatsMin && performance.now() - begin > pointMs) break;
  }
  return { computeUs: median(computeUs), fixedUs: median(fixedUs) };
}

/** One token of each of `tokens` sequences at position 0. */
function decodeStep(step: number, tokens: number): StepInput {
  const sequence = Int32Array.from({ length: tokens }, (_, index) => index);
  return {
    step,
    tokenIds: sequence,
    tokenSteps: new Int32Array(tokens),
    positions: new Int32Array(tokens),
    rowSequence: sequence,
    slots: sequence,
    blockTableOffsets: Int32Array.from({ length: tokens + 1 }, (_, index) => index),
    blockTables: sequence,
    outputs: outputNumbers(Array.from(sequence, (row) => ({ row, score: null, banned: [] }))),
    waitTimeoutMs: 5_000,
  };
}

const sum = (values: readonly number[]): number => values.reduce((total, value) => total + value, 0);
