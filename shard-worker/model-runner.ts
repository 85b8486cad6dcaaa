/**
 * Turns step plans into steps of the native executor. It keeps, for each open slot, the block table that plans extend; everything else about a sequence
 * (sampling state, sampled ids, K/V) lives in the executor.
 */
import type { NativeExecutor, OutputRow, SlotOpen, StepInput } from '../kernels/binding-types.ts';
import type { PlannedSequence, SequenceOpen, StepPlan } from '../protocol/step-plan.ts';

/** A plan that contradicts what this worker knows: the coordinator and the worker no longer agree, the epoch must end. */
export class PlanError extends Error {
  constructor(message: string) {
    super(message);
    this.name = 'PlanError';
  }
}

export interface ModelRunnerOptions {
  kvBlocks: number;
  stepTokensMax: number;
  sequencesMax: number;
}

export class ModelRunner {
  readonly #executor: Pick<NativeExecutor, 'openSlots' | 'closeSlots' | 'submit'>;
  readonly #options: ModelRunnerOptions;
  /** Block table of each open slot. */
  readonly #blockTables = new Map<number, number[]>();
  #lastStep = 0;

  constructor(executor: Pick<NativeExecutor, 'openSlots' | 'closeSlots' | 'submit'>, options: ModelRunnerOptions) {
    this.#executor = executor;
    this.#options = options;
  }

  /** Last step handed to the executor. */
  get lastStep(): number {
    return this.#lastStep;
  }

  /**
   * Applies a plan and queues its step. Plans come in order, one a step, without gaps.
   * @throws {PlanError} a plan is missing, or it names a slot or block that cannot be
   */
  submit(plan: StepPlan): void {
    if (plan.step !== this.#lastStep + 1)
      throw new PlanError(
        `step plan ${plan.step} came after step ${this.#lastStep}: ${plan.step - this.#lastStep - 1} plans were lost`,
      );
    this.#lastStep = plan.step;
    this.#close(plan.closed);
    this.#open(plan.opened);
    for (const sequence of plan.sequences) this.#extend(sequence);
    this.#executor.submit(this.#stepInput(plan));
  }

  #close(slots: readonly number[]): void {
    for (const slot of slots)
      if (!this.#blockTables.delete(slot)) throw new PlanError(`the plan closes slot ${slot}, which is not open`);
    if (slots.length > 0) this.#executor.closeSlots([...slots]);
  }

  #open(opened: readonly SequenceOpen[]): void {
    if (opened.length === 0) return;
    for (const { slot } of opened) {
      if (slot >= this.#options.sequencesMax)
        throw new PlanError(`the plan opens slot ${slot}, limit ${this.#options.sequencesMax - 1}`);
      if (this.#blockTables.has(slot)) throw new PlanError(`the plan opens slot ${slot}, which is open`);
      this.#blockTables.set(slot, []);
    }
    this.#executor.openSlots(
      opened.map((open): SlotOpen => ({
        slot: open.slot,
        sampling: open.sampling,
        promptTokens: Int32Array.from(open.promptTokens),
        outputTokens: Int32Array.from(open.outputTokens),
      })),
    );
  }

  #extend(sequence: PlannedSequence): void {
    const table = this.#blockTables.get(sequence.slot);
    if (!table) throw new PlanError(`the plan names slot ${sequence.slot}, which is not open`);
    for (const block of sequence.newBlocks) {
      if (block >= this.#options.kvBlocks)
        throw new PlanError(`the plan names block ${block}, limit ${this.#options.kvBlocks - 1}`);
      table.push(block);
    }
  }

  #stepInput(plan: StepPlan): StepInput {
    const rowCount = (sequence: PlannedSequence): number => sequence.tokens?.length ?? 1;
    const rows = plan.sequences.reduce((sum, sequence) => sum + rowCount(sequence), 0);
    if (rows > this.#options.stepTokensMax)
      throw new PlanError(`the plan has ${rows} tokens, limit ${this.#options.stepTokensMax}`);
    const tables = plan.sequences.map((sequence) => this.#blockTables.get(sequence.slot) ?? []);
    const input: StepInput = {
      step: plan.step,
      tokenIds: new Int32Array(rows),
      tokenSteps: new Int32Array(rows),
      positions: new Int32Array(rows),
      rowSequence: new Int32Array(rows),
      slots: Int32Array.from(plan.sequences, (sequence) => sequence.slot),
      blockTableOffsets: new Int32Array(plan.sequences.length + 1),
      blockTables: new Int32Array(tables.reduce((sum, table) => sum + table.length, 0)),
      outputs: [],
      waitTimeoutMs: plan.waitTimeoutMs,
    };
    let row = 0;
    let block = 0;
    plan.sequences.forEach((sequence, index) => {
      const table = tables[index] ?? [];
      input.blockTables.set(table, block);
      block += table.length;
      input.blockTableOffsets[index + 1] = block;
      for (const output of sequence.outputs)
        input.outputs.push({
          row: row + output.row,
          slot: sequence.slot,
          score: output.score,
          banned: output.banned,
        } satisfies OutputRow);
      const count = rowCount(sequence);
      for (let i = 0; i < count; i++, row++) {
        input.tokenIds[row] = sequence.tokens?.[i] ?? -1;
        input.tokenSteps[row] = sequence.tokens ? 0 : sequence.after;
        input.positions[row] = sequence.position + i;
        input.rowSequence[row] = index;
      }
    });
    return input;
  }
}
