import { describe, expect, it } from 'vitest';
import { figures } from '../../../../deploy/bench/figures.ts';
import { meshFigures, parseMetrics } from '../../../../deploy/bench/mesh-figures.ts';
import { meetsObjectives, parseObjectives } from '../../../../deploy/bench/objectives.ts';
import { quantile, quantiles } from '../../../../deploy/bench/quantiles.ts';
import type { RequestRecord } from '../../../../deploy/bench/request-record.ts';
import { series } from '../../../../deploy/bench/series.ts';
import { SseParser } from '../../../../deploy/bench/sse-parser.ts';
import { warnings } from '../../../../deploy/bench/text-report.ts';

/** Sent at `sentAt`, chunks at these times, ended 1 ms after the last. */
const makeRecord = (sentAt: number, chunkAt: number[], more: Partial<RequestRecord> = {}): RequestRecord => ({
  dueAt: sentAt,
  sentAt,
  chunkAt,
  endedAt: (chunkAt.at(-1) ?? sentAt) + 1,
  text: '',
  usage: { promptTokens: 100, outputTokens: chunkAt.length, cachedTokens: 0 },
  error: null,
  outputTokensAsked: chunkAt.length,
  ...more,
});

const makeRun = (
  records: RequestRecord[],
  endedAt: number,
  load: { kind: 'closed'; streams: number } | { kind: 'poisson'; perSecond: number } = { kind: 'closed', streams: 2 },
) => ({
  load,
  startedAt: 0,
  endedAt,
  records,
  clientCpuShare: 0.1,
});

describe('quantile', () => {
  it('is linear between the two nearest ranks', () => {
    expect([0, 0.25, 0.5, 0.9, 1].map((share) => quantile([10, 20, 30, 40], share))).toEqual([10, 17.5, 25, 37, 40]);
    expect(quantile([7], 0.99)).toBe(7);
  });

  it('sorts, and says null of nothing', () => {
    expect(quantiles([3, 1, 2])).toEqual({ count: 3, mean: 2, p50: 2, p90: 2.8, p99: 2.98, max: 3 });
    expect(quantiles([])).toBeNull();
  });
});

describe('sse parser', () => {
  const parse = (parts: Buffer[]): string[] => {
    const lines: string[] = [];
    const parser = new SseParser((data) => lines.push(data));
    for (const part of parts) parser.push(part);
    return lines;
  };
  const stream = Buffer.from(
    ': comment\r\n\r\ndata: {"a":"é"}\r\n\r\nevent: x\ndata:{"b":1}\n\ndata: [DONE]\n\ndata: without an end',
  );
  const expected = ['{"a":"é"}', '{"b":1}', '[DONE]'];

  it('reads data lines with either end of line, with and without a space', () => expect(parse([stream])).toEqual(expected));

  it('does not care where the network cuts', () => {
    for (let at = 1; at < stream.length; at++) expect(parse([stream.subarray(0, at), stream.subarray(at)])).toEqual(expected);
    expect(parse([...stream].map((byte) => Buffer.of(byte)))).toEqual(expected);
  });

  it('ends at a line that never ends', () => {
    const parser = new SseParser(() => undefined);
    expect(() => {
      for (let part = 0; part < 6; part++) parser.push(Buffer.alloc(1024 ** 2, 0x61));
    }).toThrow('longer than');
  });
});

describe('figures', () => {
  it('of two requests can be checked by hand', () => {
    const found = figures(makeRun([makeRecord(0, [100, 110, 130]), makeRecord(50, [250, 260])], 1000), null);
    expect(found).toMatchObject({
      seconds: 1,
      requests: 2,
      failed: 0,
      requestsPerSecond: 2,
      outputTokensPerSecond: 5,
      promptTokensPerSecond: 200,
    });
    expect(found.ttftMs).toMatchObject({ count: 2, mean: 150, max: 200 });
    // Gaps 10, 20, 10; per token 15 and 10.
    expect(found.itlMs).toMatchObject({ count: 3, p50: 10, max: 20 });
    expect(found.tpotMs).toMatchObject({ count: 2, mean: 12.5 });
    expect(found.e2eMs).toMatchObject({ max: 211 });
    expect(found.sendLagMs).toBeNull();
  });

  it('count tokens by usage where a chunk has several', () => {
    const record = makeRecord(0, [100, 200], {
      usage: { promptTokens: 9, outputTokens: 6, cachedTokens: 4 },
      outputTokensAsked: 6,
    });
    const found = figures(makeRun([record], 1000), null);
    expect(found).toMatchObject({ outputTokensPerSecond: 6, tokensPerChunk: 3, cachedTokens: 4, short: 0 });
    expect(found.tpotMs?.mean).toBe(20);
    expect(warnings(found)).toEqual(['3.00 tokens a chunk: inter-token times are times between chunks']);
  });

  it('leave out what came after the run, and failed requests of latencies', () => {
    const late = makeRecord(900, [950, 1050]);
    const failed = makeRecord(0, [500], { error: 'HTTP 429 rate_limited', usage: null });
    const found = figures(makeRun([late, failed], 1000), null);
    expect(found).toMatchObject({
      requestsPerSecond: 0,
      outputTokensPerSecond: 2,
      failed: 1,
      errors: { 'HTTP 429 rate_limited': 1 },
    });
    expect(found.ttftMs?.count).toBe(1);
    expect(warnings(found)).toEqual(['1 failed: HTTP 429 rate_limited']);
  });

  it('measure an open loop from when a request was due', () => {
    const found = figures(makeRun([makeRecord(80, [100], { dueAt: 30 })], 1000, { kind: 'poisson', perSecond: 1 }), null);
    expect(found.ttftMs?.p50).toBe(70);
    expect(found.sendLagMs?.p50).toBe(50);
  });

  it('say when chunks had to be counted', () => {
    const found = figures(makeRun([makeRecord(0, [10, 20], { usage: null, outputTokensAsked: 8 })], 1000), null);
    expect(found).toMatchObject({ withoutUsage: 1, short: 1, outputTokensPerSecond: 2 });
  });
});

