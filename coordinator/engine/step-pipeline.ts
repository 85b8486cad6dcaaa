/**
 * Steps in flight, seen as time: how long they take, how long they may take, how much of the last stage's time is a bubble. Pure: the clock is a
 * parameter. Everything it knows is given out as plain numbers.
 */
import { meshTimers, stepLimits } from '../../protocol/limits.ts';
import type { StepPlan, StepResult } from '../../protocol/step-plan.ts';
import type { PromptDemand } from '../scheduler/scheduler.ts';
import { RowTimes, StepTimes, unnoticedMs } from './step-times.ts';

interface PublishedStep {
  step: number;
  tokens: number;
  /** Rows of sequences that add one token, their drafts included, and tokens of longer chunks. */
  decodeRows: number;
  prefillTokens: number;
  /** The newest step whose tokens its rows wait for; 0: none. */
  waitsFor: number;
  publishedAt: number;
  limitMs: number;
  /** There was nothing to do before it: idle time of the workers is not a bubble. */
  afterRest: boolean;
  /** Nothing else was in flight. */
  alone: boolean;
  resultWaits: boolean;
}

export interface PipelineNumbers {
  stepsInFlight: number;
  /** Sums. */
  steps: number;
  outputTokens: number;
  prefillTokens: number;
  stepSeconds: number;
  bubbleSeconds: number;
  collectiveSeconds: number;
  receiveSeconds: number;
  sampleSeconds: number;
  /** Of the last stage's rank 0, while there was work: (idle + waiting for the stage before) / all; mean over about 50 steps. 0 before the first step. */
  bubbleRatio: number;
  /** From publish, or the result before it, to the result; mean over about 50 steps. */
  stepMs: number;
  /** Over about the last 10 s. */
  outputTokensPerSecond: number;
  prefillTokensPerSecond: number;
}

/** Steps of fewer rows take about as long as a step of one row; those of more take time for each row. */
const smallStepTokens = 16;
/** Assumed for each row before anything was measured. */
const unmeasuredTokenMs = 20;
/** A step may take this many times what is expected of it. */
const slack = 10;
/** The workers' own deadlines come first: they know whom they wait for. */
const headStartMs = 500;
const meanWeight = 0.02;
/** Rounds with more rows than were seen may take this many times what a step takes that was planned ahead. */
const unmeasuredRound = 2;
/** At every step that was planned ahead. After 70 of them a round that was found 7 % too slow is tried again. */
const roundShare = 0.999;
/** Steps in flight of a pipeline on links that are very slow. */
const microBatchesMax = 64;
/** Of a round of the last stage: with less waiting in it, work, not the links, may be what a round takes. */
const roundWaitShareMin = 0.2;
/** Rounds whose mean is one measure of a link. */
const roundsMeasured = 32;
const rateSeconds = 10;
/** A step may take this share of what it is expected to take. */
const surelyShare = 0.75;
/**
 * Results of steps that together take no longer than this travel together: each message wakes broker, coordinator and client, whose code and data a step has meanwhile
 * driven out of the caches of cores that compute.
 */
const resultsMs = unnoticedMs;
/** Two steps may take this long together: tokens still come 30 times a second. */
const twoResultsMs = 32;
const mayTravelTogether = (steps: number, ms: number): boolean => ms <= resultsMs || (steps === 2 && ms <= twoResultsMs);

export class StepPipeline {
  /** Stages a step passes through. */
  #ppSize = 1;
  readonly #inFlight: PublishedStep[] = [];
  #times = new StepTimes();
  /** From a result to the next, of decode steps: planned ahead, and planned when nothing was in flight. */
  #aheadTimes = new RowTimes();
  #roundTimes = new RowTimes();
  /** Time on a link between two stages, the least measured, since what shares cores with others takes longer the more there is to do; null = not measured. */
  #hopMs: number | null = null;
  /** Not measured yet: sum over `count` rounds. */
  #hops = { ms: 0, count: 0 };
  /** By step, since the last rest or prompt: the last stage's time at the end of it, and how much of that it waited. */
  readonly #ends = new Map<number, { us: number; waitedUs: number }>();
  #lastEnd = { us: 0, waitedUs: 0 };
  #resting = true;
  /** No step of this epoch is back yet. It is no measure: workers touch their memory for the first time. */
  #isFirst = true;
  #lastResultAt = Number.NEGATIVE_INFINITY;
  /** Slowest seen lately, forgotten slowly; null = not measured. */
  #smallStepMs: number | null = null;
  #tokenMs: number | null = null;
  #steps = 0;
  #outputTokens = 0;
  #prefillTokens = 0;
  #stepSeconds = 0;
  #bubbleSeconds = 0;
  #collectiveSeconds = 0;
  #receiveSeconds = 0;
  #sampleSeconds = 0;
  #meanBubbleUs = 0;
  #meanBusyUs = 0;
  #meanStepMs = 0;
  readonly #outputRate = new Rate();
  readonly #prefillRate = new Rate();

