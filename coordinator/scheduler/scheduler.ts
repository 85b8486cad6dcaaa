/**
 * Continuous batching, as a pure state machine: sequences in, plans out, results in. No I/O, no timers; the clock is a parameter.
 *
 *   schedule()   1. decode     one row of each running sequence whose prompt is computed (a share of them when there are several stages, each in its turn)
 *                2. prompts    chunks of sequences whose prompt is not, in their turn; those that wait are admitted: blocks of the whole known text or none,
 *                              cached prefix first
 *   complete()   results come back in the order of the steps; tokens are committed, full blocks become findable, ended sequences let go
 *
 * **Whose turn it is.** Prompts are computed in order of arrival, but one of more than a chunk, which may take seconds at the pace of the streams, lets others pass that come after it, of together
 * at most `patience` times the tokens that it has more than a chunk: so nobody waits for ever.
 *
 * **Why blocks are free at once, though steps in flight may still write into them.** A worker runs steps in order, and a rank reads and writes only its
 * own K/V. A block freed now can be handed out in a plan made after this moment at the earliest; that plan's step runs on each rank after every step
 * in flight, so its writes come last. It reads only positions that its own sequence wrote, or cached blocks, and a step in flight never writes into
 * a cached block: cached blocks are full of positions that have come back, rows in flight lie behind those.
 *
 * **Drafts.** Where a sequence repeats earlier text and it pays (`speculation.ts`), nothing is planned until all results are here, and then one step in which the
 * sequence has rows for its newest token and for the tokens that are expected behind it. What came true is committed. K/V of the other drafts lies behind the
 * computed positions: no row reads it, no block with it is full, and the sequence's next rows overwrite it.
 *
 * **Why a slot is not.** A slot's sampling state is touched when a step *samples*, which is later than when its plan arrives: a slot is closed, and
 * may be opened again, only in a plan made after every step that used it has come back.
 */
import { ShardmeshError } from '../../protocol/errors.ts';
import {
  draftCount,
  type PlannedOutput,
  type PlannedSequence,
  type SequenceOpen,
  type StepOutput,
  type StepPlan,
  type StepResult,
} from '../../protocol/step-plan.ts';
import { InvariantError, type BlockPool } from '../kv-cache/block-pool.ts';
import type { PrefixCache } from '../kv-cache/prefix-cache.ts';
import { PromptLookup } from './prompt-lookup.ts';
import {
  createSequence,
  knownTarget,
  needsTokens,
  outputCount,
  outputIndex,
  positionsMax,
  type Sequence,
  type SequenceSpec,
} from './sequence.ts';
import { chooseDrafts, draftRowsMax, draftSequencesMax, type SpeculationTimes } from './speculation.ts';

/** What wants prompt tokens in the next step, and beside what. */
export interface PromptDemand {
  /** Of streams that decode, in this step. */
  decodeRows: number;
  /** Streams that decode: more than `decodeRows` where they are split into micro-batches. */
  decoding: number;
  /** Prompts without their first token. */
  waiting: number;
  /** Of the prompt that comes first: tokens that had to be computed from its start, and those that are left. */
  tokens: number;
  tokensLeft: number;
  /** Prompt tokens of the latest step that completed a prompt (0: none did), and steps planned after it. */
  completedTokens: number;
  stepsSince: number;
}

export interface SchedulerOptions {
  placement: string;
  epoch: number;
  pool: BlockPool;
  /** null: prefixes are not looked up. */
  cache: PrefixCache | null;
  blockTokens: number;
  /** Slots of a worker: most sequences running at a time. */
  sequencesMax: number;
  /** Token budget: most rows of a step. */
  stepTokensMax: number;
  /** Most rows that one sequence may have in a step. */
  prefillChunkMax: number;
  /** Most output rows of a step: their log-probabilities and candidates come back in one message. */
  stepOutputsMax: number;
  /** Parts into which decoding sequences are split, each in a step of its own: 1 for a single stage. */
  microBatches: () => number;
  /** Most prompt tokens of a step, so that first tokens come soon and streams that decode keep their pace. Asked when there is a prompt to compute. */
  prefillTokensMax: (demand: PromptDemand) => number;
  stepsInFlightMax: number;
  /** Most steps in flight that may hold one sequence. 1: steps in flight are disjoint. More: a row may take the token of a step that is not back. */
  sequenceStepsMax: number;
  /** null: no drafts. */
  speculation: SpeculationTimes | null;
  /** Longest wait inside a step of so many rows. */
  waitTimeoutMs: (tokens: number) => number;
}

/** Rows of one sequence in a step in flight, as they were planned. */
interface RowsInFlight {
  sequence: Sequence;
  life: number;
  planned: PlannedSequence;
  rows: number;
}

