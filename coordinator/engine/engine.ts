/**
 * A request's life between HTTP and the mesh: queued, scheduled, its tokens turned into text and events, and ended once, by a finish reason or by one
 * typed error. The scheduler decides what runs; the engine owns time, text and readers.
 *
 *   submit -> scheduler -> plan -> StepTransport ... result -> scheduler -> detokenizer -> stop strings -> EventQueue -> reader
 *
 * Requests belong to an epoch of the mesh: when it is lost they end at once. The token log (`tokenLog`) has what a later recovery needs.
 */
import { errorEntry, ShardmeshError, toShardmeshError } from '../../protocol/errors.ts';
import { httpLimits } from '../../protocol/limits.ts';
import type { SamplingParams, StepOutput, StepPlan, StepResult } from '../../protocol/step-plan.ts';
import { monotonicUs, TraceRecorder } from '../../protocol/trace.ts';
import { BlockPool } from '../kv-cache/block-pool.ts';
import { PrefixCache } from '../kv-cache/prefix-cache.ts';
import { Scheduler, type Progress, type SchedulerCounts } from '../scheduler/scheduler.ts';
import { positionsMax, type Sequence, type SequenceSpec } from '../scheduler/sequence.ts';
import { StopMatcher, StopStrings } from '../text/stop-matcher.ts';
import type { TextModel } from '../text/text-types.ts';
import type {
  Engine,
  EngineEvent,
  EngineRequest,
  EngineStatus,
  FinishReason,
  RequestHandle,
  TokenLogprob,
} from './engine-types.ts';
import { EventQueue } from './event-queue.ts';
import { StepPipeline, type PipelineNumbers } from './step-pipeline.ts';
import type { MeshEpoch, MeshFault, StepTransport } from './step-transport.ts';

export interface EngineOptions {
  text: Pick<TextModel, 'detokenizer' | 'endTokens' | 'bosToken' | 'vocabularySize'>;
  transport: StepTransport;
  /** sha256 of the model file, types of activations and of K and V: what a cached block depends on besides its tokens. */
  modelSha256: string;
  activations: string;
  kvType: string;
  /** 32 random bytes; null: no prefix cache. */
  prefixCacheSecret: Uint8Array | null;
  contextTokensMax: number;
  blockTokens: number;
  sequencesMax: number;
  stepTokensMax: number;
  prefillChunkMax: number;
  /** Most output rows of a step; default: a row for each sequence, and 512 where prompts are scored. A result must fit a message, candidates included. */
  stepOutputsMax?: number;
  /** Never more steps in flight than this; default 16, or twice the micro-batches of a pipeline. */
  stepsInFlightMax?: number;
  /** Most time between two tokens of a stream while prompts are computed; default: 1.5 times what it is without, 20 ms at least; 100 ms more for a short prompt. */
  itlTargetMs?: number | null;
  /** Steps may have drafts where that pays; default: they never have. */
  speculation?: boolean;
  /** Most requests that may wait for their first step. */
  waitingRequestsMax?: number;
  /** Monotonic milliseconds. */
  now?: () => number;
  recorder?: TraceRecorder;
  /** Hears of each plan that is published, and of which requests it has rows: so that one request can be followed through the logs. */
  onPlan?: (plan: StepPlan, requestIds: string[]) => void;
}

export interface EngineNumbers extends PipelineNumbers, SchedulerCounts {
  requestsLive: number;
  requestsFinished: number;
  requestsFailed: number;
  requestsCancelled: number;
  kvBlocksTotal: number;
  kvBlocksUsed: number;
  kvBlocksCached: number;
  /** Results of an epoch or a step that is over; they changed nothing. */
  staleResults: number;
  epochs: number;
}

/** What is known of a live request: enough to compute it again somewhere else. */
export interface LoggedRequest {
  id: string;
  tenant: string;
  promptTokens: readonly number[];
  /** Output tokens of each choice. */
  outputs: number[][];
}

