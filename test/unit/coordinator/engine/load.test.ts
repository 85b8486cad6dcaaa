import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import {
  figuresOf,
  finish,
  SimulatedServer,
  type RequestTimes,
  type SimulatedRequest,
  type SimulatedStep,
} from './simulated-load.ts';

beforeEach(() => {
  vi.useFakeTimers({ toFake: ['setInterval', 'clearInterval', 'setTimeout', 'clearTimeout', 'performance'], now: 0 });
});

afterEach(() => {
  vi.useRealTimers();
});

const shortRequest: SimulatedRequest = { promptTokens: 128, outputTokens: 64 };

/** One that knows what a prompt token takes, and a step of one row. The first step of a mesh is no measure. */
async function warmServer(): Promise<SimulatedServer> {
  const server = new SimulatedServer();
  for (let i = 0; i < 2; i++) await finish(server.request(shortRequest));
  server.mesh.steps.length = 0;
  return server;
}

/** `count` requests, at random times that are the same in each run. */
function poisson(count: number, perSecond: number, request: (i: number) => SimulatedRequest) {
  let state = 12_345;
  const random = (): number => ((state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0) + 0.5) / 2 ** 32;
  let atMs = 0;
  return Array.from({ length: count }, (_, i) => ({
    atMs: Math.round((atMs += (-1e3 * Math.log(random())) / perSecond)),
    ...request(i),
  }));
}

// A prompt of 128 tokens takes a step of 84 ms alone, and one of 97 ms beside 14 rows that decode; 16 rows alone take 17.6 ms.
describe('load', () => {
  it('load - each of 16 streams waits for the step that runs, the one that is planned and its own, once they are not all at the same token', async () => {
    const server = await warmServer();
    const all = await finish(server.closedLoop({ streams: 16, requestsMax: 48, ...shortRequest }));
    // 16 at once: one after the other, 16 * 91 ms for the last, and between two prompts two steps of the streams that have begun.
    expect(figuresOf(all.slice(0, 16)).ttftMs.p50).toBeLessThan(910);
    expect(figuresOf(all.slice(0, 16)).ttftMs.most).toBeLessThan(1_770);
    // The next ones come two steps apart: one runs, one is planned, and no other prompt is before theirs.
    expect(figuresOf(all.slice(16)).ttftMs).toEqual({ p50: 129, p90: 130, most: 130 });
    expect(figuresOf(all).itlMs).toEqual({ p50: 17, p99: 98 });
    // 128 * 0.62 + 64 * (0.9 + 3.2 / 16) ms a request would be 427.
    expect(figuresOf(all).tokensPerSecond).toBeGreaterThan(415);
  });

  it('load - 16 streams wait less than twice as long for a token while a prompt of 2,000 tokens is computed', async () => {
    const server = await warmServer();
    const [streams, long] = await finish(
      Promise.all([
        server.closedLoop({ streams: 16, promptTokens: 16, outputTokens: 150, requestsMax: 16 }),
        server.closedLoop({ streams: 1, promptTokens: 1_990, outputTokens: 1, requestsMax: 1 }),
      ]),
    );
    expect(figuresOf(streams).itlMs).toEqual({ p50: 27, p99: 30 });
    expect(long[0]!.tokenMs[0]! - long[0]!.sentMs).toBeLessThan(4_500);
  });

  it('load - the tokens of a fast stream come several at a time, 50 times a second', async () => {
    const server = await warmServer();
    const [{ tokenMs }] = (await finish(server.closedLoop({ streams: 1, requestsMax: 1, ...shortRequest }))) as [RequestTimes];
    const times = [...new Set(tokenMs)];
    const perTime = times.map((ms) => tokenMs.filter((one) => one === ms).length);
    // The first comes as soon as it is there. A step of one row takes 4.1 ms.
    expect(perTime).toEqual([1, ...new Array<number>(15).fill(4), 3]);
    expect(times.at(-1)! - times[1]!).toBe(242);
  });

  it('load - short prompts do not wait for long ones, which have their turn all the same', async () => {
    const server = await warmServer();
    const one = (i: number): SimulatedRequest => (i % 10 === 4 ? { promptTokens: 2_000, outputTokens: 8 } : shortRequest);
    const all = await finish(server.openLoop(poisson(40, 2.5, one)));
    const figures = (promptTokens: number) => figuresOf(all.filter((request) => request.promptTokens === promptTokens));
    expect(figures(128).ttftMs.p50).toBeLessThan(130);
    expect(figures(128).ttftMs.most).toBeLessThan(350);
    expect(figures(2_000).ttftMs.most).toBeLessThan(8_000);
  });

  it('load - a request that comes while the prompt of another is computed has its turn when the streams have had two steps, planned before that one ends', async () => {
    const server = await warmServer();
    const times = [0, 290, 310].map((atMs) => ({ atMs, ...shortRequest }));
    await finish(server.openLoop(times));
    const { steps } = server.mesh;
    const first = steps.findIndex(({ chunks, decodeRows }) => chunks.length > 0 && decodeRows > 0);
    const rows = ({ decodeRows, chunks }: SimulatedStep) => [decodeRows, ...chunks];
    expect(steps.slice(first, first + 4).map(rows)).toEqual([[1, 128], [2], [2], [2, 128]]);
    // The workers do not wait, neither for the first prompt, which comes while several steps are planned ahead, nor behind it.
    expect(steps[first]!.beginMs).toBeCloseTo(steps[first - 1]!.beginMs + steps[first - 1]!.ms, 9);
    expect(steps[first + 1]!.beginMs).toBeCloseTo(steps[first]!.beginMs + steps[first]!.ms, 9);
  });
});