interface StepInFlight {
  step: number;
  rows: RowsInFlight[];
}

/** A slot whose sequence ended; it may be closed when `lastStep` has come back. */
interface LeavingSlot {
  slot: number;
  lastStep: number;
}

/** A plan under construction. */
interface Draft {
  step: number;
  tokensLeft: number;
  outputsLeft: number;
  penaltyTokensLeft: number;
  /** Sequences that decode, and those of them that are in this step. */
  decoding: number;
  decodeRows: number;
  opened: SequenceOpen[];
  rows: RowsInFlight[];
}

/** What a result meant for one sequence, token by token: a step gives one, or none, or several when drafts were right. */
export interface Progress {
  sequence: Sequence;
  /** The prompt is computed since this step (all scores are in `sequence.promptScores`); with the first token. */
  promptComputed: boolean;
  output: StepOutput | null;
  /** The sequence ended with this output: `stop` = a stop token, `length` = `outputTokensMax`. */
  finished: 'stop' | 'length' | null;
}

/** Sums since the epoch began. */
export interface SchedulerCounts {
  waiting: number;
  running: number;
  stepsInFlight: number;
  preemptions: number;
  promptTokens: number;
  cachedTokens: number;
  rowsPlanned: number;
  /** Rows whose result nobody wanted: of sequences that had ended or been preempted. */
  rowsWasted: number;
  /** Drafts (rows of a sequence in a step may have one), the tokens in them, and those that were right. */
  drafts: number;
  draftTokens: number;
  draftTokensAccepted: number;
}

/** Token ids for penalties that one plan may carry, so that a plan stays below the broker's payload limit. */
const planPenaltyTokensMax = 100_000;
/** Prompts that pass another have together at most so many times the tokens that it has more than a chunk. */
const patience = 4;
/** So many steps after one with drafts, the next one may be near. */
const draftsNearSteps = 8;

export class Scheduler {
  readonly options: Readonly<SchedulerOptions>;
  readonly #pool: BlockPool;
  readonly #cache: PrefixCache | null;
  /** In the order of their turns. */
  readonly #waiting: Sequence[] = [];
  /** In order of arrival. */
  readonly #running: Sequence[] = [];
  #held = 0;
  #lastId = 0;
  /** Of all sequences that ever came. */
  #promptTokensAdded = 0;
  #lastStep = 0;
  #plannedPromptTokens = 0;
  /** The latest step that completes a prompt, and its prompt tokens. */
  #promptStep = { step: 0, tokens: 0 };
  readonly #inFlight: StepInFlight[] = [];
  /** Every decoding sequence has one turn from step `from` on, in `batches` micro-batches so far. */
  #rotation = { from: 0, batches: 0 };
  readonly #freeSlots: number[] = [];
  #leaving: LeavingSlot[] = [];
  /** Free slots that no plan has closed yet. */
  #unclosed: number[] = [];
  #preemptions = 0;
  #promptTokens = 0;
  #cachedTokens = 0;
  #rowsPlanned = 0;
  #rowsWasted = 0;
  #lastDraftStep = Number.NEGATIVE_INFINITY;
  #drafts = 0;
  #draftTokens = 0;
  #draftTokensAccepted = 0;

  constructor(options: SchedulerOptions) {
    for (const name of [
      'sequencesMax',
      'stepTokensMax',
      'prefillChunkMax',
      'stepOutputsMax',
      'stepsInFlightMax',
      'sequenceStepsMax',
    ] as const) {
      if (!Number.isInteger(options[name]) || options[name] < 1) {
        throw new InvariantError(`scheduler: ${name} must be a whole number of at least 1, got ${options[name]}`);
      }
    }
    this.options = options;
    this.#pool = options.pool;
    this.#cache = options.cache;
    for (let slot = options.sequencesMax - 1; slot >= 0; slot--) this.#freeSlots.push(slot);
  }

  get waiting(): readonly Sequence[] {
    return this.#waiting;
  }

  get running(): readonly Sequence[] {
    return this.#running;
  }

