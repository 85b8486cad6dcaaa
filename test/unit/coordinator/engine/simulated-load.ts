/**
 * The engine with its scheduler and step times under load, in front of workers that compute nothing: a step takes as long as its rows would, by vitest's fake clock (timers count whole
 * milliseconds, the workers exact ones). So a run is the same each time, and seconds of load take a fraction of one.
 */
import { vi } from 'vitest';
import { ShardmeshEngine } from '../../../../coordinator/engine/engine.ts';
import type { MeshEpoch, StepTransport } from '../../../../coordinator/engine/step-transport.ts';
import { draftCount, type StepPlan, type StepResult } from '../../../../protocol/step-plan.ts';
import { settle } from './make-engine.ts';
import { greedy } from '../scheduler/make-scheduler.ts';

/** Milliseconds, about as measured with SmolLM2-135M on the two cores of the Xeon of README.md: of any step, of each row that decodes, of each prompt token. */
const stepMs = 3.2;
const rowMs = 0.9;
const tokenMs = 0.62;
/** At this position of a prompt its tokens take twice as long as in the beginning. */
const tokenMsDoubles = 3_000;
/** A plan or a result on its way. */
const wireMs = 0.4;

export interface SimulatedStep {
  beginMs: number;
  ms: number;
  decodeRows: number;
  /** Prompt tokens of each sequence that has some. */
  chunks: number[];
}

/** One stage. */
export class SimulatedMesh implements StepTransport {
  ready = true;
  readonly steps: SimulatedStep[] = [];
  #busyUntil = 0;
  #waiting: StepResult[] = [];
  #result: (result: StepResult) => void = () => undefined;
  #began: (epoch: MeshEpoch) => void = () => undefined;

  publishPlans(plans: StepPlan[]): void {
    for (const plan of plans) this.#run(plan);
  }

