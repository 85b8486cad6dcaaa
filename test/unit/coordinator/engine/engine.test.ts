import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import type { EngineEvent } from '../../../../coordinator/engine/engine-types.ts';
import { ShardmeshError } from '../../../../protocol/errors.ts';
import { greedy } from '../scheduler/make-scheduler.ts';
import { expectedScores, expectedTokens, vocabularySize } from '../scheduler/simulated-worker.ts';
import { collect, fakeDetokenizer, makeEngine, makeRequest, runAll, settle, textOf, tokensOf } from './make-engine.ts';

const expected = (
  fields: {
    promptTokens?: number[];
    outputTokensMax?: number;
    seed?: bigint;
    choice?: number;
    temperature?: number;
    stopTokens?: number[];
  } = {},
) =>
  expectedTokens({
    promptTokens: fields.promptTokens ?? [1, 2, 3, 4, 5],
    sampling: { ...greedy, seed: fields.seed ?? 1n, choice: fields.choice ?? 0, temperature: fields.temperature ?? 0 },
    outputTokensMax: fields.outputTokensMax ?? 6,
    outputTokensMin: 0,
    stopTokens: new Set(fields.stopTokens ?? []),
  });

const plainText = (tokens: number[]): string => tokens.map((token) => `<${token}>`).join('');

beforeEach(() => {
  vi.useFakeTimers({ toFake: ['setInterval', 'clearInterval', 'setTimeout', 'clearTimeout', 'performance'] });
});

afterEach(() => {
  vi.useRealTimers();
});

/** Lets time pass in steps of the engine's own timer. */
async function pass(ms: number): Promise<void> {
  await vi.advanceTimersByTimeAsync(ms);
  await settle();
}

function thrownBy(action: () => unknown): ShardmeshError {
  try {
    action();
  } catch (error) {
    if (error instanceof ShardmeshError) return error;
    throw error;
  }
  throw new Error('nothing was thrown');
}

