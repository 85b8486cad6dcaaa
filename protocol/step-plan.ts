/** A step: one forward pass of one micro-batch. The same plan goes to every worker of a placement, in one publish. */

export interface SamplingParams {
  /** 0 = greedy. */
  temperature: number;
  topP: number;
  /** 0 = off. */
  topK: number;
  minP: number;
  /** 64 bit, unsigned, as decimal or bigint. */
  seed: bigint;
  /** Index among the `n` choices of a request. */
  choice: number;
  repetitionPenalty: number;
  presencePenalty: number;
  frequencyPenalty: number;
  logitBias: [number, number][];
  logprobs: number | null;
}

/** Full data of a sequence that a worker does not know yet (new, or back after preemption or recovery). */
export interface SequenceOpen {
  /** Index below `sequencesMax`, the sequence's name on the workers while it runs. */
  slot: number;
  sampling: SamplingParams;
  /** Only when a penalty needs them, else empty: tokens of the prompt, and tokens generated before. */
  promptTokens: number[];
  outputTokens: number[];
}

export interface PlannedOutput {
  /** Row within this sequence's rows of the step. */
  row: number;
  /** Token id to score (prompt log-probabilities); null = sample the next token. */
  score: number | null;
  banned: number[];
}

/**
 * Rows of one sequence in a step. When several of them sample, the tokens of all but the first are drafts: each stands for what the row before it will sample, and
 * its own output comes back only if that is so.
 */
export interface PlannedSequence {
  slot: number;
  /** Absolute position of the first row. */
  position: number;
  /** Literal ids of a prefill chunk; null: one row, whose token is the one that step `after` commits. */
  tokens: number[] | null;
  after: number;
  /** Block ids appended to the sequence's table by this step (the whole table when the sequence is in `opened`). */
  newBlocks: number[];
  outputs: PlannedOutput[];
}

/** How many of the sequence's tokens are drafts: its last ones. */
export const draftCount = ({ outputs }: PlannedSequence): number =>
  outputs.length > 1 && outputs[0]!.score === null ? outputs.length - 1 : 0;

export interface StepPlan {
  type: 'step_plan';
  placement: string;
  epoch: number;
  /** Ascending from 1 within the epoch, no gaps. */
  step: number;
  opened: SequenceOpen[];
  /** Slots whose sequence ended; applied before `opened`. */
  closed: number[];
  sequences: PlannedSequence[];
  /** Longest a worker may wait for a peer inside this step. */
  waitTimeoutMs: number;
  /** The result need not leave before that of the next step, which is published already. */
  resultWaits: boolean;
}

/** What travels: plans of steps that follow each other, as many as there is something to plan for. */
export interface StepPlans {
  type: 'step_plans';
  plans: StepPlan[];
}

export interface StepOutput {
  slot: number;
  token: number;
  logprob: number | null;
  top: { token: number; logprob: number }[];
}

/** From rank 0 of the last stage, once a step. Outputs in the order of the plan's sequences and their `outputs`, without those of rejected drafts. */
export interface StepResult {
  type: 'step_result';
  placement: string;
  epoch: number;
  step: number;
  outputs: StepOutput[];
  totalUs: number;
  collectiveUs: number;
  receiveUs: number;
  sampleUs: number;
  idleUs: number;
}
