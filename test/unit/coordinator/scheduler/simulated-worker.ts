/**
 * A test double of the whole mesh: applies plans in order, as workers do, and checks every rule that a plan must follow. K/V of a position is the
 * hash of all tokens up to it, kept in the block where the plan puts it, so a block that two sequences share wrongly shows at once. The next token is a
 * function of that hash and the sampling: what a sequence gets depends on nothing else. Texts of a high temperature repeat themselves, but not for ever.
 */
import type { PlannedSequence, SamplingParams, StepOutput, StepPlan, StepResult } from '../../../../protocol/step-plan.ts';

interface KvEntry {
  position: number;
  token: number;
  hash: number;
}

interface Slot {
  sampling: SamplingParams;
  table: number[];
  /** Token sampled by each step. */
  sampled: Map<number, number>;
  lastStep: number;
}

export const vocabularySize = 97;

const mix = (a: number, b: number): number => {
  let h = Math.imul(a ^ (b + 0x9e3779b9 + (a << 6) + (a >>> 2)), 0x85ebca6b);
  h ^= h >>> 13;
  h = Math.imul(h, 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
};

/** The token that follows a text of hash `hash` whose last token is `last`. Banned ids are stepped over. */
function sampleToken(hash: number, last: number, sampling: SamplingParams, banned: readonly number[]): number {
  const repeats = sampling.temperature > 1 && hash % 8 !== 0;
  const seed = Number(sampling.seed & 0xffffffffn);
  let token = repeats ? (last * 2 + seed) % 7 : mix(mix(hash, seed), sampling.choice) % vocabularySize;
  while (banned.includes(token)) token = (token + 1) % vocabularySize;
  return token;
}

export const scoreOf = (hash: number, token: number): number => -(mix(hash, token) % 1000) / 128;

/** Output tokens of a sequence that runs alone, computed without plans, blocks or steps. */
export function expectedTokens(spec: {
  promptTokens: readonly number[];
  sampling: SamplingParams;
  outputTokensMax: number;
  outputTokensMin: number;
  stopTokens: ReadonlySet<number>;
}): number[] {
  let hash = 0;
  let last = 0;
  for (const token of spec.promptTokens) hash = mix(hash, (last = token));
  const outputs: number[] = [];
  while (outputs.length < spec.outputTokensMax) {
    const token = sampleToken(hash, last, spec.sampling, outputs.length < spec.outputTokensMin ? [...spec.stopTokens] : []);
    outputs.push(token);
    if (spec.stopTokens.has(token)) break;
    hash = mix(hash, (last = token));
  }
  return outputs;
}

/** Scores of prompt tokens 1.. */
export function expectedScores(promptTokens: readonly number[]): number[] {
  const scores: number[] = [];
  let hash = 0;
  for (const [i, token] of promptTokens.entries()) {
    if (i > 0) scores.push(scoreOf(hash, token));
    hash = mix(hash, token);
  }
  return scores;
}

export interface SimulatedWorkerOptions {
  blocks: number;
  blockTokens: number;
  sequencesMax: number;
  stepTokensMax: number;
  prefillChunkMax: number;
  stepOutputsMax: number;
  stepsInFlightMax: number;
  sequenceStepsMax: number;
}

export class SimulatedWorker {
  readonly options: SimulatedWorkerOptions;
  readonly #slots = new Map<number, Slot>();
  readonly #kv: (KvEntry | undefined)[][];
  readonly #results: { result: StepResult; slots: number[] }[] = [];
  #lastStep = 0;
  rowsRun = 0;

  constructor(options: SimulatedWorkerOptions) {
    this.options = options;
    this.#kv = Array.from({ length: options.blocks }, () => new Array<KvEntry | undefined>(options.blockTokens).fill(undefined));
  }

  get stepsInFlight(): number {
    return this.#results.length;
  }

  /** Slots with rows in a step whose result was not taken yet. */
  get #busySlots(): number[] {
    return this.#results.flatMap(({ slots }) => slots);
  }

  /** Runs the step now; its result waits until it is taken. */
  publish(plan: StepPlan): void {
    const { options } = this;
    expectRule(plan.step === this.#lastStep + 1, `step ${plan.step} follows step ${this.#lastStep}`);
    this.#lastStep = plan.step;
    expectRule(this.#results.length < options.stepsInFlightMax, `more than ${options.stepsInFlightMax} steps in flight`);
    expectRule(plan.sequences.length > 0, 'an empty plan');
    for (const slot of plan.closed) {
      expectRule(this.#slots.has(slot), `slot ${slot} is closed but not open`);
      expectRule(!this.#busySlots.includes(slot), `slot ${slot} is closed while a step in flight uses it`);
      this.#slots.delete(slot);
    }
    for (const { slot, sampling } of plan.opened) {
      expectRule(slot >= 0 && slot < options.sequencesMax, `slot ${slot} of ${options.sequencesMax}`);
      expectRule(!this.#slots.has(slot), `slot ${slot} is opened twice`);
      expectRule(
        plan.sequences.some((sequence) => sequence.slot === slot),
        `slot ${slot} is opened without rows`,
      );
      this.#slots.set(slot, { sampling, table: [], sampled: new Map(), lastStep: 0 });
    }
    const rows = plan.sequences.reduce((sum, { tokens }) => sum + (tokens?.length ?? 1), 0);
    const outputCount = plan.sequences.reduce((sum, sequence) => sum + sequence.outputs.length, 0);
    expectRule(rows <= options.stepTokensMax, `${rows} rows in a step of at most ${options.stepTokensMax}`);
    expectRule(outputCount <= options.stepOutputsMax, `${outputCount} outputs in a step of at most ${options.stepOutputsMax}`);
    expectRule(new Set(plan.sequences.map(({ slot }) => slot)).size === plan.sequences.length, 'a slot twice in a step');
    this.rowsRun += rows;

    const outputs = plan.sequences.flatMap((sequence) => this.#run(plan.step, sequence));
    const slots = plan.sequences.map(({ slot }) => slot);
    for (const slot of slots) {
      const times = this.#busySlots.filter((busy) => busy === slot).length;
      expectRule(times < options.sequenceStepsMax, `slot ${slot} in more than ${options.sequenceStepsMax} steps in flight`);
    }
    const { placement, epoch, step } = plan;
    const timings = { totalUs: 1000, collectiveUs: 0, receiveUs: 0, sampleUs: 0, idleUs: 0 };
    this.#results.push({ result: { type: 'step_result', placement, epoch, step, outputs, ...timings }, slots });
  }

  /** Result of the oldest step that was not taken yet. */
  take(): StepResult {
    const next = this.#results.shift();
    if (next === undefined) throw new Error('no step in flight');
    return next.result;
  }

  #run(step: number, planned: PlannedSequence): StepOutput[] {
    const { blocks, blockTokens, prefillChunkMax } = this.options;
    const slot = this.#slots.get(planned.slot);
    if (slot === undefined) throw new Error(`slot ${planned.slot} is not open`);
    for (const block of planned.newBlocks) expectRule(block >= 0 && block < blocks, `block ${block} of ${blocks}`);
    slot.table.push(...planned.newBlocks);
    expectRule(new Set(slot.table).size === slot.table.length, `slot ${planned.slot} has a block twice`);

    let tokens = planned.tokens;
    if (tokens === null) {
      const token = slot.sampled.get(planned.after);
      if (token === undefined) throw new Error(`step ${planned.after} sampled nothing for slot ${planned.slot}`);
      tokens = [token];
    }
    expectRule(tokens.length >= 1 && tokens.length <= prefillChunkMax, `a chunk of ${tokens.length} rows`);
    let hash = this.#checkedHash(slot, planned.position);
    const outputs: StepOutput[] = [];
    let asked = 0;
    /** Sampled by the row before. */
    let last: number | null = null;
    let rejected = false;
    for (const [row, token] of tokens.entries()) {
      const position = planned.position + row;
      hash = mix(hash, token);
      const block = slot.table[Math.floor(position / blockTokens)];
      if (block === undefined) throw new Error(`no block for position ${position} of slot ${planned.slot}`);
      this.#kv[block]![position % blockTokens] = { position, token, hash };
      for (const output of planned.outputs.filter((candidate) => candidate.row === row)) {
        asked++;
        const isDraft = output.score === null && last !== null;
        if (isDraft) expectRule(row === planned.outputs[0]!.row + asked - 1, `row ${row} is a draft behind no row that samples`);
        if (isDraft && token !== last) rejected = true;
        if (rejected) continue;
        const sampled: number = output.score ?? sampleToken(hash, token, slot.sampling, output.banned);
        if (output.score === null) slot.sampled.set(step, (last = sampled));
        outputs.push({ slot: planned.slot, token: sampled, logprob: scoreOf(hash, sampled), top: [] });
      }
    }
    expectRule(asked === planned.outputs.length, `${planned.outputs.length} outputs asked, rows for ${asked}`);
    slot.lastStep = step;
    return outputs;
  }

  /** Hash of the text before `position`, read back from the blocks; throws when any of it is missing or of another sequence. */
  #checkedHash(slot: Slot, position: number): number {
    const { blockTokens } = this.options;
    let hash = 0;
    for (let i = 0; i < position; i++) {
      const block = slot.table[Math.floor(i / blockTokens)];
      const entry = block === undefined ? undefined : this.#kv[block]![i % blockTokens];
      expectRule(
        entry?.position === i && entry.hash === mix(hash, entry.token),
        `position ${i} of block ${block} was overwritten`,
      );
      hash = entry!.hash;
    }
    return hash;
  }
}

function expectRule(holds: boolean, rule: string): void {
  if (!holds) throw new Error(`a plan broke a rule: ${rule}`);
}