  /** A new epoch: what steps take is measured anew, sums go on. */
  begin(ppSize: number): void {
    this.#ppSize = ppSize;
    this.#smallStepMs = this.#tokenMs = this.#hopMs = null;
    this.#times = new StepTimes();
    this.#isFirst = true;
    this.#aheadTimes = new RowTimes();
    this.#roundTimes = new RowTimes();
    this.abandon();
  }

  get stepsInFlight(): number {
    return this.#inFlight.length;
  }

  /**
   * How long what is in flight will still keep one stage busy, by what steps took, those whose results come next a quarter less: a plan too late costs a wait.
   * Null: nothing like it was measured.
   */
  aheadMs(now: number): number | null {
    const silent = this.#silentSteps();
    let silentMs = 0;
    let sum = 0;
    for (const [i, step] of this.#inFlight.entries()) {
      const ms = this.#times.stepMs(step);
      if (ms === null) return null;
      if (i < silent) silentMs += ms;
      else sum += ms;
    }
    return sum + Math.max(0, surelyShare * silentMs - this.#sinceMs(now));
  }

  /** Of steps in flight, those that have not begun yet, as far as is known or expected. */
  stepsToBegin(now: number): number {
    const silent = this.#silentSteps();
    let sinceMs = this.#sinceMs(now);
    let begun = 1;
    for (; begun < silent; begun++) {
      const ms = this.#times.stepMs(this.#inFlight[begun - 1]!);
      if (ms === null || sinceMs < ms) break;
      sinceMs -= ms;
    }
    return Math.max(0, this.#inFlight.length - begun);
  }

  /** The next result is that of the last step in flight. */
  get allSilent(): boolean {
    return this.#silentSteps() === this.#inFlight.length;
  }

  /** Steps until the next result: as many as travel together. */
  #silentSteps(): number {
    const last = this.#inFlight.findIndex(({ resultWaits }) => !resultWaits);
    return last + 1;
  }

  /** Since when the first step in flight may run. */
  #sinceMs(now: number): number {
    const first = this.#inFlight[0];
    return first === undefined ? 0 : now - Math.max(first.publishedAt, this.#lastResultAt);
  }

  /** Whether one more step like the last could join the results of the last `steps` that were published. */
  roomToJoin(steps: number): boolean {
    const last = this.#inFlight.slice(-steps).map((step) => this.#times.stepMs(step));
    if (last.includes(null)) return false;
    return mayTravelTogether(
      steps + 1,
      last.reduce<number>((sum, ms) => sum + ms!, last.at(-1)!),
    );
  }

  /** Marks which of these plans, the last that were published, have results that may wait for the next one's. First tokens never wait. */
  joinResults(plans: readonly StepPlan[]): void {
    if (this.#ppSize > 1) return;
    const steps = this.#inFlight.slice(-plans.length);
    let joinedMs = 0;
    let joined = 0;
    for (let i = 0; i + 1 < plans.length; i++) {
      const ms = this.#times.stepMs(steps[i]!);
      const nextMs = this.#times.stepMs(steps[i + 1]!);
      if (ms === null || nextMs === null) return;
      joinedMs += ms;
      joined++;
      const waits = steps[i]!.prefillTokens === 0 && mayTravelTogether(joined + 1, joinedMs + nextMs);
      steps[i]!.resultWaits = plans[i]!.resultWaits = waits;
      if (!waits) joined = joinedMs = 0;
    }
  }

  /**
   * Parts into which decoding sequences are split so that every stage has one while others are on the wire: stages + stages * time on a link / time in a
   * stage. Rounded down: a part more is another walk through the weights of every stage, which pays only when links hold up a round by a whole stage time.
   * 1 for a single stage.
   */
  get microBatches(): number {
    if (this.#ppSize === 1) return 1;
    const stageMs = this.#meanBusyUs / 1e3;
    const onLinks = this.#hopMs === null || stageMs <= 0 ? 0 : Math.floor((this.#ppSize * this.#hopMs) / stageMs);
    return Math.min(this.#ppSize + onLinks, microBatchesMax);
  }

  /** What drafts are weighed by: `SpeculationTimes` of the scheduler. */
  tokensPerMs(sequences: number): number | null {
    const ms = this.#aheadTimes.of(sequences);
    return ms === null ? null : sequences / ms;
  }

  roundMs(rows: number): number {
    return this.#roundTimes.of(rows) ?? unmeasuredRound * (this.#aheadTimes.of(rows) ?? rows * unmeasuredTokenMs);
  }

  /** Most prompt tokens of the next step (`StepTimes`); `targetMs`: most time between two tokens of a stream, null: by what waits. */
  prefillTokensMax(demand: PromptDemand, targetMs: number | null): number {
    return this.#times.prefillTokensMax(demand, targetMs === null ? null : targetMs / this.microBatches);
  }

  /**
   * Longest that a worker may wait for a peer inside a step of `tokens` rows that is planned now: the peer may have all steps in flight before it.
   * @returns milliseconds, 2 s at least
   */
  waitTimeoutMs(tokens: number): number {
    const ahead = this.#inFlight.reduce((sum, step) => sum + this.#expectedMs(step.tokens), 0);
    const limit = slack * this.#ppSize * (ahead + this.#expectedMs(tokens));
    return Math.round(Math.min(Math.max(limit, meshTimers.stepTimeoutMsMin), stepLimits.waitTimeoutMsMax));
  }

  /** @param prefillTokens  those of its rows that are of prompts */
  published(plan: StepPlan, prefillTokens: number, now: number): void {
    const tokens = tokensOf(plan);
    const limitMs = plan.waitTimeoutMs + headStartMs;
    this.#inFlight.push({
      step: plan.step,
      tokens,
      decodeRows: tokens - prefillTokens,
      prefillTokens,
      waitsFor: plan.sequences.reduce((newest, { after }) => Math.max(newest, after), 0),
      publishedAt: now,
      limitMs,
      afterRest: this.#resting,
      alone: this.#inFlight.length === 0,
      resultWaits: false,
    });
    this.#resting = false;
    if (prefillTokens === 0) return;
    this.#prefillTokens += prefillTokens;
    this.#prefillRate.add(prefillTokens, now);
  }

  /** @param outputTokens  sampled tokens that somebody wanted */
  completed(result: StepResult, outputTokens: number, now: number): void {
    const step = this.#inFlight.shift();
    if (step === undefined) return;
    const ms = now - Math.max(step.publishedAt, this.#lastResultAt);
    // Results that travel together come at one time; what lies between them is the workers' to say.
    const gapMs = step.alone || this.#ppSize > 1 ? now - this.#lastResultAt : (result.totalUs + result.idleUs) / 1e3;
    this.#observeGap(step, gapMs);
    this.#lastResultAt = now;
    if (step.tokens < smallStepTokens) this.#smallStepMs = slowest(this.#smallStepMs, ms);
    else this.#tokenMs = slowest(this.#tokenMs, ms / step.tokens);

    const { decodeRows, prefillTokens } = step;
    // With one stage the worker's own time is the surer one; with several it holds waits for the stage before.
    if (!this.#isFirst) this.#times.observe({ decodeRows, prefillTokens, ms: this.#ppSize === 1 ? result.totalUs / 1e3 : ms });
    if (this.#ppSize > 1) this.#observeRound(step, result);
    this.#isFirst = false;

    this.#steps++;
    this.#stepSeconds += ms / 1e3;
    this.#collectiveSeconds += result.collectiveUs / 1e6;
    this.#receiveSeconds += result.receiveUs / 1e6;
    this.#sampleSeconds += result.sampleUs / 1e6;
    // Waiting for the stage before is a bubble too; but after a rest, both it and the idle time before the step are nobody's loss.
    const bubbleUs = step.afterRest ? 0 : result.idleUs + result.receiveUs;
    this.#bubbleSeconds += bubbleUs / 1e6;
    const weight = this.#steps === 1 ? 1 : meanWeight;
    this.#meanBubbleUs += weight * (bubbleUs - this.#meanBubbleUs);
    this.#meanBusyUs += weight * (result.totalUs - result.receiveUs - this.#meanBusyUs);
    this.#meanStepMs += weight * (ms - this.#meanStepMs);
    this.#outputTokens += outputTokens;
    this.#outputRate.add(outputTokens, now);
  }

  /**
   * A round: from the end of a step on the last stage to the end of the one that waited for its tokens. They go to the first stage and through all of them, so it takes
   * stages * (time in a stage + time on a link), unless the last stage has so much else to do that it hardly waits.
   */
  #observeRound(step: PublishedStep, { idleUs, totalUs, receiveUs }: StepResult): void {
    if (step.afterRest || step.prefillTokens > 0) this.#ends.clear();
    const { us, waitedUs } = this.#lastEnd;
    const end = { us: us + idleUs + totalUs, waitedUs: waitedUs + idleUs + receiveUs };
    const begin = this.#ends.get(step.waitsFor);
    this.#lastEnd = end;
    if (!this.#isFirst) this.#ends.set(step.step, end);
    this.#ends.delete(step.step - 2 * microBatchesMax);
    if (begin === undefined || end.waitedUs - begin.waitedUs < roundWaitShareMin * (end.us - begin.us)) return;
    this.#hops.ms += ((end.us - begin.us) / this.#ppSize - (totalUs - receiveUs)) / 1e3;
    if (++this.#hops.count < roundsMeasured) return;
    this.#hopMs = Math.min(this.#hopMs ?? Number.POSITIVE_INFINITY, Math.max(0, this.#hops.ms / roundsMeasured));
    this.#hops = { ms: 0, count: 0 };
  }

  #observeGap({ decodeRows, prefillTokens, afterRest, alone }: PublishedStep, ms: number): void {
    if (prefillTokens > 0 || afterRest) return;
    if (alone) return this.#roundTimes.observe(decodeRows, ms);
    this.#aheadTimes.observe(decodeRows, ms);
    this.#roundTimes.fade(roundShare);
  }

  /** Nothing is in flight because there is nothing to do. */
  rest(): void {
    this.#resting = true;
  }

  /** The epoch is over: nothing is in flight any more. */
  abandon(): void {
    this.#inFlight.length = 0;
    this.#ends.clear();
    this.#hops = { ms: 0, count: 0 };
    this.#resting = true;
  }

  /** The oldest step in flight, when its result should have been here; null when all is well. */
  overdue(now: number): { step: number; tokens: number; waitedMs: number; limitMs: number } | null {
    const oldest = this.#inFlight[0];
    if (oldest === undefined) return null;
    const waitedMs = now - Math.max(oldest.publishedAt, this.#lastResultAt);
    return waitedMs > oldest.limitMs ? { step: oldest.step, tokens: oldest.tokens, waitedMs, limitMs: oldest.limitMs } : null;
  }

  numbers(now: number): PipelineNumbers {
    const all = this.#meanBubbleUs + this.#meanBusyUs;
    return {
      stepsInFlight: this.#inFlight.length,
      steps: this.#steps,
      outputTokens: this.#outputTokens,
      prefillTokens: this.#prefillTokens,
      stepSeconds: this.#stepSeconds,
      bubbleSeconds: this.#bubbleSeconds,
      collectiveSeconds: this.#collectiveSeconds,
      receiveSeconds: this.#receiveSeconds,
      sampleSeconds: this.#sampleSeconds,
      bubbleRatio: all === 0 ? 0 : this.#meanBubbleUs / all,
      stepMs: this.#meanStepMs,
      outputTokensPerSecond: this.#outputRate.perSecond(now),
      prefillTokensPerSecond: this.#prefillRate.perSecond(now),
    };
  }

  #expectedMs(tokens: number): number {
    if (this.#smallStepMs === null && this.#tokenMs === null) return tokens * unmeasuredTokenMs;
    if (tokens < smallStepTokens && this.#smallStepMs !== null) return this.#smallStepMs;
    // Of many rows only small steps were measured: a row costs no more than a step of its own.
    const tokenMs = this.#tokenMs ?? this.#smallStepMs!;
    return Math.max(tokens, smallStepTokens) * tokenMs;
  }
}

export const tokensOf = (plan: StepPlan): number => plan.sequences.reduce((sum, { tokens }) => sum + (tokens?.length ?? 1), 0);

const slowest = (before: number | null, ms: number): number => (before === null ? ms : Math.max(ms, 0.95 * before + 0.05 * ms));

/** Events a second, older ones counting exponentially less. */
class Rate {
  #value = 0;
  #at = 0;

  add(count: number, now: number): void {
    this.#value = this.perSecond(now) + count / rateSeconds;
    this.#at = now;
  }

  perSecond(now: number): number {
    return this.#value * Math.exp(-(now - this.#at) / 1e3 / rateSeconds);
  }
}
