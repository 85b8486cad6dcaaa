/**
 * Turns step plans into steps of the native executor. It keeps, for each open slot, the block table that plans extend; everything else about a sequence
 * (sampling state, sampled ids, K/V) lives in the executor.
 */
import type { NativeExecutor, SlotOpen, StepInput } from '../kernels/binding-types.ts';
import { outputNumbers } from '../kernels/index.ts';
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
  readonly #blockTables = new Map<number, BlockTable>();
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
      this.#blockTables.set(slot, new BlockTable());
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
    if (table === undefined) throw new PlanError(`the plan names slot ${sequence.slot}, which is not open`);
    for (const block of sequence.newBlocks) {
      if (block >= this.#options.kvBlocks)
        throw new PlanError(`the plan names block ${block}, limit ${this.#options.kvBlocks - 1}`);
    }
    table.append(sequence.newBlocks);
  }

  #stepInput({ step, sequences, waitTimeoutMs, resultWaits }: StepPlan): StepInput {
    let rows = 0;
    let blocks = 0;
    for (const { slot, tokens } of sequences) {
      rows += tokens?.length ?? 1;
      blocks += this.#blockTables.get(slot)!.length;
    }
    if (rows > this.#options.stepTokensMax)
      throw new PlanError(`the plan has ${rows} tokens, limit ${this.#options.stepTokensMax}`);
    const tokenIds = new Int32Array(rows);
    const tokenSteps = new Int32Array(rows);
    const positions = new Int32Array(rows);
    const rowSequence = new Int32Array(rows);
    const slots = new Int32Array(sequences.length);
    const blockTableOffsets = new Int32Array(sequences.length + 1);
    const blockTables = new Int32Array(blocks);
    const outputs: { row: number; score: number | null; banned: number[] }[] = [];
    let row = 0;
    let block = 0;
    for (let index = 0; index < sequences.length; index++) {
      const { slot, tokens, after, position, outputs: wanted } = sequences[index]!;
      const table = this.#blockTables.get(slot)!;
      slots[index] = slot;
      table.copyTo(blockTables, block);
      block += table.length;
      blockTableOffsets[index + 1] = block;
      for (const output of wanted) outputs.push({ row: row + output.row, score: output.score, banned: output.banned });
      const count = tokens?.length ?? 1;
      for (let i = 0; i < count; i++, row++) {
        tokenIds[row] = tokens === null ? -1 : tokens[i]!;
        tokenSteps[row] = tokens === null ? after : 0;
        positions[row] = position + i;
        rowSequence[row] = index;
      }
    }
    return {
      step,
      tokenIds,
      tokenSteps,
      positions,
      rowSequence,
      slots,
      blockTableOffsets,
      blockTables,
      outputs: outputNumbers(outputs),
      waitTimeoutMs,
      resultWaits,
    };
  }
}

/** Ids of a sequence's blocks, kept as the executor takes them: a step copies bytes, it converts nothing. */
class BlockTable {
  #blocks = new Int32Array(16);
  length = 0;

  append(blocks: readonly number[]): void {
    if (this.length + blocks.length > this.#blocks.length) {
      const larger = new Int32Array(Math.max(this.length + blocks.length, 2 * this.#blocks.length));
      larger.set(this.#blocks);
      this.#blocks = larger;
    }
    for (const block of blocks) this.#blocks[this.length++] = block;
  }

  copyTo(target: Int32Array, offset: number): void {
    target.set(this.length === this.#blocks.length ? this.#blocks : this.#blocks.subarray(0, this.length), offset);
  }
}
