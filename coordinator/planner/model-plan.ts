/**
 * A model cut for a mesh: the facts of its file, the cut, and one seat a rank with its program and the digest its slice must have. Made once, before any worker
 * joins; epochs only change who sits where.
 */
import type { ModelFacts } from '../../kernels/model-file/model-facts.ts';
import { rememberedSliceSha256, sliceOf, type Slice } from '../../kernels/model-file/slice.ts';
import {
  buildProgram,
  cutModel,
  CutError,
  unitsOfModel,
  type CutShares,
  type KvType,
  type ModelCut,
} from '../../kernels/programs/index.ts';
import type { ActivationType, Program } from '../../kernels/programs/program.ts';
import { ShardmeshError } from '../../protocol/errors.ts';
import type { Seat } from '../mesh/mesh.ts';

export interface SeatPlan extends Seat {
  program: Program;
  slice: Slice;
  sliceSha256: string;
}

export interface ModelPlan {
  facts: ModelFacts;
  cut: ModelCut;
  seats: SeatPlan[];
}

export interface ModelPlanOptions {
  tensorParallel: CutShares;
  pipelineParallel: CutShares;
  bits: Program['bits'];
  activations: ActivationType;
  kvType: KvType;
  contextTokensMax: number | null;
}

/** @throws {ShardmeshError} `placement_impossible`: the model has fewer units than the shares ask for */
export function cutForShares(facts: ModelFacts, { tensorParallel, pipelineParallel }: ModelPlanOptions): ModelCut {
  try {
    return cutModel(unitsOfModel(facts), tensorParallel, pipelineParallel);
  } catch (error) {
    if (error instanceof CutError) throw new ShardmeshError('placement_impossible', error.message, { cause: error });
    throw error;
  }
}

/** Reads the weights of every rank once to know the digests (remembered in the cache directory for the next start). */
export async function planModel(
  facts: ModelFacts,
  modelPath: string,
  cacheDirectory: string,
  options: ModelPlanOptions,
): Promise<ModelPlan> {
  const cut = cutForShares(facts, options);
  const seats: SeatPlan[] = [];
  for (const [stage, { ranks }] of cut.stages.entries())
    for (const rank of ranks.keys()) {
      const program = buildProgram(facts, cut, {
        stage,
        rank,
        bits: options.bits,
        activations: options.activations,
        kvType: options.kvType,
        contextTokensMax: options.contextTokensMax,
      });
      const slice = sliceOf(program, facts);
      seats.push({ stage, rank, program, slice, sliceSha256: await rememberedSliceSha256(modelPath, slice, cacheDirectory) });
    }
  return { facts, cut, seats };
}
