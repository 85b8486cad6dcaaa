/**
 * One list of tokens that is being extended for a request. The scheduler owns every mutable field.
 *
 *                      computed            planned      tokens.length
 *   position  0 ........... | .............. | ............ |
 *              K/V is there   rows of steps    known, not     known = prompt, then every output token that came back
 *              (step is back) in flight        planned yet
 *
 * While a decode step is in flight, `planned` may pass `tokens.length`: those rows take the token that an earlier step in flight samples, or are drafts, and then
 * `planned` falls back behind what was right when the step is back.
 */
import type { SamplingParams, StepOutput } from '../../protocol/step-plan.ts';
import type { BlockDigest } from '../kv-cache/prefix-cache.ts';
import type { PromptLookup } from './prompt-lookup.ts';

/** held: waits for another choice of its request to compute the prompt. preempted: lost its blocks, waits, and will prefill again. */
export type SequenceState = 'held' | 'waiting' | 'running' | 'preempted' | 'finished';

/** What a new sequence is made of. Token lists are taken over, not copied: hand over a list of its own. */
export interface SequenceSpec {
  /** API key id. */
  tenant: string;
  promptTokens: number[];
  sampling: SamplingParams;
  /** 0: only the prompt is computed. */
  outputTokensMax: number;
  outputTokensMin: number;
  /** Tokens that end the sequence, and that are banned below `outputTokensMin`. */
  stopTokens: ReadonlySet<number>;
  /** The log-probability of every prompt token is wanted: the prefix cache is not read until all have come back. */
  scorePrompt: boolean;
}

export interface Sequence extends Readonly<SequenceSpec> {
  /** Order of arrival, and the sequence's name in the coordinator. */
  readonly id: number;
  readonly promptLength: number;
  /** Its turn for prompt rows: the lowest comes first. */
  readonly turn: number;
  /** Prompt tokens, then the output tokens that came back. */
  readonly tokens: number[];
  state: SequenceState;
  /** Keeps what it has but gets no rows: its reader is too slow. Loses its blocks before anybody else does. */
  paused: boolean;
  /** While running: its name on the workers. */
  slot: number;
  /** Block table, in position order. */
  blocks: number[];
  /** First block that no plan has named yet. */
  blocksAnnounced: number;
  /** Positions whose rows are in a plan. */
  planned: number;
  /** Positions whose step has come back. */
  computed: number;
  /** Leading blocks that are in the prefix cache, or whose content another block already stands for. */
  blocksRegistered: number;
  readonly digests: BlockDigest[];
  /** Raised whenever it is admitted: what a step of an earlier life brings is ignored. */
  life: number;
  /** Steps in flight of this life that hold rows of it. */
  stepsInFlight: number;
  /** Its rows in flight have drafts: where the next ones begin is not known before they are back. */
  drafted: boolean;
  /** Newest step that holds rows of it; 0 = none. */
  lastStep: number;
  /** Prompt tokens that the prefix cache saved at its first admission; null = not admitted yet. */
  cachedTokens: number | null;
  /** Log-probability of prompt token i; 0 and what has not come back are null. Empty unless `scorePrompt`. */
  readonly promptScores: (StepOutput | null)[];
  /** Prompt tokens that have no score yet. */
  scoresMissing: number;
  promptComputed: boolean;
  /** Choices of the same request that wait for this one's prompt. */
  followers: Sequence[];
  preemptions: number;
  /** null: nobody has asked for drafts lately. */
  lookup: PromptLookup | null;
  /** Clock of `schedule` at the first admission. */
  admittedAt: number | null;
}

export function createSequence(id: number, turn: number, spec: SequenceSpec, state: 'waiting' | 'held'): Sequence {
  // Written out: an object that begins with a spread has slow properties, and the scheduler reads them 1,024 times a step.
  return {
    tenant: spec.tenant,
    promptTokens: spec.promptTokens,
    sampling: spec.sampling,
    outputTokensMax: spec.outputTokensMax,
    outputTokensMin: spec.outputTokensMin,
    stopTokens: spec.stopTokens,
    scorePrompt: spec.scorePrompt,
    id,
    promptLength: spec.promptTokens.length,
    turn,
    tokens: spec.promptTokens.slice(),
    state,
    paused: false,
    slot: -1,
    blocks: [],
    blocksAnnounced: 0,
    planned: 0,
    computed: 0,
    blocksRegistered: 0,
    digests: [],
    life: 0,
    stepsInFlight: 0,
    drafted: false,
    lastStep: 0,
    cachedTokens: null,
    promptScores: spec.scorePrompt ? new Array<StepOutput | null>(spec.promptTokens.length).fill(null) : [],
    scoresMissing: spec.scorePrompt ? spec.promptTokens.length - 1 : 0,
    promptComputed: false,
    followers: [],
    preemptions: 0,
    lookup: null,
    admittedAt: null,
  };
}

/** Output tokens that came back. */
export const outputCount = (sequence: Sequence): number => sequence.tokens.length - sequence.promptLength;

/**
 * Positions that are worth computing with what is known now. The last token of a sequence is never computed (nothing follows it), so scoring alone
 * stops one short of the prompt.
 */
export const knownTarget = (sequence: Sequence): number =>
  sequence.outputTokensMax === 0 ? sequence.promptLength - 1 : sequence.tokens.length;

/** Most positions that are ever computed: room in blocks that the sequence may need. */
export const positionsMax = (spec: Pick<SequenceSpec, 'promptTokens' | 'outputTokensMax'>): number =>
  spec.promptTokens.length + spec.outputTokensMax - 1;

/** Index of the output token that a row at `position` samples, counted from 0. */
export const outputIndex = (sequence: Sequence, position: number): number => position + 1 - sequence.promptLength;

/** Penalties need the tokens themselves on the worker. */
export const needsTokens = ({ repetitionPenalty, presencePenalty, frequencyPenalty }: SamplingParams): boolean =>
  repetitionPenalty !== 1 || presencePenalty !== 0 || frequencyPenalty !== 0;
