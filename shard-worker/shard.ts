/**
 * A loaded shard: the program of one rank, its weights in an executor, and what it takes to serve epochs with it. It outlives epochs: as long as an
 * assignment asks for the same shard, weights stay where they are.
 */
import type { ExecutorCallbacks, ExecutorOptions, NativeAddon, NativeExecutor, WeightReport } from '../kernels/binding-types.ts';
import { parseModelFacts, type ModelFacts } from '../kernels/model-file/model-facts.ts';
import { buildProgram } from '../kernels/programs/index.ts';
import type { Program } from '../kernels/programs/program.ts';
import { ShardmeshError } from '../protocol/errors.ts';
import { frameHeaderBytes } from '../protocol/frame-codec.ts';
import type { Assign } from '../protocol/messages.ts';
import type { SliceOrigin, SliceSource } from './weights/slice-source.ts';

export interface Shard {
  /** Equal for assignments that this shard can serve. */
  key: string;
  program: Program;
  executor: NativeExecutor;
  kvBlocks: number;
  sliceSha256: string;
  tablesChecksum: string;
  bytesFetched: number;
  loadMs: number;
}

export interface LoadShardOptions {
  assign: Assign;
  addon: NativeAddon;
  /** Used where the assignment names no cores. */
  cores: number[];
  threads: number;
  /** `ExecutorOptions.cudaTuning`, null: there is none. */
  cudaTuning: string | null;
  callbacks: ExecutorCallbacks;
  /** Nobody wants to hear of the end of a step but who has its result to send. */
  quietSteps: boolean;
  openSlice(
    assign: Assign,
    facts: ModelFacts,
    program: Program,
    onProgress: SliceProgress,
    signal: AbortSignal,
  ): Promise<SliceSource>;
  onProgress: SliceProgress;
  signal: AbortSignal;
}

export type SliceProgress = (bytesDone: number, bytesTotal: number, source: SliceOrigin) => void;

/** What makes two assignments the same shard. */
export function shardKey(assign: Assign): string {
  const { placement, stage, rank, sliceSha256, executor, isa, cores, spin, blockTokens, kvBlocks, kvCacheBytes, kvType } = assign;
  const stages = placement.stages.map(({ layers, ranks }) => ({
    layers,
    ranks: ranks.map(({ worker: _, ...units }) => units),
  }));
  const { bits, activations, contextTokensMax, stepTokensMax, sequencesMax } = assign;
  const limits = {
    blockTokens,
    kvBlocks,
    kvCacheBytes,
    bits,
    activations,
    kvType,
    contextTokensMax,
    stepTokensMax,
    sequencesMax,
  };
  const { wire } = placement;
  return JSON.stringify({ stages, wire, stage, rank, sliceSha256, executor, isa, cores, spin, limits });
}

/**
 * Builds the program, gets the slice, checks its digest and loads it.
 * @throws {ShardmeshError} `digest_mismatch` before any kernel has run on the weights; `load_failed`; {ModelFileError}
 */
export async function loadShard(options: LoadShardOptions): Promise<Shard> {
  const { assign, addon, callbacks, signal } = options;
  const started = performance.now();
  const facts = parseModelFacts(assign.model);
  const { stage, rank, bits, activations, kvType, contextTokensMax } = assign;
  const cut = { stages: assign.placement.stages };
  const program = buildProgram(facts, cut, { stage, rank, bits, activations, kvType, contextTokensMax });
  const kvBlocks = assign.kvBlocks || blocksThatFit(addon, program, assign);
  const slice = await options.openSlice(assign, facts, program, options.onProgress, signal);
  const executor = addon.createExecutor(executorOptions(assign, program, kvBlocks, options), callbacks);
  try {
    const loads: Promise<WeightReport>[] = [];
    for await (const { index, data } of slice.weights()) {
      signal.throwIfAborted();
      loads.push(executor.loadWeight(index, data));
      // Two slices in hand at a time: one is read while the other is repacked.
      if (loads.length > 1) await loads.shift();
    }
    await Promise.all(loads);
    const sliceSha256 = slice.sha256();
    if (sliceSha256 !== assign.sliceSha256)
      throw new ShardmeshError(
        'digest_mismatch',
        `the slice of stage ${assign.stage} rank ${assign.rank} has sha256 ${sliceSha256}, expected ${assign.sliceSha256}`,
      );
    return {
      key: shardKey(assign),
      program,
      executor,
      kvBlocks,
      sliceSha256,
      tablesChecksum: executor.tablesChecksum(),
      bytesFetched: slice.bytesFetched,
      loadMs: Math.round(performance.now() - started),
    };
  } catch (error) {
    await executor.dispose();
    throw error;
  } finally {
    await slice.close();
  }
}

function blocksThatFit(addon: NativeAddon, program: Program, assign: Assign): number {
  const bytesPerBlock = addon.kvBytesPerBlock(program, assign.blockTokens);
  const blocks = Math.floor(assign.kvCacheBytes / bytesPerBlock);
  const needed = Math.ceil(program.contextTokensMax / assign.blockTokens);
  if (blocks < needed)
    throw new ShardmeshError(
      'load_failed',
      `--kv-cache-bytes ${assign.kvCacheBytes} holds ${blocks} blocks of ${assign.blockTokens} tokens; one sequence of ${program.contextTokensMax} tokens needs ${needed}. ` +
        `Give at least ${needed * bytesPerBlock} bytes, or lower --context-tokens-max`,
    );
  return blocks;
}

/** Rank 0 of the last stage: it samples. */
export const sendsResults = ({ placement, stage, rank }: Assign): boolean => rank === 0 && stage === placement.stages.length - 1;

function executorOptions(
  assign: Assign,
  program: Program,
  kvBlocks: number,
  own: Pick<LoadShardOptions, 'cores' | 'threads' | 'quietSteps' | 'cudaTuning'>,
): ExecutorOptions {
  const cores = assign.cores.length ? assign.cores : own.cores;
  const kind = assign.executor === 'reference' || assign.executor === 'cuda' ? assign.executor : 'cpu';
  return {
    kind,
    isa: kind === 'cpu' ? (assign.isa as ExecutorOptions['isa']) : null,
    program,
    wire: assign.placement.wire,
    ranksPerStage: assign.placement.stages.map((stage) => stage.ranks.length),
    cores,
    threads: cores.length || own.threads,
    spin: assign.spin,
    blockTokens: assign.blockTokens,
    kvBlocks,
    stepTokensMax: assign.stepTokensMax,
    sequencesMax: assign.sequencesMax,
    quietSteps: own.quietSteps && !sendsResults(assign),
    frameGap: frameHeaderBytes,
    ...(kind === 'cuda' && own.cudaTuning !== null ? { cudaTuning: own.cudaTuning } : {}),
  };
}