interface Choice {
  index: number;
  /** Null: nothing is computed for it (further choices of a request that only scores its prompt). */
  sequence: Sequence | null;
  detokenizer: ReturnType<TextModel['detokenizer']>;
  stopMatcher: StopMatcher | null;
  /** Given to the reader: behind a stop string the sequence may have more. */
  outputTokens: number;
  finished: boolean;
}

interface LiveRequest {
  request: EngineRequest;
  events: EventQueue<EngineEvent>;
  choices: Choice[];
  /** Since when its sequences are paused because the reader is behind; null = they are not. */
  pausedSince: number | null;
  /** The engine's own; takes no place in the queue. */
  isCanary: boolean;
}

const tickMs = 100;
/**
 * Less than this ahead: time to plan again, so that a coordinator that gets no core for a while stops nobody. Not sooner: a request that comes while a long step runs
 * shall be in the next one, and what is ahead is computed in vain when a sequence ends unforeseen.
 */
const aheadMsMin = 12;
/** One that runs, one that follows, where nobody knows yet how long they take. */
const stepsAheadUnmeasured = 2;
const stepsAheadMax = 16;
/** With 20 candidates each this stays below a third of the broker's payload limit. */
const scoredRowsMax = 512;
/** When the event loop was held up for longer than this, results may lie unread in a socket: no step is called overdue. */
const loopLagMs = 500;
const canaryTimeoutMs = 10_000;
const canaryTenant = '(canary)';

export class ShardmeshEngine implements Engine {
  readonly #options: EngineOptions;
  readonly #now: () => number;
  readonly #recorder: TraceRecorder;
  readonly #live = new Map<string, LiveRequest>();
  readonly #choiceOf = new Map<Sequence, { live: LiveRequest; choice: Choice }>();
  #mesh: MeshEpoch | null = null;
  #scheduler: Scheduler | null = null;
  #pool: BlockPool | null = null;
  #cache: PrefixCache | null = null;
  readonly #pipeline = new StepPipeline();
  /** Why there is no epoch. */
  #reason = 'the mesh has not been connected yet';
  #lastStepDone = 0;
  #lastStepAt: number | null = null;
  #draining = false;
  #onEmpty: (() => void)[] = [];
  #timer: NodeJS.Timeout | null = null;
  #lastTickAt = 0;
  #pumpQueued = false;
  /** Until the steps in flight are nearly done. */
  #planTimer: NodeJS.Timeout | null = null;
  #pumping = false;
  #canaries = 0;
  #past: SchedulerCounts | null = null;
  #requestsFinished = 0;
  #requestsFailed = 0;
  #requestsCancelled = 0;
  #staleResults = 0;
  #epochs = 0;