describe('engine', () => {
  it('engine - gives the prompt, each token, and one end', async () => {
    const { engine, mesh } = makeEngine();
    const { events } = collect(engine.submit(makeRequest({ outputTokensMax: 3 })).events);
    await runAll(mesh);
    const tokens = expected({ outputTokensMax: 3 });
    expect(events.map(({ type }) => type)).toEqual(['prompt', 'token', 'token', 'token', 'finished']);
    expect(events[0]).toEqual({ type: 'prompt', cachedTokens: 0, promptLogprobs: null });
    expect(tokensOf(events)).toEqual(tokens);
    expect(textOf(events)).toBe(plainText(tokens));
    expect(events[4]).toMatchObject({ choice: 0, reason: 'length', outputTokens: 3 });
    expect(engine.numbers()).toMatchObject({
      requestsLive: 0,
      requestsFinished: 1,
      kvBlocksUsed: 0,
      stepsInFlight: 0,
      outputTokens: 3,
    });
  });

  it('engine - ends at an end token, whose text nobody sees, unless told to ignore it', async () => {
    const tokens = expected({ outputTokensMax: 4 });
    const endToken = tokens[2]!;
    const { engine, mesh } = makeEngine({ endTokens: [endToken] });
    const stopped = collect(engine.submit(makeRequest({ outputTokensMax: 4 })).events);
    const ignoring = collect(engine.submit(makeRequest({ outputTokensMax: 4, ignoreEos: true })).events);
    const byId = collect(engine.submit(makeRequest({ outputTokensMax: 4, ignoreEos: true, stopTokenIds: [tokens[1]!] })).events);
    await runAll(mesh);
    expect(tokensOf(stopped.events)).toEqual(tokens.slice(0, 3));
    expect(textOf(stopped.events)).toBe(plainText(tokens.slice(0, 2)));
    expect(stopped.events.at(-1)).toMatchObject({ type: 'finished', reason: 'stop', outputTokens: 3 });
    expect(tokensOf(ignoring.events)).toEqual(tokens);
    expect(ignoring.events.at(-1)).toMatchObject({ reason: 'length', outputTokens: 4 });
    expect(textOf(byId.events)).toBe(plainText(tokens.slice(0, 1)));
    expect(byId.events.at(-1)).toMatchObject({ reason: 'stop', outputTokens: 2 });
  });

  it('engine - cuts the text before a stop string that spans tokens, and plans nothing more', async () => {
    const tokens = expected({ outputTokensMax: 9 });
    const text = plainText(tokens);
    const stop = text.slice(plainText(tokens.slice(0, 3)).length - 2, plainText(tokens.slice(0, 3)).length + 2);
    const { engine, mesh } = makeEngine();
    const { events } = collect(engine.submit(makeRequest({ outputTokensMax: 9, stopStrings: [stop] })).events);
    await runAll(mesh);
    expect(textOf(events)).toBe(text.slice(0, text.indexOf(stop)));
    const last = events.at(-1)!;
    expect(last).toMatchObject({ type: 'finished', reason: 'stop', text: '' });
    expect(tokensOf(events).length).toBeLessThan(9);
    expect(engine.status()).toMatchObject({ running: 0, waiting: 0, kvBlocksUsed: 0 });
  });

  it('engine - gives back held text that did not become a stop string', async () => {
    const tokens = expected({ outputTokensMax: 3 });
    const stop = `<${tokens[2]}>and more`;
    const { engine, mesh } = makeEngine();
    const { events } = collect(engine.submit(makeRequest({ outputTokensMax: 3, stopStrings: [stop] })).events);
    await runAll(mesh);
    expect(events.at(-1)).toMatchObject({ reason: 'length', text: `<${tokens[2]}>` });
    expect(textOf(events)).toBe(plainText(tokens));
  });

  it('engine - looks for stop strings only from the smallest number of output tokens on', async () => {
    const tokens = expected({ outputTokensMax: 5 });
    const { engine, mesh } = makeEngine();
    const { events } = collect(engine.submit(makeRequest({ outputTokensMax: 5, outputTokensMin: 2, stopStrings: ['>'] })).events);
    await runAll(mesh);
    expect(tokensOf(events)).toEqual(tokens.slice(0, 2));
    expect(textOf(events)).toBe(`<${tokens[0]}><${tokens[1]}`);
  });

  it('engine - gives log-probabilities of output and prompt, each with its own number of candidates', async () => {
    const { engine, mesh } = makeEngine();
    const promptTokens = [1, 2, 3, 4, 5, 6, 7, 8, 9];
    const sampling = { ...makeRequest().sampling, logprobs: 2 };
    const both = collect(engine.submit(makeRequest({ promptTokens, promptLogprobs: 5, outputTokensMax: 2, sampling })).events);
    const promptOnly = collect(engine.submit(makeRequest({ promptTokens, promptLogprobs: 0, outputTokensMax: 0 })).events);
    await runAll(mesh);
    expect(mesh.plans[0]!.opened.map(({ sampling: { logprobs } }) => logprobs)).toEqual([5, 0]);
    for (const { events } of [both, promptOnly]) {
      const prompt = events[0] as Extract<EngineEvent, { type: 'prompt' }>;
      expect(prompt.promptLogprobs!.map((entry) => entry?.token)).toEqual([undefined, ...promptTokens.slice(1)]);
      expect(prompt.promptLogprobs!.slice(1).map((entry) => entry!.logprob)).toEqual(expectedScores(promptTokens));
    }
    expect(both.events.filter((event) => event.type === 'token' && event.logprob !== null)).toHaveLength(2);
    expect(promptOnly.events.slice(1)).toEqual([{ type: 'finished', choice: 0, reason: 'length', text: '', outputTokens: 0 }]);
  });

  it('engine - answers a request with nothing to compute at once', async () => {
    const { engine, mesh } = makeEngine();
    const none = collect(engine.submit(makeRequest({ outputTokensMax: 0, n: 2 })).events);
    const one = collect(engine.submit(makeRequest({ outputTokensMax: 0, promptTokens: [4], promptLogprobs: 3 })).events);
    await settle();
    expect(none.events).toEqual([
      { type: 'prompt', cachedTokens: 0, promptLogprobs: null },
      { type: 'finished', choice: 0, reason: 'length', text: '', outputTokens: 0 },
      { type: 'finished', choice: 1, reason: 'length', text: '', outputTokens: 0 },
    ]);
    expect(one.events[0]).toEqual({ type: 'prompt', cachedTokens: 0, promptLogprobs: [null] });
    expect(mesh.plans).toHaveLength(0);
    expect(engine.numbers().requestsLive).toBe(0);
  });

  it('engine - runs each choice with its own number, and computes the prompt once', async () => {
    const { engine, mesh } = makeEngine();
    const promptTokens = Array.from({ length: 17 }, (_, i) => i);
    const { events } = collect(engine.submit(makeRequest({ promptTokens, n: 3, stopStrings: ['no'] })).events);
    await runAll(mesh);
    for (const choice of [0, 1, 2]) expect(tokensOf(events, choice)).toEqual(expected({ promptTokens, choice }));
    expect(events.filter(({ type }) => type === 'prompt')).toEqual([{ type: 'prompt', cachedTokens: 0, promptLogprobs: null }]);
    expect(events.filter(({ type }) => type === 'finished')).toHaveLength(3);
    // 17 rows once, then only the last of the prompt's tokens, twice; and five more rows for each choice.
    expect(engine.numbers()).toMatchObject({ rowsPlanned: 17 + 2 + 15, cachedTokens: 32, requestsFinished: 1 });
  });

  it('engine - tells how many prompt tokens were cached', async () => {
    const { engine, mesh } = makeEngine();
    const promptTokens = [1, 2, 3, 4, 5, 6, 7, 8];
    collect(engine.submit(makeRequest({ promptTokens })).events);
    await runAll(mesh);
    const again = collect(engine.submit(makeRequest({ promptTokens })).events);
    const stranger = collect(engine.submit(makeRequest({ promptTokens, tenant: 'other' })).events);
    await runAll(mesh);
    expect(again.events[0]).toMatchObject({ type: 'prompt', cachedTokens: 4 });
    expect(stranger.events[0]).toMatchObject({ type: 'prompt', cachedTokens: 0 });
    expect(tokensOf(again.events)).toEqual(expected({ promptTokens }));
  });

  it('engine - stops computing for a client that left, by cancel or by leaving the loop', async () => {
    const { engine, mesh } = makeEngine();
    const first = engine.submit(makeRequest({ outputTokensMax: 100 }));
    const second = engine.submit(makeRequest({ outputTokensMax: 100 }));
    const left = (async () => {
      for await (const event of second.events) if (event.type === 'token') break;
    })();
    const seen = collect(first.events);
    await settle();
    mesh.step();
    await left;
    first.cancel();
    first.cancel();
    await seen.done;
    expect(seen.events.map(({ type }) => type)).not.toContain('error');
    expect(engine.status()).toMatchObject({ running: 0, kvBlocksUsed: 0 });
    const plans = mesh.plans.length;
    await runAll(mesh);
    expect(mesh.plans).toHaveLength(plans);
    expect(engine.numbers()).toMatchObject({ requestsCancelled: 2, requestsLive: 0 });
  });

  it('engine - refuses what it could never run, naming the limit', () => {
    const { engine } = makeEngine({ blocks: 10 });
    const long = Array.from({ length: 150 }, () => 1);
    expect(thrownBy(() => engine.submit(makeRequest({ promptTokens: long, outputTokensMax: 51 })))).toMatchObject({
      code: 'context_length_exceeded',
      httpStatus: 400,
      message:
        'The prompt has 150 tokens and up to 51 more are asked for, but the context holds 200. Shorten the prompt or lower max_tokens.',
    });
    expect(thrownBy(() => engine.submit(makeRequest({ promptTokens: long.slice(0, 40), outputTokensMax: 2 }))).message).toContain(
      'the KV cache holds 40',
    );
    expect(thrownBy(() => engine.submit(makeRequest({ promptTokens: [] })))).toMatchObject({
      code: 'invalid_value',
      param: 'prompt',
    });
    expect(thrownBy(() => engine.submit(makeRequest({ promptTokens: [1, vocabularySize] }))).message).toBe(
      `The prompt has token ${vocabularySize}; ids of this model are 0 to ${vocabularySize - 1}.`,
    );
    expect(engine.numbers().requestsLive).toBe(0);
  });

  it('engine - bounds the waiting queue, not the running requests', async () => {
    const { engine, mesh } = makeEngine({ sequencesMax: 2, options: { waitingRequestsMax: 3 } });
    for (let i = 0; i < 2; i++) collect(engine.submit(makeRequest()).events);
    await settle();
    for (let i = 0; i < 3; i++) collect(engine.submit(makeRequest()).events);
    const error = thrownBy(() => engine.submit(makeRequest()));
    expect(error).toMatchObject({ code: 'queue_full', httpStatus: 429 });
    expect(error.retryAfterSeconds).toBeGreaterThanOrEqual(1);
    expect(error.retryAfterSeconds).toBeLessThanOrEqual(30);
    await runAll(mesh);
    expect(engine.numbers()).toMatchObject({ requestsFinished: 5, requestsLive: 0 });
  });

  it('engine - ends a request at its deadline with one error, running or waiting', async () => {
    const { engine, mesh } = makeEngine({ sequencesMax: 1 });
    const running = collect(engine.submit(makeRequest({ deadlineAt: performance.now() + 1000 })).events);
    const waiting = collect(engine.submit(makeRequest({ deadlineAt: performance.now() + 1000 })).events);
    await settle();
    mesh.step();
    await pass(900);
    expect(running.events.at(-1)!.type).toBe('token');
    await pass(200);
    for (const { events, done } of [running, waiting]) {
      await done;
      expect(events.at(-1)).toMatchObject({ type: 'error', code: 'deadline_exceeded' });
      expect(events.filter(({ type }) => type === 'error')).toHaveLength(1);
    }
    expect(engine.status()).toMatchObject({ running: 0, waiting: 0, kvBlocksUsed: 0 });
  });

  it('engine - pauses a sequence whose reader is slow, and only that one, and goes on when it reads', async () => {
    const { engine, mesh } = makeEngine({
      blocks: 1200,
      options: { contextTokensMax: 4000 },
    });
    const slow = engine.submit(makeRequest({ outputTokensMax: 1500, ignoreEos: true }));
    await runAll(mesh);
    expect(engine.status().running).toBe(1);
    const other = collect(engine.submit(makeRequest({ outputTokensMax: 3 })).events);
    await runAll(mesh);
    expect(other.events.at(-1)!.type).toBe('finished');
    const steps = mesh.plans.length;
    expect(steps).toBeLessThan(1060);
    await pass(10_000);
    const { events } = collect(slow.events);
    await runAll(mesh);
    for (let i = 0; i < 100; i++) await runAll(mesh);
    expect(tokensOf(events)).toEqual(expected({ outputTokensMax: 1500 }));
    expect(events.at(-1)).toMatchObject({ type: 'finished', reason: 'length' });
  });

  it('engine - gives up on a reader that does not read for 30 s', async () => {
    const { engine, mesh } = makeEngine({ blocks: 1200, options: { contextTokensMax: 4000 } });
    const slow = engine.submit(makeRequest({ outputTokensMax: 1500, deadlineAt: performance.now() + 600_000 }));
    await runAll(mesh);
    await pass(29_900);
    expect(engine.numbers().requestsLive).toBe(1);
    await pass(300);
    expect(engine.numbers()).toMatchObject({ requestsLive: 0, requestsFailed: 1, kvBlocksUsed: 0 });
    const events = await collect(slow.events).done;
    expect(events.at(-1)).toMatchObject({ type: 'error', code: 'slow_reader' });
  });

  it('engine - ends every request with one typed error when the mesh is lost, and serves again in the next epoch', async () => {
    const { engine, mesh } = makeEngine({ sequencesMax: 1 });
    const running = collect(engine.submit(makeRequest()).events);
    const waiting = collect(engine.submit(makeRequest()).events);
    await settle();
    mesh.step();
    const old = mesh.worker!.take();
    mesh.lose({ code: 'worker_lost', message: 'Worker w1 was lost.' });
    for (const { events, done } of [running, waiting]) {
      await done;
      expect(events.at(-1)).toEqual({
        type: 'error',
        code: 'worker_lost',
        message: 'Worker w1 was lost.',
        retryAfterSeconds: null,
      });
      expect(events.filter(({ type }) => type === 'error')).toHaveLength(1);
    }
    expect(engine.status()).toMatchObject({ meshReady: false, reason: 'Worker w1 was lost.', running: 0, kvBlocksTotal: 0 });
    expect(thrownBy(() => engine.submit(makeRequest()))).toMatchObject({
      code: 'mesh_unavailable',
      httpStatus: 503,
      retryAfterSeconds: 5,
      message: 'The mesh cannot serve now: Worker w1 was lost.',
    });

    mesh.begin();
    const after = collect(engine.submit(makeRequest()).events);
    await settle();
    mesh.deliver(old);
    expect(engine.numbers()).toMatchObject({ staleResults: 1, epochs: 2 });
    await runAll(mesh);
    expect(mesh.plans.at(-1)).toMatchObject({ epoch: 2, placement: 'p2' });
    expect(tokensOf(after.events)).toEqual(expected());
    // Nothing of the old epoch's K/V is used.
    expect(after.events[0]).toMatchObject({ cachedTokens: 0 });
  });

  it('engine - ignores a result that comes twice', async () => {
    const { engine, mesh } = makeEngine();
    const { events } = collect(engine.submit(makeRequest()).events);
    await settle();
    const result = mesh.worker!.take();
    mesh.deliver(result);
    mesh.deliver(result);
    await runAll(mesh);
    expect(tokensOf(events)).toEqual(expected());
    expect(engine.numbers().staleResults).toBe(1);
  });

  it('engine - gives the epoch up when a result is missing or does not fit, and tells the mesh', async () => {
    const { engine, mesh } = makeEngine();
    const { events } = collect(engine.submit(makeRequest()).events);
    await settle();
    mesh.worker!.take();
    mesh.step();
    await settle();
    const message = 'A result of step 2 came but step 1 is the oldest in flight.';
    expect(events).toEqual([{ type: 'error', code: 'invalid_message', message, retryAfterSeconds: null }]);
    expect(mesh.faults).toEqual([{ code: 'invalid_message', message }]);
    expect(engine.status().meshReady).toBe(false);
  });

  it('engine - reports a step that does not come back, after the workers had their chance', async () => {
    const { engine, mesh } = makeEngine({ options: { stepsInFlightMax: 1 }, stepsInFlightMax: 1, sequenceStepsMax: 1 });
    const { events } = collect(engine.submit(makeRequest({ promptTokens: [1, 2] })).events);
    await settle();
    mesh.step();
    await settle();
    // The first step took 0 ms: the next has the least deadline there is, 2 s, and half a second more.
    expect(mesh.plans.at(-1)!.waitTimeoutMs).toBe(2000);
    await pass(2500);
    expect(mesh.faults).toEqual([]);
    await pass(200);
    expect(mesh.faults).toHaveLength(1);
    expect(mesh.faults[0]).toMatchObject({ code: 'step_timeout' });
    expect(mesh.faults[0]!.message).toMatch(/^Step 2 of 1 tokens did not come back within 2500 ms \(waited 2[56]00 ms\)\.$/);
    expect(events.at(-1)).toMatchObject({ type: 'error', code: 'step_timeout' });
  });

  it('engine - does not call a step overdue because its own event loop was held up', async () => {
    let now = 1000;
    const { engine, mesh } = makeEngine({ options: { now: () => now } });
    const { events } = collect(engine.submit(makeRequest({ deadlineAt: 1e9, promptTokens: [1] })).events);
    await settle();
    mesh.step();
    now += 60_000;
    await pass(100);
    expect(mesh.faults).toEqual([]);
    await runAll(mesh);
    expect(events.at(-1)!.type).toBe('finished');
  });

  it('engine - drains: refuses new requests, lets running ones finish', async () => {
    const { engine, mesh } = makeEngine();
    const { events } = collect(engine.submit(makeRequest()).events);
    const drained = engine.drain(10_000);
    expect(thrownBy(() => engine.submit(makeRequest()))).toMatchObject({ code: 'draining', httpStatus: 503 });
    expect(engine.status().draining).toBe(true);
    await runAll(mesh);
    await drained;
    expect(events.at(-1)!.type).toBe('finished');
  });

  it('engine - ends what is left with an error when draining takes too long', async () => {
    const { engine } = makeEngine();
    const { events, done } = collect(engine.submit(makeRequest()).events);
    const drained = engine.drain(500);
    await pass(500);
    await drained;
    await done;
    expect(events).toEqual([
      {
        type: 'error',
        code: 'draining',
        message: 'The server shut down before the request finished (500 ms were left to it).',
        retryAfterSeconds: 10,
      },
    ]);
  });

  it('engine - runs one token as a canary only when no step came back lately', async () => {
    const { engine, mesh } = makeEngine();
    const canary = engine.canary(30_000);
    await settle();
    expect(mesh.plans.map(({ sequences }) => sequences.length)).toEqual([1]);
    await runAll(mesh);
    expect(await canary).toBe(true);
    expect(mesh.plans).toHaveLength(1);
    await pass(29_000);
    expect(await engine.canary(30_000)).toBe(true);
    expect(mesh.plans).toHaveLength(1);
    await pass(2_000);
    const failing = engine.canary(30_000);
    await settle();
    expect(mesh.plans).toHaveLength(2);
    mesh.lose({ code: 'worker_lost', message: 'gone' });
    expect(await failing).toBe(false);
    expect(await engine.canary(30_000)).toBe(false);
  });

  it('engine - keeps a log of what every live request has so far', async () => {
    const { engine, mesh } = makeEngine();
    const request = makeRequest({ n: 2 });
    collect(engine.submit(request).events);
    await settle();
    mesh.step();
    await settle();
    expect(engine.tokenLog()).toEqual([
      { id: request.id, tenant: 'tenant', promptTokens: [1, 2, 3, 4, 5], outputs: [expected().slice(0, 1), []] },
    ]);
    await runAll(mesh);
    expect(engine.tokenLog()).toEqual([]);
  });

  it('engine - gives each request its own text and one end, however many stages, with drafts or not, whatever else happens', async () => {
    const request = fc.record({
      promptTokens: fc.array(fc.integer({ min: 0, max: vocabularySize - 1 }), { minLength: 1, maxLength: 30 }),
      outputTokensMax: fc.integer({ min: 1, max: 45 }),
      outputTokensMin: fc.constantFrom(0, 0, 12),
      seed: fc.bigInt({ min: 0n, max: 5n }),
      temperature: fc.constantFrom(0, 2),
      n: fc.integer({ min: 1, max: 3 }),
      stop: fc.option(fc.constantFrom('1', '<3', '><', '7>', '>', '4><5')),
      leaves: fc.boolean(),
    });
    let accepted = 0;
    await fc.assert(
      fc.asyncProperty(
        fc.array(request, { minLength: 1, maxLength: 8 }),
        fc.integer({ min: 1, max: 3 }),
        fc.integer({ min: 20, max: 60 }),
        fc.integer({ min: 4, max: 32 }),
        fc.boolean(),
        async (requests, stages, blocks, stepTokensMax, speculation) => {
          // A result a millisecond, drafts or not.
          let clock = 0;
          const options = { speculation, now: () => clock };
          const { engine, mesh } = makeEngine({ stages, blocks, stepTokensMax, sequencesMax: 5, options });
          const running = requests.map(({ seed, temperature, stop, leaves, outputTokensMin, ...rest }, i) => {
            const sampling = { ...makeRequest().sampling, seed, temperature };
            const stopStrings = stop === null ? [] : [stop];
            const handle = engine.submit(makeRequest({ ...rest, outputTokensMin, sampling, stopStrings }));
            return { handle, leaves: leaves && i % 3 === 0, collected: collect(handle.events) };
          });
          await settle();
          for (let i = 0; mesh.step(); i++) {
            clock++;
            await settle();
            if (i === 3) for (const { handle, leaves } of running) if (leaves) handle.cancel();
          }
          for (const [i, { collected, leaves }] of running.entries()) {
            const events = await collected.done;
            const { promptTokens, outputTokensMax, outputTokensMin, seed, temperature, n, stop } = requests[i]!;
            const ends = events.filter((event) => event.type === 'finished');
            if (leaves && ends.length < n) continue;
            expect(ends).toHaveLength(n);
            for (let choice = 0; choice < n; choice++) {
              const tokens = expected({ promptTokens, outputTokensMax, seed, choice, temperature });
              const { text, used } = textUntil(tokens, stop, outputTokensMin);
              expect(textOf(events, choice)).toBe(text);
              expect(tokensOf(events, choice)).toEqual(tokens.slice(0, used));
              expect(ends.find((end) => end.choice === choice)!.outputTokens).toBe(used);
            }
          }
          expect(engine.status()).toMatchObject({ waiting: 0, running: 0, kvBlocksUsed: 0 });
          expect(engine.numbers().requestsLive).toBe(0);
          accepted += engine.numbers().draftTokensAccepted;
        },
      ),
      { numRuns: 80 },
    );
    expect(accepted).toBeGreaterThan(0);
  });
});

/** Text of these tokens up to a stop string, and how many of them it takes to see it; below `tokensMin` tokens nothing is looked for. */
function textUntil(tokens: number[], stop: string | null, tokensMin: number): { text: string; used: number } {
  const detokenizer = fakeDetokenizer();
  let text = '';
  let from = 0;
  for (const [i, token] of tokens.entries()) {
    text += detokenizer.push(token);
    if (i + 1 < tokensMin) from = text.length;
    const at = stop === null ? -1 : text.indexOf(stop, from);
    if (at >= 0) return { text: text.slice(0, at), used: i + 1 };
  }
  text += detokenizer.flush();
  const at = stop === null || tokens.length < tokensMin ? -1 : text.indexOf(stop, from);
  return { text: at < 0 ? text : text.slice(0, at), used: tokens.length };
}