  /** Whether a running sequence still has prompt tokens (or tokens of a life before) to plan. */
  get prefilling(): boolean {
    return this.#running.some(
      (sequence) => !sequence.paused && !isDecoding(sequence) && sequence.planned < knownTarget(sequence),
    );
  }

  /** Steps lately had drafts: the less is planned ahead, the sooner the next ones can be. */
  get drafting(): boolean {
    return this.#lastStep - this.#lastDraftStep < draftsNearSteps;
  }

  /** Sequences that have no blocks yet or no more: waiting, preempted, held. */
  get waitingCount(): number {
    return this.#waiting.length + this.#held;
  }

  get stepsInFlight(): number {
    return this.#inFlight.length;
  }

  counts(): SchedulerCounts {
    return {
      waiting: this.waitingCount,
      running: this.#running.length,
      stepsInFlight: this.#inFlight.length,
      preemptions: this.#preemptions,
      promptTokens: this.#promptTokens,
      cachedTokens: this.#cachedTokens,
      rowsPlanned: this.#rowsPlanned,
      rowsWasted: this.#rowsWasted,
      drafts: this.#drafts,
      draftTokens: this.#draftTokens,
      draftTokensAccepted: this.#draftTokensAccepted,
    };
  }

  /** Blocks that a sequence of this size needs at its longest; more than `pool.total` can never run. */
  blocksNeeded(spec: Pick<SequenceSpec, 'promptTokens' | 'outputTokensMax'>): number {
    return Math.ceil(positionsMax(spec) / this.options.blockTokens);
  }

  /**
   * Puts a sequence into the waiting queue.
   * @param leader  another choice of the same request: this one is held until the leader's prompt is computed, and then finds it in the prefix cache
   * @throws {InvariantError} nothing to compute (no output wanted and no prompt token to score), or more blocks than there are: check `blocksNeeded` first
   */
  add(spec: SequenceSpec, leader: Sequence | null = null): Sequence {
    if (positionsMax(spec) < 1) throw new InvariantError('a sequence with nothing to compute was added');
    if (this.blocksNeeded(spec) > this.#pool.total) {
      throw new InvariantError(`a sequence needs ${this.blocksNeeded(spec)} blocks and the pool has ${this.#pool.total}`);
    }
    const held = leader !== null && !leader.promptComputed && leader.state !== 'finished';
    this.#promptTokensAdded += spec.promptTokens.length;
    const turn = this.#promptTokensAdded + patience * Math.max(0, spec.promptTokens.length - this.options.prefillChunkMax);
    const sequence = createSequence(++this.#lastId, turn, spec, held ? 'held' : 'waiting');
    if (held) {
      leader.followers.push(sequence);
      this.#held++;
    } else {
      insertInOrder(this.#waiting, sequence, byTurn);
    }
    return sequence;
  }

  /** Ends a sequence in whatever state: no further row is planned for it, and its blocks are free now. */
  end(sequence: Sequence): void {
    if (sequence.state === 'finished') return;
    if (sequence.state === 'running') {
      this.#leave(sequence);
    } else if (sequence.state === 'held') {
      this.#held--;
    } else {
      this.#waiting.splice(this.#waiting.indexOf(sequence), 1);
    }
    sequence.state = 'finished';
    this.#releaseFollowers(sequence);
  }

  /** Gives the sequence no rows until `resume`; it keeps its blocks while nobody else needs them. */
  pause(sequence: Sequence): void {
    sequence.paused = true;
  }

  resume(sequence: Sequence): void {
    sequence.paused = false;
  }

  /** Rows of prompts in the step that schedule() planned last. */
  get plannedPromptTokens(): number {
    return this.#plannedPromptTokens;
  }

  /**
   * The next step, or null when enough steps are in flight or nothing can be planned before a result comes back.
   * @param now  clock, for `admittedAt`
   */
  schedule(now: number): StepPlan | null {
    if (this.#inFlight.length >= this.options.stepsInFlightMax) return null;
    const drafts = this.#chooseDrafts();
    if (drafts !== null && this.#inFlight.length > 0) return null;
    this.#freeLeavingSlots();
    this.#plannedPromptTokens = 0;
    const draft: Draft = {
      step: this.#lastStep + 1,
      rows: [],
      tokensLeft: this.options.stepTokensMax,
      outputsLeft: this.options.stepOutputsMax,
      penaltyTokensLeft: planPenaltyTokensMax,
      decoding: 0,
      decodeRows: 0,
      opened: [],
    };
    if (drafts !== null) this.#planDrafts(draft, drafts);
    if (draft.rows.length === 0) {
      this.#planDecode(draft);
      this.#planPrompts(draft, now);
    }
    if (draft.rows.length === 0) return null;

    this.#lastStep = draft.step;
    this.#inFlight.push({ step: draft.step, rows: draft.rows });
    const closed = this.#unclosed;
    this.#unclosed = [];
    const tokens = draft.rows.reduce((sum, { rows }) => sum + rows, 0);
    this.#rowsPlanned += tokens;
    return {
      type: 'step_plan',
      placement: this.options.placement,
      epoch: this.options.epoch,
      step: draft.step,
      opened: draft.opened,
      closed,
      sequences: draft.rows.map(({ planned }) => planned),
      waitTimeoutMs: this.options.waitTimeoutMs(tokens),
      resultWaits: false,
    };
  }

  /**
   * Takes the result of the oldest step in flight.
   * @returns what it meant, in the order of the plan; nothing for sequences that ended or were preempted since
   * @throws {ShardmeshError} `invalid_message`: not the result of that step, or not shaped like its plan; no state has changed
   */
  complete(result: StepResult): Progress[] {
    const flight = this.#inFlight[0];
    if (flight === undefined || flight.step !== result.step) {
      const expected = flight === undefined ? 'no step is in flight' : `step ${flight.step} is the oldest in flight`;
      throw new ShardmeshError('invalid_message', `A result of step ${result.step} came but ${expected}.`);
    }
    const outputs = outputsOf(flight, result);
    this.#inFlight.shift();

    const progress: Progress[] = [];
    for (const [i, rows] of flight.rows.entries()) {
      const { sequence } = rows;
      if (sequence.state !== 'running' || sequence.life !== rows.life) this.#rowsWasted += rows.rows;
      else progress.push(...this.#commit(rows, outputs[i]!));
    }
    return progress;
  }

  /** The epoch failed: every sequence is finished, nothing is in flight, nothing cached. The scheduler is not used again. */
  abandon(): void {
    this.#cache?.clear();
    const leaders = [...this.#running, ...this.#waiting];
    for (const sequence of leaders) for (const follower of sequence.followers.slice()) this.end(follower);
    for (const sequence of leaders) this.end(sequence);
    this.#inFlight.length = 0;
  }

  /** @throws {InvariantError} the block pool and the block tables disagree. Walks everything: for tests. */
  check(): void {
    this.#pool.check(this.#running.map(({ blocks }) => blocks));
  }

  // ---------------------------------------------------------------------------------------------------------------- planning

  /** Every sequence that decodes, with its draft (which may be empty). Null: drafts do not pay, or there are prompts to compute. */
  #chooseDrafts(): Map<Sequence, number[]> | null {
    const { speculation, stepTokensMax, stepOutputsMax, prefillChunkMax } = this.options;
    if (speculation === null || this.#running.length > draftSequencesMax || this.#waiting.some(({ paused }) => !paused))
      return null;
    const sequences: Sequence[] = [];
    for (const sequence of this.#running) {
      if (sequence.paused) continue;
      if (!isDecoding(sequence)) return null;
      if (outputIndex(sequence, sequence.planned) < sequence.outputTokensMax) sequences.push(sequence);
    }
    // With stages, more than one sequence keep them busy: none may wait for the other's results.
    if (sequences.length > 1 && this.options.microBatches() > 1) return null;
    const lookups = sequences.map((sequence) => {
      sequence.lookup ??= new PromptLookup(sequence.tokens, sequence.promptLength);
      sequence.lookup.extend();
      return sequence.lookup;
    });
    // The last output token is no draft: it is what the row before it samples.
    const limits = sequences.map((sequence) => Math.min(prefillChunkMax, sequence.outputTokensMax - outputCount(sequence)) - 1);
    const counts = chooseDrafts(lookups, limits, Math.min(draftRowsMax, stepTokensMax, stepOutputsMax), speculation);
    return counts && new Map(sequences.map((sequence, i) => [sequence, draftOf(sequence, lookups[i]!, counts[i]!)]));
  }

  #planDrafts(draft: Draft, drafts: ReadonlyMap<Sequence, number[]>): void {
    for (const [sequence, tokens] of drafts) {
      // Nobody loses blocks for the sake of a draft: there must be one left for each.
      const blocks = Math.ceil((sequence.tokens.length + tokens.length) / this.options.blockTokens) - sequence.blocks.length;
      const drafted = blocks > Math.max(0, this.#pool.free - this.#running.length) ? [] : tokens;
      if (sequence.state !== 'running' || !this.#planRows(draft, sequence, 1 + drafted.length, drafted)) continue;
      if (drafted.length > 0) this.#lastDraftStep = draft.step;
    }
  }

  #planDecode(draft: Draft): void {
    let remaining = 0;
    let prefilling = 0;
    const decoders: Sequence[] = [];
    for (const sequence of this.#running) {
      if (sequence.paused) continue;
      if (!isDecoding(sequence)) {
        if (sequence.planned < knownTarget(sequence)) prefilling++;
        continue;
      }
      if (outputIndex(sequence, sequence.planned) >= sequence.outputTokensMax) continue;
      if (sequence.lastStep < this.#rotation.from) remaining++;
      decoders.push(sequence);
    }
    const parts = this.options.microBatches();
    const candidates = this.#candidates(decoders, parts);
    // Prefill goes on even when there are more decoding sequences than budget; those then take turns.
    const reserved = prefilling > 0 ? Math.min(this.options.prefillChunkMax, Math.ceil(this.options.stepTokensMax / 4)) : 0;
    const room = Math.max(1, Math.min(draft.tokensLeft - reserved, draft.outputsLeft));
    const share = Math.min(room, this.#microBatch(draft, parts, decoders.length, remaining));
    // Without turns, the oldest come first: the newest are the ones that lose their blocks.
    if (parts === 1 && candidates.length > share) candidates.sort(byLastStep);
    // A micro-batch that falls apart stays so, since those that go together come back together: while enough are under way it waits for the rest of its own.
    if (parts > 1 && candidates.length < share && this.#inFlight.length >= parts) candidates.length = 0;
    let planned = 0;
    for (const sequence of candidates) {
      if (planned === share) break;
      // One that was preempted for the sake of another candidate is not running any more.
      if (sequence.state === 'running' && this.#planRows(draft, sequence, 1)) planned++;
    }
    if (planned > 0) this.#rotation.batches++;
    draft.decoding = decoders.length;
    draft.decodeRows = planned;
  }

  /**
   * Of the decoding sequences, those that may have a row in this step. With micro-batches strictly in turn, none before one whose last step is longer ago: a row waits
   * on the workers for its sequence's token, and every step behind it waits too. A second step of one sequence in front of another's first would hold up all for
   * a round, and so would the next, since results come, and make room, in the order of the steps.
   */
  #candidates(decoders: Sequence[], parts: number): Sequence[] {
    if (parts === 1) return decoders.filter((sequence) => this.#takesRows(sequence));
    decoders.sort(byLastStep);
    const busy = decoders.findIndex((sequence) => !this.#takesRows(sequence));
    return decoders.slice(0, busy < 0 ? decoders.length : busy);
  }

  /**
   * How many of the decoding sequences come into this step: with m micro-batches, m steps after each other hold all of them, in parts as equal as can be, and
   * each sequence once. Then the next round begins.
   */
  #microBatch(draft: Draft, parts: number, decoding: number, remaining: number): number {
    if (parts === 1) return decoding;
    if (remaining === 0 || this.#rotation.batches >= parts) {
      this.#rotation = { from: draft.step, batches: 0 };
      return Math.ceil(decoding / parts);
    }
    return Math.ceil(remaining / (parts - this.#rotation.batches));
  }

  /** Prompt rows, prompt by prompt in their turns. */
  #planPrompts(draft: Draft, now: number): void {
    const begun: Sequence[] = [];
    let waiting = this.#waiting.reduce((sum, { paused }) => sum + (paused ? 0 : 1), 0);
    for (const sequence of this.#running) {
      if (sequence.paused || isDecoding(sequence) || tokensLeft(sequence) === 0) continue;
      waiting++;
      if (this.#takesRows(sequence)) begun.push(sequence);
    }
    begun.sort(byTurn);
    let room = true;
    let completed = 0;
    let paced: boolean | null = null;
    while (draft.tokensLeft > 0 && draft.outputsLeft > 0) {
      const newcomer = room ? this.#waiting.find(({ paused }) => !paused) : undefined;
      const isNew = newcomer !== undefined && (begun[0] === undefined || byTurn(newcomer, begun[0]) < 0);
      const sequence = isNew ? newcomer : begun.shift();
      if (sequence === undefined) return;
      paced ??= this.#pacePrompts(draft, sequence, waiting);
      if (draft.tokensLeft === 0) return;
      // Where time is what a step is short of, it is over sooner without the beginning of a prompt that it cannot complete.
      if (paced && completed > 0 && tokensLeft(sequence) > draft.tokensLeft) return;
      if (isNew && !this.#admit(draft, sequence, now)) {
        room = false;
        continue;
      }
      if (sequence.state === 'running') {
        const tokensLeftBefore = draft.tokensLeft;
        this.#planRows(draft, sequence, this.options.prefillChunkMax);
        this.#plannedPromptTokens += tokensLeftBefore - draft.tokensLeft;
      }
      if (tokensLeft(sequence) === 0) completed++;
      if (completed > 0) this.#promptStep = { step: draft.step, tokens: this.#plannedPromptTokens };
    }
  }

  /** Bounds the step's prompt tokens by what `first`, whose turn it is, may have. True: to fewer than fit into a step. */
  #pacePrompts(draft: Draft, first: Sequence, waiting: number): boolean {
    const tokensMax = this.options.prefillTokensMax({
      // Streams that decode in other micro-batches wait for this step as well.
      decodeRows: draft.decoding === 0 ? 0 : Math.max(draft.decodeRows, 1),
      decoding: draft.decoding,
      waiting,
      tokens: knownTarget(first) - (first.cachedTokens ?? 0),
      tokensLeft: tokensLeft(first),
      completedTokens: this.#promptStep.tokens,
      stepsSince: draft.step - this.#promptStep.step - 1,
    });
    if (tokensMax >= draft.tokensLeft) return false;
    draft.tokensLeft = tokensMax;
    return true;
  }

  /** Gives a waiting sequence its place on the workers. False: no slot, not enough blocks, or no room in the message. */
  #admit(draft: Draft, sequence: Sequence, now: number): boolean {
    const penaltyTokens = draft.penaltyTokensLeft - (needsTokens(sequence.sampling) ? sequence.tokens.length : 0);
    if (penaltyTokens < 0 && draft.opened.length > 0) return false;
    while (!this.#giveSlotAndBlocks(sequence)) {
      // A sequence whose reader is too slow must not keep others out.
      const idle = newest(this.#running, ({ paused }) => paused);
      if (idle === null) return false;
      this.#preempt(idle);
      this.#freeLeavingSlots();
    }
    draft.penaltyTokensLeft = penaltyTokens;
    sequence.admittedAt ??= now;
    draft.opened.push(openRecord(sequence));
    return true;
  }

  /** A slot for a waiting sequence, its cached prefix, and blocks for the rest of its known text. All or nothing. */
  #giveSlotAndBlocks(sequence: Sequence): boolean {
    if (this.#freeSlots.length === 0) return false;
    const { blockTokens } = this.options;
    const target = knownTarget(sequence);
    // At least the last known token is computed, for its logits.
    const cached =
      this.#cache === null || sequence.scoresMissing > 0
        ? []
        : this.#cache.find(sequence.tenant, sequence.tokens, sequence.digests, Math.floor((target - 1) / blockTokens));
    for (const block of cached) this.#pool.share(block);
    const needed = Math.ceil(target / blockTokens) - cached.length;
    // Room for those already running to grow, or the newcomer would soon be preempted again.
    const reserved = this.#running.length === 0 ? 0 : Math.max(1, Math.floor(this.#pool.total / 100));
    const blocks = this.#pool.free < needed + reserved ? null : this.#pool.allocate(needed);
    if (blocks === null) {
      this.#pool.release(cached);
      return false;
    }

    this.#waiting.splice(this.#waiting.indexOf(sequence), 1);
    insertInOrder(this.#running, sequence, byArrival);
    sequence.state = 'running';
    sequence.life++;
    sequence.slot = this.#freeSlots.pop()!;
    sequence.blocks = [...cached, ...blocks];
    sequence.blocksAnnounced = 0;
    sequence.blocksRegistered = cached.length;
    sequence.planned = sequence.computed = cached.length * blockTokens;
    sequence.stepsInFlight = 0;
    sequence.drafted = false;
    sequence.lastStep = 0;
    if (sequence.cachedTokens === null) {
      sequence.cachedTokens = sequence.computed;
      this.#promptTokens += sequence.promptLength;
      this.#cachedTokens += sequence.cachedTokens;
    }
    return true;
  }

  #takesRows(sequence: Sequence): boolean {
    return !sequence.drafted && sequence.stepsInFlight < this.options.sequenceStepsMax;
  }

  /**
   * Adds rows of `sequence` to the plan: as many as known tokens, `rowsMax` and the budgets allow. False: none, the pool has no room this step.
   * @param drafted  tokens expected behind the known ones
   */
  #planRows(draft: Draft, sequence: Sequence, rowsMax: number, drafted: readonly number[] = []): boolean {
    const position = sequence.planned;
    const literal = position < sequence.tokens.length;
    const known = literal ? knownTarget(sequence) - position : 1;
    const rowsWanted = Math.min(rowsMax, draft.tokensLeft, known + drafted.length);
    if (rowsWanted < 1 || draft.outputsLeft < 1) return false;
    if (!this.#growTable(draft, sequence, position + rowsWanted)) return false;

    const outputs: PlannedOutput[] = [];
    let rows = 0;
    for (; rows < rowsWanted; rows++) {
      const output = outputOfRow(sequence, position, rows);
      if (output === null) continue;
      if (outputs.length === draft.outputsLeft) break;
      outputs.push(output);
    }
    const planned: PlannedSequence = {
      slot: sequence.slot,
      position,
      tokens: literal
        ? sequence.tokens.slice(position, position + rows).concat(drafted.slice(0, Math.max(0, rows - known)))
        : null,
      after: literal ? 0 : sequence.lastStep,
      newBlocks: sequence.blocks.slice(sequence.blocksAnnounced),
      outputs,
    };
    draft.rows.push({ sequence, life: sequence.life, planned, rows });
    draft.tokensLeft -= rows;
    draft.outputsLeft -= outputs.length;
    sequence.blocksAnnounced = sequence.blocks.length;
    sequence.planned += rows;
    sequence.stepsInFlight++;
    sequence.drafted = drafted.length > 0;
    sequence.lastStep = draft.step;
    return true;
  }

  /** Makes the block table reach `positions`, preempting newer sequences where the pool is empty. False: not in this step. */
  #growTable(draft: Draft, sequence: Sequence, positions: number): boolean {
    const count = Math.ceil(positions / this.options.blockTokens) - sequence.blocks.length;
    if (count <= 0) return true;
    for (;;) {
      const blocks = this.#pool.allocate(count);
      if (blocks !== null) {
        sequence.blocks.push(...blocks);
        return true;
      }
      const victim = this.#victim(draft, sequence);
      if (victim === null) return false;
      if (victim === sequence && this.#running.length === 1) {
        throw new InvariantError(
          `the only running sequence needs ${count} more blocks and ${this.#pool.free} of ${this.#pool.total} are free`,
        );
      }
      this.#preempt(victim);
      if (victim === sequence) return false;
    }
  }

  /**
   * Whose blocks `sequence` may have: those of the newest paused sequence, else of the newest running one, itself included. Sequences of this plan are
   * safe; where all newer ones are in it, `sequence` keeps what it has and comes first in the next step: null.
   */
  #victim(draft: Draft, sequence: Sequence): Sequence | null {
    const paused = newest(this.#running, (other) => other.paused);
    if (paused !== null) return paused;
    const newer = newest(this.#running, (other) => other.id > sequence.id && other.lastStep !== draft.step);
    if (newer !== null) return newer;
    return this.#running.at(-1) === sequence ? sequence : null;
  }

  #preempt(sequence: Sequence): void {
    this.#leave(sequence);
    sequence.state = 'preempted';
    sequence.preemptions++;
    this.#preemptions++;
    insertInOrder(this.#waiting, sequence, byTurn);
  }

  /** Takes a running sequence off the workers: its blocks are free now, its slot once its last step has come back. */
  #leave(sequence: Sequence): void {
    this.#running.splice(this.#running.indexOf(sequence), 1);
    this.#pool.release(sequence.blocks);
    sequence.blocks = [];
    sequence.planned = sequence.computed = 0;
    this.#leaving.push({ slot: sequence.slot, lastStep: sequence.lastStep });
    sequence.slot = -1;
  }

  #freeLeavingSlots(): void {
    const oldest = this.#inFlight[0]?.step ?? Number.POSITIVE_INFINITY;
    if (this.#leaving.length === 0) return;
    const still: LeavingSlot[] = [];
    for (const leaving of this.#leaving) {
      if (leaving.lastStep < oldest) {
        this.#unclosed.push(leaving.slot);
        this.#freeSlots.push(leaving.slot);
      } else {
        still.push(leaving);
      }
    }
    this.#leaving = still;
  }

  // ---------------------------------------------------------------------------------------------------------------- results

  #commit({ sequence, planned, rows }: RowsInFlight, outputs: StepOutput[]): Progress[] {
    sequence.stepsInFlight--;
    sequence.drafted = false;
    const sampled: StepOutput[] = [];
    let ended = false;
    for (const [i, output] of outputs.entries()) {
      const { row, score } = planned.outputs[i]!;
      if (score !== null) {
        sequence.promptScores[planned.position + row + 1] = output;
        sequence.scoresMissing--;
      } else if (!ended) {
        sampled.push(output);
        sequence.tokens.push(output.token);
        // Drafts behind it came true as well, but the text ends here.
        ended = sequence.stopTokens.has(output.token);
      }
    }
    const drafts = draftCount(planned);
    const rejected = drafts === 0 ? 0 : drafts + 1 - sampled.length;
    if (drafts > 0) this.#drafts++;
    this.#draftTokens += drafts;
    this.#draftTokensAccepted += drafts - rejected;
    sequence.planned -= rejected;
    sequence.computed = planned.position + rows - rejected;
    this.#register(sequence);

    const promptEnd = sequence.outputTokensMax === 0 ? sequence.promptLength - 1 : sequence.promptLength;
    const promptComputed = !sequence.promptComputed && sequence.computed >= promptEnd;
    if (promptComputed) {
      sequence.promptComputed = true;
      this.#releaseFollowers(sequence);
    }
    let finished: Progress['finished'] = null;
    if (ended) finished = 'stop';
    else if (sequence.promptComputed && outputCount(sequence) >= sequence.outputTokensMax) finished = 'length';
    if (finished !== null) this.end(sequence);
    if (sampled.length <= 1) return [{ sequence, promptComputed, output: sampled[0] ?? null, finished }];
    return sampled.map((output, i) => ({
      sequence,
      promptComputed: promptComputed && i === 0,
      output,
      finished: i === sampled.length - 1 ? finished : null,
    }));
  }

  /** Full blocks of positions that came back can be found from now on. */
  #register(sequence: Sequence): void {
    if (this.#cache === null) return;
    const full = Math.floor(sequence.computed / this.options.blockTokens);
    if (full <= sequence.blocksRegistered) return;
    this.#cache.extendDigests(sequence.tenant, sequence.tokens, sequence.digests, full);
    for (let i = sequence.blocksRegistered; i < full; i++) this.#cache.register(sequence.blocks[i]!, sequence.digests[i]!);
    sequence.blocksRegistered = full;
  }

  #releaseFollowers(leader: Sequence): void {
    for (const follower of leader.followers) {
      if (follower.state !== 'held') continue;
      follower.state = 'waiting';
      this.#held--;
      insertInOrder(this.#waiting, follower, byTurn);
    }
    leader.followers = [];
  }
}

/** The prompt's rows are planned, and of what followed at most the newest token is not. */
const isDecoding = (sequence: Sequence): boolean =>
  sequence.planned >= sequence.promptLength && knownTarget(sequence) - sequence.planned <= 1;

/** Known tokens that are in no plan yet. */
const tokensLeft = (sequence: Sequence): number => knownTarget(sequence) - sequence.planned;

function outputOfRow(sequence: Sequence, position: number, row: number): PlannedOutput | null {
  const next = position + row + 1;
  if (next < sequence.promptLength) {
    if (!sequence.scorePrompt || sequence.promptScores[next] !== null) return null;
    return { row, score: sequence.tokens[next]!, banned: [] };
  }
  const index = next - sequence.promptLength;
  if (next < sequence.tokens.length || index >= sequence.outputTokensMax) return null;
  return { row, score: null, banned: index < sequence.outputTokensMin ? [...sequence.stopTokens] : [] };
}

/** Repetition asks which tokens occur in the prompt, not how often; the other penalties look at the output only. */
function openRecord(sequence: Sequence): SequenceOpen {
  const { sampling, slot, promptTokens } = sequence;
  return {
    slot,
    sampling,
    promptTokens: sampling.repetitionPenalty === 1 ? [] : [...new Set(promptTokens)],
    outputTokens: needsTokens(sampling) ? sequence.tokens.slice(sequence.promptLength) : [],
  };
}

/** What came back for each sequence of a step. @throws {ShardmeshError} `invalid_message` */
function outputsOf({ step, rows }: StepInFlight, { outputs }: StepResult): StepOutput[][] {
  let next = 0;
  const all = rows.map(({ planned }) => {
    const from = next;
    const drafts = draftCount(planned);
    for (const { row, score } of planned.outputs) {
      // Behind a draft that another token was sampled for, nothing comes.
      if (drafts > 0 && next > from && outputs[next - 1]?.token !== planned.tokens![row]) break;
      const output = outputs[next++];
      if (output === undefined) continue;
      if (output.slot !== planned.slot || (score !== null && output.token !== score)) {
        const expected = `slot ${planned.slot}${score === null ? '' : ` and token ${score}`}`;
        throw new ShardmeshError(
          'invalid_message',
          `Output ${next - 1} of step ${step} is of slot ${output.slot} and token ${output.token}, expected ${expected}.`,
        );
      }
    }
    return outputs.slice(from, next);
  });
  if (outputs.length !== next) {
    throw new ShardmeshError('invalid_message', `The result of step ${step} has ${outputs.length} outputs, expected ${next}.`);
  }
  return all;
}

/** A token that ends the sequence is left out: no row behind it is wanted. */
function draftOf(sequence: Sequence, lookup: PromptLookup, count: number): number[] {
  const draft = lookup.draft(count);
  const end = draft.findIndex((token) => sequence.stopTokens.has(token));
  return end < 0 ? draft : draft.slice(0, end);
}

function newest(sequences: readonly Sequence[], wanted: (sequence: Sequence) => boolean): Sequence | null {
  for (let i = sequences.length - 1; i >= 0; i--) if (wanted(sequences[i]!)) return sequences[i]!;
  return null;
}

type Order = (a: Sequence, b: Sequence) => number;

const byArrival: Order = (a, b) => a.id - b.id;

const byTurn: Order = (a, b) => a.turn - b.turn || a.id - b.id;

const byLastStep: Order = (a, b) => a.lastStep - b.lastStep || a.id - b.id;

function insertInOrder(sequences: Sequence[], sequence: Sequence, order: Order): void {
  let at = sequences.length;
  while (at > 0 && order(sequences[at - 1]!, sequence) > 0) at--;
  sequences.splice(at, 0, sequence);
}