describe('objectives', () => {
  it('are named, with milliseconds or seconds', () =>
    expect(parseObjectives('ttft=0.5s, itl=50ms')).toEqual({ ttft: 500, itl: 50 }));

  it.each(['', 'ttft', 'ttft=5', 'latency=5ms', 'ttft=5ms;itl=1ms'])('"%s" is refused', (text) =>
    expect(() => parseObjectives(text)).toThrow('ttft, itl, tpot, e2e'),
  );

  it('count a request only when it keeps all of them', () => {
    const record = makeRecord(0, [400, 440, 500]);
    expect(meetsObjectives(record, { ttft: 400, itl: 60, e2e: 501 })).toBe(true);
    expect(meetsObjectives(record, { ttft: 399 })).toBe(false);
    expect(meetsObjectives(record, { itl: 59 })).toBe(false);
    expect(meetsObjectives(record, { tpot: 49 })).toBe(false);
    expect(meetsObjectives(record, { e2e: 500 })).toBe(false);
    expect(meetsObjectives(makeRecord(0, []), {})).toBe(false);
  });

  it('give the share and the rate of goodput', () => {
    const run = makeRun([makeRecord(0, [100]), makeRecord(0, [900]), makeRecord(0, [100], { error: 'timeout' })], 2000);
    expect(figures(run, { ttft: 500 }).goodput).toEqual({ share: 1 / 3, requestsPerSecond: 0.5 });
  });
});

describe('series', () => {
  it('puts tokens, gaps and requests into buckets of a quarter second', () => {
    const found = series(makeRun([makeRecord(0, [100, 300, 320, 900])], 1000));
    expect(found.seconds).toEqual([0.125, 0.375, 0.625, 0.875]);
    expect(found.outputTokensPerSecond).toEqual([4, 8, 0, 4]);
    expect(found.itlMsP50).toEqual([null, 110, null, 580]);
    expect(found.running).toEqual([1, 1, 1, 1]);
    expect(found.firstTokens).toEqual({ seconds: [0.1], ttftMs: [100] });
    expect(found.curves.itlMs.at(-1)).toBe(580);
  });
});

describe('mesh figures', () => {
  const page = (steps: number, busy: number, cached: number): string => `# HELP shardmesh_steps_total steps
shardmesh_steps_total ${steps}
shardmesh_step_busy_seconds_total ${busy}
shardmesh_generation_tokens_total ${4 * steps}
shardmesh_prompt_tokens_cached_total ${cached}
shardmesh_num_requests_running ${cached}
shardmesh_worker_steps_total{worker="b",stage="0",rank="1"} ${steps}
shardmesh_worker_steps_total{worker="a",stage="0",rank="0"} ${steps}
shardmesh_worker_busy_seconds_total{worker="a",stage="0",rank="0"} ${busy / 2}
shardmesh_worker_bytes_out_total{worker="b",stage="0",rank="1"} ${1024 * steps}
`;

  it('are what grew over the run', () => {
    const [before, after] = [parseMetrics(page(10, 1, 3)), parseMetrics(page(30, 2, 5))];
    const found = meshFigures(before, after, [before, after]);
    expect(found).toMatchObject({
      steps: 20,
      stepMs: 50,
      generationTokensPerStep: 4,
      cachedTokens: 2,
      running: { mean: 4, max: 5 },
    });
    expect(found.shards.map(({ rank, worker }) => [rank, worker])).toEqual([
      [0, 'a'],
      [1, 'b'],
    ]);
    expect(found.shards[0]).toMatchObject({ steps: 20, stepMs: 25 });
    expect(found.shards[1]).toMatchObject({ bytesPerStep: 1024 });
  });

  it('take a sum that fell for that of a worker that started anew', () => {
    const [before, after] = [parseMetrics(page(100, 1, 0)), parseMetrics(page(30, 2, 0))];
    expect(meshFigures(before, after, [after]).steps).toBe(30);
  });
});