  #run(plan: StepPlan): void {
    const beginMs = Math.max(this.#busyUntil, performance.now() + wireMs);
    let ms = stepMs;
    let decodeRows = 0;
    const chunks: number[] = [];
    for (const sequence of plan.sequences) {
      const rows = sequence.tokens?.length ?? 1;
      if (rows > 1 && draftCount(sequence) === 0) {
        chunks.push(rows);
        ms += rows * tokenMs * (1 + (sequence.position + rows / 2) / tokenMsDoubles);
      } else {
        decodeRows += rows;
        ms += rows * rowMs;
      }
    }
    this.#busyUntil = beginMs + ms;
    this.steps.push({ beginMs, ms, decodeRows, chunks });
    const outputs = plan.sequences.flatMap(({ slot, outputs }) =>
      outputs.map(() => ({ slot, token: 5, logprob: null, top: [] })),
    );
    const { placement, epoch, step } = plan;
    const times = { totalUs: Math.round(ms * 1e3), collectiveUs: 0, receiveUs: 0, sampleUs: 0, idleUs: 0 };
    this.#waiting.push({ type: 'step_result', placement, epoch, step, outputs, ...times });
    if (plan.resultWaits) return;
    const results = this.#waiting.splice(0);
    setTimeout(() => results.forEach((result) => this.#result(result)), Math.ceil(this.#busyUntil + wireMs - performance.now()));
  }

  onResult(listener: (result: StepResult) => void): void {
    this.#result = listener;
  }

  onEpoch(listener: (epoch: MeshEpoch) => void): void {
    this.#began = listener;
  }

  onLost(): void {
    // No epoch of this mesh is ever over.
  }

  reportFault({ message }: { message: string }): void {
    throw new Error(message);
  }

  begin(kvBlocks: number): void {
    const range = { from: 0, to: 1 };
    const rank = { worker: 'w', attentionUnits: range, feedForwardUnits: range, vocabularyUnits: range };
    const placement = {
      id: 'p1',
      epoch: 1,
      model: 'm',
      stages: [{ layers: range, ranks: [rank] }],
      link: 'auto' as const,
      wire: 'f32' as const,
    };
    this.#began({ epoch: 1, placement, kvBlocks, arithmetic: '1' });
  }
}

/** Numbers of tokens. */
export interface SimulatedRequest {
  promptTokens: number;
  outputTokens: number;
}

export interface RequestTimes extends SimulatedRequest {
  sentMs: number;
  /** When each token came. */
  tokenMs: number[];
}

export interface ClosedLoop extends SimulatedRequest {
  streams: number;
  requestsMax?: number;
  untilMs?: number;
}

const after = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

export class SimulatedServer {
  readonly mesh = new SimulatedMesh();
  readonly engine: ShardmeshEngine;
  #requests = 0;

  /** Limits are those of `shardmesh serve`, except that K/V never runs out. */
  constructor() {
    this.engine = new ShardmeshEngine({
      text: { detokenizer: () => ({ push: () => '', flush: () => '' }), endTokens: [], bosToken: 1, vocabularySize: 50_000 },
      transport: this.mesh,
      modelSha256: 'ab',
      activations: 'int8',
      kvType: 'int8',
      prefixCacheSecret: null,
      contextTokensMax: 8_192,
      blockTokens: 16,
      sequencesMax: 128,
      stepTokensMax: 256,
      prefillChunkMax: 256,
    });
    this.mesh.begin(4_000);
  }

  async request({ promptTokens, outputTokens }: SimulatedRequest): Promise<RequestTimes> {
    const times: RequestTimes = { promptTokens, outputTokens, sentMs: performance.now(), tokenMs: [] };
    const { choice: _, ...sampling } = greedy;
    const { events } = this.engine.submit({
      id: `r${++this.#requests}`,
      tenant: 't',
      promptTokens: new Array<number>(promptTokens).fill(7),
      sampling,
      n: 1,
      outputTokensMax: outputTokens,
      outputTokensMin: 0,
      stopStrings: [],
      stopTokenIds: [],
      ignoreEos: true,
      promptLogprobs: null,
      deadlineAt: Number.MAX_SAFE_INTEGER,
    });
    for await (const event of events) {
      if (event.type === 'token') times.tokenMs.push(performance.now());
      if (event.type === 'error') throw new Error(event.message);
    }
    return times;
  }

  /** `streams` clients that send their next request 2 ms after an answer, until `requestsMax` are sent or the clock shows `untilMs`. */
  async closedLoop({ streams, requestsMax = Infinity, untilMs = Infinity, ...request }: ClosedLoop): Promise<RequestTimes[]> {
    const all: RequestTimes[] = [];
    let sent = 0;
    const stream = async (): Promise<void> => {
      while (sent < requestsMax && performance.now() < untilMs) {
        sent++;
        all.push(await this.request(request));
        await after(2);
      }
    };
    await Promise.all(Array.from({ length: streams }, stream));
    return all;
  }

  /** Requests at these times, whatever the answers. */
  async openLoop(arrivals: (SimulatedRequest & { atMs: number })[]): Promise<RequestTimes[]> {
    return Promise.all(
      arrivals.map(async ({ atMs, ...request }) => {
        await after(atMs);
        return this.request(request);
      }),
    );
  }
}

/** Lets fake time pass until `work` is done. */
export async function finish<Result>(work: Promise<Result>): Promise<Result> {
  let done = false;
  const result = work.finally(() => (done = true));
  result.catch(() => undefined);
  await settle();
  while (!done) {
    await vi.advanceTimersToNextTimerAsync();
    await settle();
  }
  return result;
}

const quantile = (values: readonly number[], share: number): number =>
  [...values].sort((a, b) => a - b)[Math.min(values.length - 1, Math.floor(share * values.length))]!;

/** TTFT and time between tokens in milliseconds. */
export function figuresOf(all: readonly RequestTimes[]) {
  const ttft = all.map(({ sentMs, tokenMs }) => tokenMs[0]! - sentMs);
  const itl = all.flatMap(({ tokenMs }) => tokenMs.slice(1).map((ms, i) => ms - tokenMs[i]!));
  const from = Math.min(...all.map(({ sentMs }) => sentMs));
  const to = Math.max(...all.map(({ tokenMs }) => tokenMs.at(-1)!));
  const outputTokens = all.reduce((sum, { tokenMs }) => sum + tokenMs.length, 0);
  return {
    ttftMs: { p50: quantile(ttft, 0.5), p90: quantile(ttft, 0.9), most: Math.max(...ttft) },
    itlMs: { p50: quantile(itl, 0.5), p99: quantile(itl, 0.99) },
    tokensPerSecond: (1e3 * outputTokens) / (to - from),
  };
}
