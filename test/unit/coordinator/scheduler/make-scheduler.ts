import { BlockPool } from '../../../../coordinator/kv-cache/block-pool.ts';
import { PrefixCache } from '../../../../coordinator/kv-cache/prefix-cache.ts';
import { Scheduler, type SchedulerOptions } from '../../../../coordinator/scheduler/scheduler.ts';
import type { SequenceSpec } from '../../../../coordinator/scheduler/sequence.ts';
import type { SamplingParams, StepOutput, StepPlan, StepResult } from '../../../../protocol/step-plan.ts';

export const greedy: SamplingParams = {
  temperature: 0,
  topP: 1,
  topK: 0,
  minP: 0,
  seed: 1n,
  choice: 0,
  repetitionPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  logitBias: [],
  logprobs: null,
};

export interface MakeScheduler extends Partial<Omit<SchedulerOptions, 'pool' | 'cache'>> {
  blocks?: number;
  cache?: boolean;
}

/** 16-token blocks, one stage, one step in flight, a budget of 64 rows, no prefix cache, unless said otherwise. */
export function makeScheduler({ blocks = 64, cache: cached = false, ...options }: MakeScheduler = {}) {
  let cache: PrefixCache | null = null;
  const pool = new BlockPool(blocks, (block) => cache?.forget(block));
  const blockTokens = options.blockTokens ?? 16;
  if (cached) {
    const identity = { modelSha256: 'ab', activations: 'int8', kvType: 'int8', arithmetic: '1' };
    cache = new PrefixCache({ pool, blockTokens, secret: new Uint8Array(32), identity });
  }
  const scheduler = new Scheduler({
    placement: 'placement',
    epoch: 1,
    pool,
    cache,
    blockTokens,
    sequencesMax: 16,
    stepTokensMax: 64,
    prefillChunkMax: 64,
    stepOutputsMax: 64,
    microBatches: () => 1,
    prefillTokensMax: () => Number.POSITIVE_INFINITY,
    stepsInFlightMax: 1,
    sequenceStepsMax: 1,
    speculation: null,
    waitTimeoutMs: () => 2000,
    ...options,
  });
  return { scheduler, pool, cache };
}

/** Prompt tokens are firstToken, firstToken + 1, ... */
export function makeSequence({
  promptTokens = 16,
  firstToken = 100,
  outputTokensMax = 8,
  stopTokens = [] as number[],
  ...rest
}: {
  promptTokens?: number;
  firstToken?: number;
  outputTokensMax?: number;
  stopTokens?: number[];
  tenant?: string;
  outputTokensMin?: number;
  scorePrompt?: boolean;
  sampling?: SamplingParams;
} = {}): SequenceSpec {
  return {
    tenant: 'tenant',
    promptTokens: Array.from({ length: promptTokens }, (_, i) => firstToken + i),
    sampling: greedy,
    outputTokensMax,
    outputTokensMin: 0,
    stopTokens: new Set(stopTokens),
    scorePrompt: false,
    ...rest,
  };
}

/** The result of a plan in which every sampled token is `token`. */
export function resultOf(plan: StepPlan, token = 7): StepResult {
  const outputs: StepOutput[] = plan.sequences.flatMap(({ slot, outputs }) =>
    outputs.map(({ score }) => ({ slot, token: score ?? token, logprob: -1, top: [] })),
  );
  const { placement, epoch, step } = plan;
  const timings = { totalUs: 1000, collectiveUs: 0, receiveUs: 0, sampleUs: 0, idleUs: 0 };
  return { type: 'step_result', placement, epoch, step, outputs, ...timings };
}
