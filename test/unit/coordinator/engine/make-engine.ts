import { ShardmeshEngine, type EngineOptions } from '../../../../coordinator/engine/engine.ts';
import type { EngineEvent, EngineRequest } from '../../../../coordinator/engine/engine-types.ts';
import { greedy } from '../scheduler/make-scheduler.ts';
import { vocabularySize, type SimulatedWorkerOptions } from '../scheduler/simulated-worker.ts';
import { FakeMesh } from './fake-mesh.ts';

const { choice: _, ...sampling } = greedy;

export interface MakeEngine extends Partial<SimulatedWorkerOptions> {
  stages?: number;
  endTokens?: number[];
  prefixCache?: boolean;
  options?: Partial<EngineOptions>;
}

/** Token t is the text `<t>`; one that is a multiple of 10 comes out only together with the next token, as half a character would. */
export function fakeDetokenizer() {
  let held = '';
  return {
    push(token: number): string {
      held += `<${token}>`;
      if (token % 10 === 0) return '';
      const text = held;
      held = '';
      return text;
    },
    flush(): string {
      const text = held;
      held = '';
      return text;
    },
  };
}

/** One stage and two steps in flight unless said otherwise; the mesh is up. */
export function makeEngine({ stages = 1, endTokens = [], prefixCache = true, options = {}, ...worker }: MakeEngine = {}) {
  const stepsInFlightMax = stages === 1 ? 2 : 2 * (stages + 1);
  const limits: SimulatedWorkerOptions = {
    blocks: 64,
    blockTokens: 4,
    sequencesMax: 8,
    stepTokensMax: 32,
    prefillChunkMax: 16,
    stepOutputsMax: 32,
    stepsInFlightMax,
    sequenceStepsMax: Math.max(2, stages),
    ...worker,
  };
  const mesh = new FakeMesh(limits, stages);
  const engine = new ShardmeshEngine({
    text: { detokenizer: fakeDetokenizer, endTokens, bosToken: 1, vocabularySize },
    transport: mesh,
    modelSha256: 'ab',
    activations: 'int8',
    kvType: 'int8',
    prefixCacheSecret: prefixCache ? new Uint8Array(32) : null,
    contextTokensMax: 200,
    blockTokens: limits.blockTokens,
    sequencesMax: limits.sequencesMax,
    stepTokensMax: limits.stepTokensMax,
    prefillChunkMax: limits.prefillChunkMax,
    stepOutputsMax: limits.stepOutputsMax,
    stepsInFlightMax: limits.stepsInFlightMax,
    ...options,
  });
  mesh.begin();
  return { engine, mesh };
}

let requests = 0;

export function makeRequest(fields: Partial<EngineRequest> = {}): EngineRequest {
  return {
    id: `req_${++requests}`,
    tenant: 'tenant',
    promptTokens: [1, 2, 3, 4, 5],
    sampling,
    n: 1,
    outputTokensMax: 6,
    outputTokensMin: 0,
    stopStrings: [],
    stopTokenIds: [],
    ignoreEos: false,
    promptLogprobs: null,
    deadlineAt: performance.now() + 60_000,
    ...fields,
  };
}

/** Reads a stream to its end in the background. */
export function collect(events: AsyncIterable<EngineEvent>): { events: EngineEvent[]; done: Promise<EngineEvent[]> } {
  const seen: EngineEvent[] = [];
  const done = (async () => {
    for await (const event of events) seen.push(event);
    return seen;
  })();
  return { events: seen, done };
}

/** Lets everything that is due now happen, timers not. */
export const settle = async (): Promise<void> => {
  for (let i = 0; i < 20; i++) await Promise.resolve();
};

/** Gives results until nothing is in flight. */
export async function runAll(mesh: FakeMesh): Promise<void> {
  await settle();
  while (mesh.step()) await settle();
}

export const textOf = (events: readonly EngineEvent[], choice = 0): string =>
  events
    .map((event) => ((event.type === 'token' || event.type === 'finished') && event.choice === choice ? event.text : ''))
    .join('');

export const tokensOf = (events: readonly EngineEvent[], choice = 0): number[] =>
  events.flatMap((event) => (event.type === 'token' && event.choice === choice ? [event.token] : []));
