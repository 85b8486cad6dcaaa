/** What a running mesh shows of itself: heartbeats under load, one request followed through the logs, memory of a worker, bubbles of a pipeline. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { TraceDocument } from '../../coordinator/observe/trace-document.ts';
import type { ProcessSummary } from '../../coordinator/observe/trace-summary.ts';
import { openStream, readMetrics, tryComplete } from './helpers/client.ts';
import { mark, waitFor, type Marked } from './helpers/processes.ts';
import { startServe, type Served } from './helpers/serve.ts';

const small = ['--context-tokens-max', '512', '--kv-cache-bytes', '64m'];
const greedy = { prompt: 'The capital of France is', max_tokens: 8, temperature: 0 };

let marked: Marked;
beforeAll(() => void (marked = mark()));
afterAll(() => marked.dispose());

async function withServe<T>(args: string[], run: (served: Served) => Promise<T>): Promise<T> {
  const served = await startServe([...args, ...small], { env: marked.env, timeoutMs: 90_000 });
  try {
    return await run(served);
  } finally {
    expect(await served.stop()).toBe(0);
  }
}

const rssOfWorkers = async (served: Served): Promise<number[]> => {
  // A heartbeat after the shard was loaded.
  await new Promise((resolve) => setTimeout(resolve, 600));
  return [...(await readMetrics(served))]
    .filter(([name]) => name.startsWith('shardmesh_worker_rss_bytes{'))
    .map(([, value]) => Math.round(value / 1024 ** 2));
};

let alone: { text: string | null; rssMiB: number };

describe('mesh', () => {
  it('observe - heartbeats go on during a prefill that takes seconds', async () => {
    await withServe(['--executor', 'reference', '--log-level', 'info'], async (served) => {
      const prompt = Array.from({ length: 160 }, (_, i) => 100 + i);
      const answer = tryComplete(served, { prompt, max_tokens: 1 });
      let ended = false;
      void answer.then(() => (ended = true));
      const started = performance.now();
      const gaps: number[] = [];
      await waitFor('the prefill', 60_000, async () => {
        const samples = await readMetrics(served);
        for (const [name, value] of samples) if (name.startsWith('shardmesh_worker_heartbeat_age_seconds{')) gaps.push(value);
        return ended;
      });
      const prefillMs = performance.now() - started;
      expect((await answer).status).toBe(200);
      expect(gaps.length).toBeGreaterThan(5);
      expect(Math.max(...gaps)).toBeLessThan(1);
      // Long enough to have missed several beats.
      expect(prefillMs).toBeGreaterThan(1_000);
      expect(served.events('epoch_ended')).toEqual([]);
    });
  });

  it('observe - a trace shows every part of a step on the coordinator and both workers, in one time', async () => {
    await withServe(['--tp', '2', '--log-level', 'error'], async (served) => {
      const answer = tryComplete(served, { ...greedy, max_tokens: 200, ignore_eos: true });
      const response = await fetch(`${served.url}/trace`, {
        method: 'POST',
        headers: { 'content-type': 'application/json' },
        body: JSON.stringify({ milliseconds: 1_000 }),
      });
      expect((await answer).status).toBe(200);
      const { traceEvents, summary } = (await response.json()) as TraceDocument & { summary: ProcessSummary[] };
      const spans = traceEvents.filter(({ ph }) => ph === 'X');
      const of = (pid: number, name: string, step: number) =>
        spans.find((span) => span.pid === pid && span.name === name && span.args?.['step'] === step);
      const steps = spans.flatMap(({ pid, name, args }) => (pid === 1 && name === 'commit' ? [args!['step'] as number] : []));
      expect(steps.length).toBeGreaterThan(2);
      const step = steps[Math.floor(steps.length / 2)]!;
      const path = [
        of(1, 'plan', step),
        of(1, 'publish plan', step),
        of(2, 'receive plan', step),
        of(2, 'step', step),
        of(2, 'step done', step),
        of(1, 'commit', step),
      ].map((span) => span?.ts ?? Number.NaN);
      expect(path).toEqual([...path].sort((a, b) => a - b));
      for (const pid of [2, 3])
        for (const name of ['products', 'reduce', 'attention']) expect(of(pid, name, step), `${pid} ${name}`).toBeDefined();
      expect(of(2, 'sample', step)).toBeDefined();
      expect(of(3, 'sample', step)).toBeUndefined();
      expect(summary.map(({ name }) => name)).toEqual(['coordinator', 'worker 0.0', 'worker 0.1']);
    });
  });

  it('observe - one request can be followed through coordinator and all workers of tp 2 x pp 2 by its steps', async () => {
    await withServe(['--tp', '2', '--pp', '2', '--log-level', 'debug'], async (served) => {
      const response = await fetch(`${served.url}/v1/completions`, {
        method: 'POST',
        headers: { 'content-type': 'application/json' },
        body: JSON.stringify({ model: served.model, ...greedy }),
      });
      const id = response.headers.get('x-request-id') ?? '';
      expect(response.status).toBe(200);
      const planned = served.events('step_planned').filter((event) => (event['requestIds'] as string[]).includes(id));
      // The prompt and its first token, then one step for each token that follows.
      expect(planned.length).toBeGreaterThanOrEqual(8);
      const steps = planned.map((event) => Number(event['step']));
      await waitFor(
        'every worker to log every step of the request',
        2_000,
        () => steps.every((step) => served.events('step_done').filter((event) => event['step'] === step).length === 4),
        () => steps,
      );
      for (const step of steps)
        expect(
          new Set(
            served
              .events('step_done')
              .filter((event) => event['step'] === step)
              .map((event) => event['name']),
          ).size,
        ).toBe(4);
      const own = () => served.events('request').filter((event) => event['requestId'] === id);
      await waitFor('the line of the request', 2_000, () => own().length === 1);
      expect(own()[0]).toMatchObject({ name: 'coordinator', status: 200 });
      // Never a prompt or an answer.
      expect(served.log()).not.toContain('France');
    });
  });

  it('observe - one worker: its memory and its answer, for comparison', async () => {
    alone = await withServe(['--log-level', 'info'], async (served) => ({
      text: (await tryComplete(served, greedy)).text,
      rssMiB: (await rssOfWorkers(served))[0] ?? 0,
    }));
    expect(alone.text).toContain('Paris');
  });

  it('observe - a worker of two holds less than one alone', async () => {
    const rss = await withServe(['--tp', '2', '--log-level', 'info'], rssOfWorkers);
    console.info(`RSS of workers: tp 1 ${alone.rssMiB} MiB, tp 2 ${rss.join(' and ')} MiB`);
    expect(rss).toHaveLength(2);
    for (const one of rss) expect(one).toBeLessThan(alone.rssMiB - 20);
  });

  it('observe - more ranks than cores answer with the same tokens', async () => {
    expect(
      await withServe(['--tp', '5', '--log-level', 'info'], async (served) => (await tryComplete(served, greedy)).text),
    ).toBe(alone.text);
  });

  it('observe - bubbles of two stages become fewer with more streams', async () => {
    await withServe(['--pp', '2', '--no-prefix-cache', '--log-level', 'info'], async (served) => {
      const sum = async () => {
        const samples = await readMetrics(served);
        const of = (name: string): number => samples.get(`shardmesh_${name}`) ?? Number.NaN;
        return {
          bubble: of('bubble_seconds_total'),
          step: of('step_busy_seconds_total'),
          tokens: of('generation_tokens_total'),
        };
      };
      const measure = async (streams: number): Promise<{ ratio: number; rate: number }> => {
        const before = await sum();
        const started = performance.now();
        const open = await Promise.all(
          Array.from({ length: streams }, (_, i) =>
            openStream(served, { prompt: `${i} is`, max_tokens: 64, temperature: 0, ignore_eos: true }),
          ),
        );
        await Promise.all(open.map((stream) => stream.ended));
        const seconds = (performance.now() - started) / 1_000;
        const after = await sum();
        return {
          ratio: (after.bubble - before.bubble) / (after.step - before.step),
          rate: (after.tokens - before.tokens) / seconds,
        };
      };
      // Waiting for a core counts as a bubble too, so programs beside this one can hide the difference: measured again then.
      for (let attempt = 1; ; attempt++) {
        const [one, two, eight] = [await measure(1), await measure(2), await measure(8)];
        const all = [one, two, eight];
        console.info(
          `pp 2: bubble ratio with 1, 2, 8 streams ${all.map(({ ratio }) => ratio.toFixed(2)).join(', ')}; tokens/s ${all.map(({ rate }) => rate.toFixed(0)).join(', ')}`,
        );
        expect(one.ratio).toBeGreaterThan(0.05);
        for (const { ratio } of all) expect(ratio).toBeGreaterThanOrEqual(0);
        if (attempt === 8 || eight.ratio < one.ratio - 0.02) {
          expect(eight.ratio).toBeLessThan(one.ratio);
          break;
        }
      }
    });
  });
});
