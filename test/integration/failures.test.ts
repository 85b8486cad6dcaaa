/** Real processes that are killed and frozen under a running stream: one typed error in time, then serving goes on by itself, with the same tokens. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { metric, openStream, readMetrics, tryComplete, type Stream } from './helpers/client.ts';
import { leftovers, mark, natsServerPattern, pidOf, signal, waitFor, type Marked } from './helpers/processes.ts';
import { complete, startServe, type Served } from './helpers/serve.ts';

const small = ['--context-tokens-max', '512', '--kv-cache-bytes', '64m', '--log-level', 'info'];
/** From the fault to the error event. */
const errorWithinMs = 3_500;
const servingWithinMs = 5_000;
const greedy = { prompt: 'The capital of France is', max_tokens: 12, temperature: 0 };
const long = { prompt: 'Count: one, two, three,', max_tokens: 450, temperature: 0, ignore_eos: true };

let marked: Marked;
let served: Served;
let expected: string;

const workerPids = (): { worker: string; pid: number }[] => {
  const latest = new Map<string, number>();
  for (const { worker, pid } of served.events('worker_started')) latest.set(String(worker), Number(pid));
  return [...latest].map(([worker, pid]) => ({ worker, pid }));
};

const isReady = async (): Promise<boolean> => (await fetch(`${served.url}/readyz`)).status === 200;

/** Ends with exactly one error event, and no [DONE]. @returns milliseconds from now until then */
async function errorOf(stream: Stream): Promise<{ code: string; message: string; ms: number }> {
  const started = performance.now();
  const timeout = new Promise<never>((_, reject) =>
    setTimeout(() => reject(new Error(`the stream has not ended after 8 s\n${served.log()}`)), 8_000).unref(),
  );
  const { done } = await Promise.race([stream.ended, timeout]);
  const ms = performance.now() - started;
  expect(done).toBe(false);
  expect(stream.errors()).toHaveLength(1);
  const [error] = stream.errors();
  return { code: error?.code ?? '', message: error?.message ?? '', ms };
}

async function sameAnswerAsBefore(): Promise<void> {
  expect((await complete(served, greedy)).choices[0]?.text).toBe(expected);
}

beforeAll(async () => {
  marked = mark();
  served = await startServe(['--tp', '2', ...small], { env: marked.env });
  expected = (await complete(served, greedy)).choices[0]?.text ?? '';
  expect(expected).toContain('Paris');
});

afterAll(async () => {
  await served?.stop();
  marked?.dispose();
});

describe('a worker killed in mid-stream', () => {
  it('failures - a killed worker ends the running stream with one worker_lost, answers 503 until the mesh is whole, and serving goes on', async () => {
    const epoch = await metric(served, 'shardmesh_mesh_epoch');
    const stream = await openStream(served, long);
    await stream.reached(8);
    const { worker, pid } = workerPids()[1]!;
    signal(pid, 'SIGKILL');
    const killedAt = performance.now();
    const { code, message, ms } = await errorOf(stream);
    expect(code).toBe('worker_lost');
    expect(message).toContain(worker);
    expect(ms).toBeLessThan(errorWithinMs);
    const refused = await tryComplete(served);
    expect(refused).toMatchObject({ status: 503, code: 'mesh_unavailable' });
    expect(Number(refused.retryAfter)).toBeGreaterThanOrEqual(1);
    expect((await fetch(`${served.url}/livez`)).status).toBe(200);
    await waitFor('ready again', servingWithinMs, isReady, () => served.log());
    expect(performance.now() - killedAt).toBeLessThan(servingWithinMs + 500);
    expect(await metric(served, 'shardmesh_mesh_epoch')).toBeGreaterThan(epoch);
    await sameAnswerAsBefore();
  });
});

describe('a worker frozen in mid-stream', () => {
  it('failures - a frozen worker ends the stream in time, and rejoins by itself when it thaws; the same answer as before', async () => {
    const epoch = await metric(served, 'shardmesh_mesh_epoch');
    const stream = await openStream(served, long);
    await stream.reached(8);
    const { worker, pid } = workerPids()[0]!;
    signal(pid, 'SIGSTOP');
    const { code, message, ms } = await errorOf(stream);
    expect(['worker_lost', 'step_timeout']).toContain(code);
    expect(message).toContain(worker);
    expect(ms).toBeLessThan(errorWithinMs);
    await waitFor('not ready', 1_500, async () => !(await isReady()));
    expect(await tryComplete(served)).toMatchObject({ status: 503, code: 'mesh_unavailable' });
    await waitFor(
      'the frozen worker to be declared lost',
      4_000,
      () =>
        served
          .events('worker_lost')
          .some((event) => event['worker'] === worker && /heartbeat|connection/.test(String(event['message']))),
      () => served.log(),
    );
    signal(pid, 'SIGCONT');
    const thawedAt = performance.now();
    await waitFor('ready again', servingWithinMs, isReady, () => served.log());
    expect(performance.now() - thawedAt).toBeLessThan(servingWithinMs + 500);
    expect(workerPids()[0]).toEqual({ worker, pid });
    expect(await metric(served, 'shardmesh_mesh_epoch')).toBeGreaterThan(epoch);
    await sameAnswerAsBefore();
  });
});

describe('the nats-server', () => {
  it('failures - a killed nats-server ends the stream with broker_lost, and is started again', async () => {
    const stream = await openStream(served, long);
    await stream.reached(8);
    signal(pidOf(marked, natsServerPattern), 'SIGKILL');
    const { code, ms } = await errorOf(stream);
    expect(code).toBe('broker_lost');
    expect(ms).toBeLessThan(errorWithinMs);
    await waitFor('ready again', servingWithinMs, isReady, () => served.log());
    await sameAnswerAsBefore();
  });

  it('failures - a frozen nats-server ends the stream with broker_lost, and one that stays frozen is replaced', async () => {
    const stream = await openStream(served, long);
    await stream.reached(8);
    const pid = pidOf(marked, natsServerPattern);
    signal(pid, 'SIGSTOP');
    const { code, ms } = await errorOf(stream);
    expect(code).toBe('broker_lost');
    expect(ms).toBeLessThan(errorWithinMs);
    expect(await tryComplete(served)).toMatchObject({ status: 503, code: 'mesh_unavailable' });
    await waitFor('ready again', servingWithinMs, isReady, () => served.log());
    expect(pidOf(marked, natsServerPattern)).not.toBe(pid);
    expect(served.events('broker_frozen')).toHaveLength(1);
    await sameAnswerAsBefore();
    expect((await readMetrics(served)).get('shardmesh_mesh_ready')).toBe(1);
  });
});

describe('after all that', () => {
  it('failures - SIGTERM leaves no process, file or shared memory, whatever was killed and frozen before', async () => {
    expect(await served.stop()).toBe(0);
    await waitFor(
      'nothing to be left',
      500,
      () => leftovers(marked).length === 0,
      () => leftovers(marked),
    );
  });
});