  constructor(options: EngineOptions) {
    this.#options = options;
    this.#now = options.now ?? (() => performance.now());
    this.#recorder = options.recorder ?? new TraceRecorder();
    options.transport.onEpoch((mesh) => this.#begin(mesh));
    options.transport.onLost((fault) => this.#lose(fault));
    options.transport.onResult((result) => this.#receive(result));
  }

  // ------------------------------------------------------------------------------------------------------------------ requests

  /** @throws {ShardmeshError} as `Engine.submit`, and `invalid_value` for an empty prompt, a token outside the vocabulary or bad stop strings */
  submit(request: EngineRequest): RequestHandle {
    return this.#submit(request, false);
  }

  #submit(request: EngineRequest, isCanary: boolean): RequestHandle {
    if (this.#draining) throw new ShardmeshError('draining');
    if (this.#scheduler === null)
      throw new ShardmeshError('mesh_unavailable', undefined, { details: { reason: this.#reason.replace(/\.$/, '') } });
    this.#checkRequest(request, this.#scheduler);
    if (!isCanary) this.#checkQueue();

    const live: LiveRequest = {
      request,
      events: new EventQueue(
        () => this.#readerCaughtUp(live),
        () => this.#cancel(live),
      ),
      choices: [],
      pausedSince: null,
      isCanary,
    };
    const stopStrings = request.stopStrings.length === 0 ? null : new StopStrings(request.stopStrings);
    const stopTokens = new Set([...(request.ignoreEos ? [] : this.#options.text.endTokens), ...request.stopTokenIds]);
    for (let index = 0; index < request.n; index++) {
      live.choices.push({
        index,
        sequence: this.#addSequence(request, index, stopTokens, live.choices[0]?.sequence ?? null),
        detokenizer: this.#options.text.detokenizer(),
        stopMatcher: stopStrings === null ? null : new StopMatcher(stopStrings),
        outputTokens: 0,
        finished: false,
      });
    }
    this.#live.set(request.id, live);
    for (const choice of live.choices) if (choice.sequence !== null) this.#choiceOf.set(choice.sequence, { live, choice });
    if (live.choices[0]!.sequence === null) {
      // Nothing to compute: no output is wanted, and no prompt token but the first (which nothing precedes) could have a score.
      live.events.push({ type: 'prompt', cachedTokens: 0, promptLogprobs: request.promptLogprobs === null ? null : [null] });
      for (const choice of live.choices) this.#finishChoice(live, choice, 'length', '');
    } else {
      this.#watch();
      this.#pumpSoon();
    }
    return { id: request.id, events: live.events, cancel: () => this.#cancel(live) };
  }

  #checkRequest(request: EngineRequest, scheduler: Scheduler): void {
    const { contextTokensMax, blockTokens, text } = this.#options;
    const { promptTokens, outputTokensMax } = request;
    if (this.#live.has(request.id)) throw new ShardmeshError('internal', `A request with the id ${request.id} is live already.`);
    if (promptTokens.length === 0) {
      throw new ShardmeshError('invalid_value', 'The prompt has no tokens; send at least one.', { param: 'prompt' });
    }
    const unknown = promptTokens.find((token) => !Number.isInteger(token) || token < 0 || token >= text.vocabularySize);
    if (unknown !== undefined) {
      const message = `The prompt has token ${unknown}; ids of this model are 0 to ${text.vocabularySize - 1}.`;
      throw new ShardmeshError('invalid_value', message, { param: 'prompt' });
    }
    if (promptTokens.length + outputTokensMax > contextTokensMax) {
      throw new ShardmeshError(
        'context_length_exceeded',
        `The prompt has ${promptTokens.length} tokens and up to ${outputTokensMax} more are asked for, but the context holds ` +
          `${contextTokensMax}. Shorten the prompt or lower max_tokens.`,
      );
    }
    const blocks = scheduler.blocksNeeded(request);
    const { kvBlocks } = this.#mesh!;
    if (blocks > kvBlocks) {
      throw new ShardmeshError(
        'context_length_exceeded',
        `The prompt has ${promptTokens.length} tokens and up to ${outputTokensMax} more are asked for, but the KV cache holds ` +
          `${kvBlocks * blockTokens}. Shorten the prompt or lower max_tokens.`,
      );
    }
  }

  #checkQueue(): void {
    const limit = this.#options.waitingRequestsMax ?? httpLimits.waitingRequestsMax;
    const waiting = this.#waitingRequests();
    if (waiting < limit) return;
    throw new ShardmeshError('queue_full', undefined, { details: { limit }, retryAfterSeconds: this.#retryAfterSeconds() });
  }

  #waitingRequests(): number {
    let waiting = 0;
    for (const { choices, isCanary } of this.#live.values())
      if (!isCanary && choices[0]!.sequence?.admittedAt === null) waiting++;
    return waiting;
  }

  /** Until about a quarter of the queue has been served, by what waits and by the measured rates. */
  #retryAfterSeconds(): number {
    let outputTokens = 0;
    let promptTokens = 0;
    for (const { request } of this.#live.values()) {
      outputTokens += request.outputTokensMax * request.n;
      promptTokens += request.promptTokens.length;
    }
    const { outputTokensPerSecond, prefillTokensPerSecond } = this.#pipeline.numbers(this.#now());
    const seconds = outputTokens / Math.max(outputTokensPerSecond, 1) + promptTokens / Math.max(prefillTokensPerSecond, 1);
    return Math.min(Math.max(Math.ceil(seconds / 4), 1), 30);
  }

  #addSequence(
    request: EngineRequest,
    choice: number,
    stopTokens: ReadonlySet<number>,
    leader: Sequence | null,
  ): Sequence | null {
    const { promptTokens, outputTokensMax, outputTokensMin, promptLogprobs } = request;
    const scoresOnly = outputTokensMax === 0;
    if (positionsMax(request) < 1 || (scoresOnly && (promptLogprobs === null || choice > 0))) return null;
    // The prompt is scored once, by choice 0; the others find it in the prefix cache.
    const scorePrompt = promptLogprobs !== null && choice === 0;
    const logprobs = scorePrompt ? Math.max(promptLogprobs, request.sampling.logprobs ?? 0) : request.sampling.logprobs;
    const sampling: SamplingParams = { ...request.sampling, choice, logprobs };
    const spec: SequenceSpec = {
      tenant: request.tenant,
      promptTokens,
      sampling,
      outputTokensMax,
      outputTokensMin,
      stopTokens,
      scorePrompt,
    };
    return this.#scheduler!.add(spec, leader);
  }

  // ------------------------------------------------------------------------------------------------------------------ steps

  /** Plans as long as there is room and something to do. */
  #pump(): void {
    if (this.#pumping) return;
    this.#pumping = true;
    const plans: StepPlan[] = [];
    try {
      while (this.#mayPlan(plans.length)) {
        const now = this.#now();
        const startUs = this.#recorder.on ? monotonicUs() : 0;
        const plan: StepPlan | null = this.#scheduler!.schedule(now);
        if (plan === null) break;
        if (this.#recorder.on) this.#recorder.add('plan', plan.step, startUs);
        this.#pipeline.published(plan, this.#scheduler!.plannedPromptTokens, now);
        this.#options.onPlan?.(plan, this.#requestsOf(plan));
        plans.push(plan);
      }
      if (plans.length > 0) {
        this.#pipeline.joinResults(plans);
        this.#options.transport.publishPlans(plans);
      }
      if (this.#pipeline.stepsInFlight === 0) this.#pipeline.rest();
    } catch (error) {
      this.#giveUp(error);
    } finally {
      this.#pumping = false;
    }
  }

  /** @param planned  plans that wait to be published: once some do, more go with them */
  #mayPlan(planned: number): boolean {
    const scheduler = this.#scheduler;
    if (scheduler === null || !this.#options.transport.ready) return false;
    const { stepsInFlight, microBatches } = this.#pipeline;
    if (microBatches > 1) return stepsInFlight < 2 * microBatches;
    if (stepsInFlight === 0) return true;
    const now = this.#now();
    const aheadMs = this.#pipeline.aheadMs(now);
    if (aheadMs === null) return stepsInFlight < stepsAheadUnmeasured;
    // A request that waits, or a prompt under way, gets the next step that is not planned yet.
    const prompts = scheduler.waitingCount > 0 || scheduler.prefilling || scheduler.drafting;
    const silent = this.#pipeline.allSilent;
    if (prompts && this.#pipeline.stepsToBegin(now) > 0) {
      if (silent) this.#planIn(aheadMs);
      return false;
    }
    // Several short steps travel in one message, and their results in one.
    if (planned > 0 && !prompts) return this.#pipeline.roomToJoin(planned);
    if (aheadMs < aheadMsMin || (silent && stepsInFlight > 1)) return true;
    if (silent) this.#planIn(aheadMs - aheadMsMin);
    return false;
  }

  #planIn(ms: number): void {
    if (this.#planTimer !== null) clearTimeout(this.#planTimer);
    this.#planTimer = setTimeout(() => this.#pump(), ms);
    this.#planTimer.unref();
  }

  #requestsOf(plan: StepPlan): string[] {
    const slots = new Set(plan.sequences.map(({ slot }) => slot));
    const ids = new Set<string>();
    for (const [sequence, { live }] of this.#choiceOf) if (slots.has(sequence.slot)) ids.add(live.request.id);
    return [...ids];
  }

  /** After all that happens now: requests that arrive together share a step. */
  #pumpSoon(): void {
    if (this.#pumpQueued) return;
    this.#pumpQueued = true;
    queueMicrotask(() => {
      this.#pumpQueued = false;
      this.#pump();
    });
  }

  #receive(result: StepResult): void {
    const mesh = this.#mesh;
    const scheduler = this.#scheduler;
    const isOld = mesh === null || result.placement !== mesh.placement.id || result.epoch !== mesh.epoch;
    if (isOld || scheduler === null || result.step <= this.#lastStepDone) {
      this.#staleResults++;
      return;
    }
    const recorder = this.#recorder;
    const startUs = recorder.on ? monotonicUs() : 0;
    let deliveryUs = 0;
    try {
      const progress = scheduler.complete(result);
      if (recorder.on) recorder.add('commit', result.step, startUs, (deliveryUs = monotonicUs()));
      const now = this.#now();
      this.#lastStepDone = result.step;
      this.#lastStepAt = now;
      this.#pipeline.completed(
        result,
        progress.reduce((sum, { output }) => sum + (output === null ? 0 : 1), 0),
        now,
      );
      // Workers that have nothing to do come first, then the readers.
      if (this.#pipeline.stepsInFlight === 0) this.#pump();
      for (const one of progress) this.#deliver(one);
      if (recorder.on) recorder.add('deliver', result.step, deliveryUs);
    } catch (error) {
      this.#giveUp(error);
      return;
    }
    this.#pump();
  }

  #deliver({ sequence, promptComputed, output, finished }: Progress): void {
    const entry = this.#choiceOf.get(sequence);
    // An earlier event of this step ended the whole request.
    if (entry === undefined) return;
    const { live, choice } = entry;
    if (promptComputed && choice.index === 0) this.#deliverPrompt(live, sequence);
    if (output === null) {
      if (finished !== null) this.#finishScoring(live, finished);
      return;
    }
    const { request } = live;
    choice.outputTokens++;
    const logprob = request.sampling.logprobs === null ? null : tokenLogprob(output, request.sampling.logprobs);
    // The text of a token that ends the sequence is nobody's.
    const startUs = this.#recorder.on ? monotonicUs() : 0;
    const { text, stopped } = finished === 'stop' ? noText : this.#textOf(live, choice, choice.detokenizer.push(output.token));
    if (this.#recorder.on) this.#recorder.add('detokenise', 0, startUs);
    live.events.push({ type: 'token', choice: choice.index, token: output.token, text, logprob });
    if (stopped) {
      this.#scheduler!.end(sequence);
      this.#finishChoice(live, choice, 'stop', '');
    } else if (finished !== null) {
      const rest = this.#textOf(live, choice, choice.detokenizer.flush());
      const held = rest.stopped ? '' : (choice.stopMatcher?.flush() ?? '');
      this.#finishChoice(live, choice, rest.stopped ? 'stop' : finished, rest.text + held);
    } else if (live.pausedSince === null && live.events.pending > httpLimits.streamBufferTokensMax) {
      live.pausedSince = this.#now();
      for (const { sequence: other } of live.choices) if (other !== null) this.#scheduler!.pause(other);
    }
  }

  /** Below the smallest number of output tokens nothing stops the sequence. */
  #textOf({ request }: LiveRequest, choice: Choice, text: string): { text: string; stopped: boolean } {
    if (choice.stopMatcher === null || choice.outputTokens < request.outputTokensMin) return { text, stopped: false };
    const result = choice.stopMatcher.push(text);
    return { text: result.text, stopped: result.stopped !== null };
  }

  #deliverPrompt(live: LiveRequest, sequence: Sequence): void {
    const candidates = live.request.promptLogprobs;
    live.events.push({
      type: 'prompt',
      cachedTokens: sequence.cachedTokens ?? 0,
      promptLogprobs:
        candidates === null
          ? null
          : sequence.promptScores.map((score, i) => (i === 0 || score === null ? null : tokenLogprob(score, candidates))),
    });
  }

  #finishScoring(live: LiveRequest, reason: FinishReason): void {
    for (const choice of live.choices) this.#finishChoice(live, choice, reason, '');
  }

  #finishChoice(live: LiveRequest, choice: Choice, reason: FinishReason, text: string): void {
    live.events.push({ type: 'finished', choice: choice.index, reason, text, outputTokens: choice.outputTokens });
    choice.finished = true;
    if (choice.sequence !== null) this.#choiceOf.delete(choice.sequence);
    if (live.choices.some(({ finished }) => !finished)) return;
    this.#requestsFinished++;
    this.#forget(live);
    live.events.end();
  }

  // ------------------------------------------------------------------------------------------------------------------ endings

  #cancel(live: LiveRequest): void {
    if (!this.#isLive(live)) return;
    this.#requestsCancelled++;
    this.#endSequences(live);
    this.#forget(live);
    live.events.discard();
    this.#pumpSoon();
  }

  /** Ends a request with one error, behind what its reader has not read yet. */
  #endWithError(live: LiveRequest, code: string, message: string): void {
    if (!this.#isLive(live)) return;
    this.#requestsFailed++;
    this.#endSequences(live);
    this.#forget(live);
    live.events.push({ type: 'error', code, message, retryAfterSeconds: errorEntry(code).retryAfterSeconds });
    live.events.end();
  }

  #isLive(live: LiveRequest): boolean {
    return this.#live.get(live.request.id) === live;
  }

  #endSequences({ choices }: LiveRequest): void {
    for (const { sequence } of choices) if (sequence !== null) this.#scheduler?.end(sequence);
  }

  #forget(live: LiveRequest): void {
    this.#live.delete(live.request.id);
    for (const { sequence } of live.choices) if (sequence !== null) this.#choiceOf.delete(sequence);
    if (this.#live.size > 0) return;
    for (const resolve of this.#onEmpty.splice(0)) resolve();
  }

  #readerCaughtUp(live: LiveRequest): void {
    if (live.pausedSince === null || live.events.pending > httpLimits.streamBufferTokensMax / 2) return;
    live.pausedSince = null;
    if (!this.#isLive(live)) return;
    for (const { sequence } of live.choices) if (sequence !== null) this.#scheduler?.resume(sequence);
    this.#pumpSoon();
  }

  // ------------------------------------------------------------------------------------------------------------------ mesh

  #begin(mesh: MeshEpoch): void {
    if (this.#scheduler !== null) {
      this.#lose({ code: 'worker_lost', message: `Epoch ${this.#mesh!.epoch} of the mesh was replaced by epoch ${mesh.epoch}.` });
    }
    const options = this.#options;
    const ppSize = mesh.placement.stages.length;
    const stepsInFlightMax = options.stepsInFlightMax ?? (ppSize === 1 ? stepsAheadMax : Number.MAX_SAFE_INTEGER);
    const pool = new BlockPool(mesh.kvBlocks, (block) => this.#cache?.forget(block));
    const { modelSha256, activations, kvType } = options;
    const identity = { modelSha256, activations, kvType, arithmetic: mesh.arithmetic };
    const { blockTokens, prefixCacheSecret: secret } = options;
    this.#pipeline.begin(ppSize);
    this.#pool = pool;
    this.#cache = secret === null ? null : new PrefixCache({ pool, blockTokens, secret, identity });
    this.#scheduler = new Scheduler({
      placement: mesh.placement.id,
      epoch: mesh.epoch,
      pool,
      cache: this.#cache,
      blockTokens,
      sequencesMax: options.sequencesMax,
      stepTokensMax: options.stepTokensMax,
      prefillChunkMax: options.prefillChunkMax,
      stepOutputsMax: options.stepOutputsMax ?? Math.max(options.sequencesMax, Math.min(options.stepTokensMax, scoredRowsMax)),
      microBatches: () => Math.min(this.#pipeline.microBatches, stepsInFlightMax),
      prefillTokensMax: (demand) => this.#pipeline.prefillTokensMax(demand, options.itlTargetMs ?? null),
      stepsInFlightMax,
      // A sequence may be in the step that runs and in one that waits for its token: the way to the coordinator and back is never inside the token loop.
      // Chunks of one prompt fill a whole pipeline.
      sequenceStepsMax: ppSize === 1 ? stepsInFlightMax : Math.max(2, ppSize),
      speculation: options.speculation ? this.#pipeline : null,
      waitTimeoutMs: (tokens) => this.#pipeline.waitTimeoutMs(tokens),
    });
    this.#mesh = mesh;
    this.#lastStepDone = 0;
    this.#epochs++;
  }

  /** The epoch is over: every request ends with the fault, at once; scheduler, pool and cache are gone. */
  #lose(fault: MeshFault): void {
    this.#reason = fault.message;
    const scheduler = this.#scheduler;
    if (scheduler === null) return;
    this.#past = this.#counts();
    this.#scheduler = null;
    this.#mesh = null;
    this.#pool = null;
    this.#cache = null;
    this.#pipeline.abandon();
    for (const live of [...this.#live.values()]) this.#endWithError(live, fault.code, fault.message);
    scheduler.abandon();
  }

  /** A step is overdue, a result does not fit, or an invariant is broken: this epoch cannot go on. */
  #giveUp(error: unknown): void {
    const { code, message } = toShardmeshError(error);
    const cause = error instanceof ShardmeshError || !(error instanceof Error) ? '' : ` ${error.name}: ${error.message}`;
    const { transport } = this.#options;
    const fault = transport.explain?.({ code, message }) ?? { code, message };
    this.#lose(fault);
    transport.reportFault({ code: fault.code, message: fault.message + cause });
  }

  // ------------------------------------------------------------------------------------------------------------------ time

  #watch(): void {
    if (this.#timer !== null) return;
    this.#lastTickAt = this.#now();
    this.#timer = setInterval(() => this.#tick(), tickMs);
    this.#timer.unref();
  }

  #tick(): void {
    const now = this.#now();
    const heldUp = now - this.#lastTickAt > loopLagMs;
    this.#lastTickAt = now;
    for (const live of [...this.#live.values()]) {
      if (now >= live.request.deadlineAt) {
        this.#endWithError(live, 'deadline_exceeded', 'The request did not finish before its deadline.');
      } else if (live.pausedSince !== null && now - live.pausedSince > httpLimits.slowReaderTimeoutMs) {
        const seconds = Math.round(httpLimits.slowReaderTimeoutMs / 1000);
        const tokens = live.events.pending;
        this.#endWithError(
          live,
          'slow_reader',
          `The client left ${tokens} tokens unread for ${seconds} s. Read the stream faster.`,
        );
      }
    }
    const overdue = heldUp ? null : this.#pipeline.overdue(now);
    if (overdue !== null) {
      const { step, tokens, waitedMs, limitMs } = overdue;
      const message = `Step ${step} of ${tokens} tokens did not come back within ${limitMs} ms (waited ${Math.round(waitedMs)} ms).`;
      this.#giveUp(new ShardmeshError('step_timeout', message));
    }
    this.#pump();
    if (this.#live.size === 0 && this.#pipeline.stepsInFlight === 0) {
      clearInterval(this.#timer!);
      this.#timer = null;
    }
  }

  // ------------------------------------------------------------------------------------------------------------------ outside

  /** Takes no new requests, and waits until all have ended; those that are left after `graceMs` end with the error `draining`. */
  async drain(graceMs: number): Promise<void> {
    this.#draining = true;
    if (this.#live.size === 0) return;
    const empty = new Promise<void>((resolve) => this.#onEmpty.push(resolve));
    const timer = setTimeout(() => {
      for (const live of [...this.#live.values()]) {
        this.#endWithError(live, 'draining', `The server shut down before the request finished (${graceMs} ms were left to it).`);
      }
    }, graceMs);
    await empty;
    clearTimeout(timer);
  }

  /**
   * Whether a real step came back in the last `freshMs`. When none did, a request of one token is run to see.
   * @returns false: the mesh is not there, or the step failed or took more than 10 s
   */
  async canary(freshMs: number): Promise<boolean> {
    if (this.#scheduler === null || this.#draining) return false;
    const now = this.#now();
    if (this.#lastStepAt !== null && now - this.#lastStepAt <= freshMs) return true;
    let handle: RequestHandle;
    try {
      handle = this.#submit(this.#canaryRequest(now), true);
    } catch {
      return false;
    }
    for await (const event of handle.events) if (event.type === 'finished') return true;
    return false;
  }

  #canaryRequest(now: number): EngineRequest {
    return {
      id: `canary_${++this.#canaries}`,
      tenant: canaryTenant,
      promptTokens: [this.#options.text.bosToken ?? 0],
      sampling: {
        temperature: 0,
        topP: 1,
        topK: 0,
        minP: 0,
        seed: 0n,
        repetitionPenalty: 1,
        presencePenalty: 0,
        frequencyPenalty: 0,
        logitBias: [],
        logprobs: null,
      },
      n: 1,
      outputTokensMax: 1,
      outputTokensMin: 0,
      stopStrings: [],
      stopTokenIds: [],
      ignoreEos: true,
      promptLogprobs: null,
      deadlineAt: now + canaryTimeoutMs,
    };
  }

  status(): EngineStatus {
    const meshReady = this.#scheduler !== null && this.#options.transport.ready;
    return {
      meshReady,
      reason: meshReady ? null : this.#reason,
      draining: this.#draining,
      waiting: this.#scheduler?.waitingCount ?? 0,
      running: this.#scheduler?.running.length ?? 0,
      kvBlocksTotal: this.#pool?.total ?? 0,
      kvBlocksUsed: this.#pool?.used ?? 0,
      lastStepAt: this.#lastStepAt,
    };
  }

  /** Plain numbers, for metrics. Sums are over all epochs. */
  numbers(): EngineNumbers {
    return {
      ...this.#counts(),
      ...this.#pipeline.numbers(this.#now()),
      requestsLive: this.#live.size,
      requestsFinished: this.#requestsFinished,
      requestsFailed: this.#requestsFailed,
      requestsCancelled: this.#requestsCancelled,
      kvBlocksTotal: this.#pool?.total ?? 0,
      kvBlocksUsed: this.#pool?.used ?? 0,
      kvBlocksCached: this.#cache?.size ?? 0,
      staleResults: this.#staleResults,
      epochs: this.#epochs,
    };
  }

  /** Prompt and emitted tokens of every live request. */
  tokenLog(): LoggedRequest[] {
    return [...this.#live.values()].map(({ request, choices }) => ({
      id: request.id,
      tenant: request.tenant,
      promptTokens: request.promptTokens,
      outputs: choices.map(({ sequence }) => sequence?.tokens.slice(sequence.promptLength) ?? []),
    }));
  }

  #counts(): SchedulerCounts {
    const past = this.#past;
    const present = this.#scheduler?.counts();
    const sum = (name: keyof SchedulerCounts): number => (past?.[name] ?? 0) + (present?.[name] ?? 0);
    return {
      waiting: present?.waiting ?? 0,
      running: present?.running ?? 0,
      stepsInFlight: present?.stepsInFlight ?? 0,
      preemptions: sum('preemptions'),
      promptTokens: sum('promptTokens'),
      cachedTokens: sum('cachedTokens'),
      rowsPlanned: sum('rowsPlanned'),
      rowsWasted: sum('rowsWasted'),
      drafts: sum('drafts'),
      draftTokens: sum('draftTokens'),
      draftTokensAccepted: sum('draftTokensAccepted'),
    };
  }
}

const noText = { text: '', stopped: false };

/** @throws {ShardmeshError} `invalid_message`: the worker left out a log-probability that was asked for */
function tokenLogprob({ token, logprob, top }: StepOutput, candidates: number): TokenLogprob {
  if (logprob === null) throw new ShardmeshError('invalid_message', `A result has no log-probability for token ${token}.`);
  return { token, logprob, top: top.slice(0, candidates) };
}
