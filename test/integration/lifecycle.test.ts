/** From start to end: drains, what is left behind (nothing), workers started by hand, slices that travel, requests that end early. Real processes, the real model. */
import { copyFileSync, mkdirSync, rmSync, openSync, closeSync, readdirSync, readSync, statSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { findNatsServer } from '../../coordinator/mesh/nats-server.ts';
import { findModel } from '../../deploy/cli/find-model.ts';
import { metric, openStream, tryComplete } from './helpers/client.ts';
import { freePort, runCommand, shardmesh, type Running } from './helpers/command.ts';
import { leftovers, mark, pidOf, natsServerPattern, signal, waitFor, type Marked } from './helpers/processes.ts';
import { startServe, type Served } from './helpers/serve.ts';

const small = ['--context-tokens-max', '512', '--kv-cache-bytes', '64m', '--log-level', 'info'];
const modelName = 'smollm2-135m-instruct-q4_1';
const greedy = { prompt: 'The capital of France is', max_tokens: 8, temperature: 0 };
const long = { prompt: 'Count: one, two, three,', max_tokens: 450, temperature: 0, ignore_eos: true };

const nothingLeft = async (marked: Marked, withinMs: number): Promise<void> => {
  await waitFor(
    'nothing to be left',
    withinMs,
    () => leftovers(marked).length === 0,
    () => leftovers(marked),
  );
};

describe('a local mesh', () => {
  let marked: Marked;
  let served: Served | null = null;
  beforeAll(() => void (marked = mark()));
  afterEach(async () => {
    await served?.stop();
    served = null;
  });
  afterAll(() => marked.dispose());

  it('lifecycle - SIGTERM lets a running stream finish, refuses new requests, exits with 0 and leaves nothing', async () => {
    served = await startServe(['--tp', '2', ...small], { env: marked.env });
    const stream = await openStream(served, { ...long, max_tokens: 60 });
    await stream.reached(3);
    const stoppedAt = performance.now();
    const exit = served.stop();
    await new Promise((resolve) => setTimeout(resolve, 100));
    expect(await tryComplete(served)).toMatchObject({ status: 503, code: 'draining', retryAfter: '10' });
    expect(await stream.ended).toEqual({ done: true });
    expect(stream.finishReason()).toBe('length');
    expect(stream.errors()).toEqual([]);
    expect(await exit).toBe(0);
    expect(performance.now() - stoppedAt).toBeLessThan(12_000);
    await nothingLeft(marked, 500);
  });

  it('lifecycle - a stream that is not done 10 s after SIGINT ends with one typed error, exit code 0', async () => {
    served = await startServe(['--tp', '2', '--context-tokens-max', '4096', '--kv-cache-bytes', '256m'], { env: marked.env });
    const stream = await openStream(served, { ...long, max_tokens: 4_000 });
    await stream.reached(2);
    const stoppedAt = performance.now();
    served.child.kill('SIGINT');
    expect(await stream.ended).toEqual({ done: false });
    expect(stream.errors().map(({ code }) => code)).toEqual(['draining']);
    expect(await served.exited).toBe(0);
    expect(performance.now() - stoppedAt).toBeLessThan(12_000);
    await nothingLeft(marked, 500);
  });

  it('lifecycle - SIGINT to the whole process group, twice as under npm, lets a running stream finish all the same', async () => {
    served = await startServe(['--tp', '2', ...small], { env: marked.env, detached: true });
    const stream = await openStream(served, { ...long, max_tokens: 60 });
    await stream.reached(3);
    const group = served.child.pid ?? 0;
    process.kill(-group, 'SIGINT');
    process.kill(-group, 'SIGINT');
    // What an init system that ends a whole control group sends to each worker besides.
    for (const event of served.events('worker_started')) signal(Number(event['pid']), 'SIGTERM');
    expect(await stream.ended).toEqual({ done: true });
    expect(stream.finishReason()).toBe('length');
    expect(stream.errors()).toEqual([]);
    expect(await served.exited).toBe(0);
    await nothingLeft(marked, 500);
  });

  it('lifecycle - SIGKILL of serve leaves no process, no temporary folder and no shared memory', async () => {
    served = await startServe(['--tp', '2', ...small], { env: marked.env });
    const stream = await openStream(served, long);
    await stream.reached(3);
    expect(leftovers(marked).length).toBeGreaterThan(4);
    served.child.kill('SIGKILL');
    await nothingLeft(marked, 5_000);
  });

  it('lifecycle - SIGTERM of serve leaves nothing after a SIGKILL of its nats-server and a SIGSTOP of a worker', async () => {
    served = await startServe(['--tp', '2', ...small], { env: marked.env });
    signal(pidOf(marked, natsServerPattern), 'SIGKILL');
    signal(Number(served.events('worker_started')[0]?.['pid']), 'SIGSTOP');
    const stoppedAt = performance.now();
    expect(await served.stop()).toBe(0);
    expect(performance.now() - stoppedAt).toBeLessThan(12_000);
    await nothingLeft(marked, 500);
  });
});

describe('requests that end early', () => {
  let marked: Marked;
  let served: Served;
  beforeAll(async () => {
    marked = mark();
    served = await startServe([...small, '--no-prefix-cache', '--sequences-max', '1'], { env: marked.env });
  });
  afterAll(async () => {
    await served?.stop();
    marked?.dispose();
  });
  const used = (): Promise<number> => metric(served, 'shardmesh_kv_cache_blocks_used');

  it('lifecycle - a client that leaves frees the blocks of its sequence', async () => {
    expect(await used()).toBe(0);
    const stream = await openStream(served, long);
    await stream.reached(20);
    expect(await used()).toBeGreaterThanOrEqual(1);
    const cancelled = await metric(served, 'shardmesh_requests_cancelled_total');
    stream.abort();
    expect(await waitFor('all blocks free', 1_000, async () => (await used()) === 0)).toBeLessThan(1_000);
    expect(await metric(served, 'shardmesh_requests_cancelled_total')).toBe(cancelled + 1);
    expect(await metric(served, 'shardmesh_num_requests_running')).toBe(0);
  });

  it('lifecycle - a request ends with deadline_exceeded at the deadline of its header', async () => {
    const started = performance.now();
    expect(await tryComplete(served, long, { 'x-request-timeout-ms': '700' })).toMatchObject({
      status: 504,
      code: 'deadline_exceeded',
    });
    expect(performance.now() - started).toBeGreaterThan(600);
    expect(performance.now() - started).toBeLessThan(2_700);
    await waitFor('all blocks free', 1_000, async () => (await used()) === 0);
  });

  it('lifecycle - a full waiting queue answers 429 with Retry-After, and what waits is cancelled with its clients', async () => {
    const first = await openStream(served, long);
    await first.reached(1);
    const abort = new AbortController();
    const waiting = Array.from({ length: 256 }, () =>
      fetch(`${served.url}/v1/completions`, {
        method: 'POST',
        headers: { 'content-type': 'application/json' },
        body: JSON.stringify({ model: served.model, ...long }),
        signal: abort.signal,
      }).catch(() => null),
    );
    await waitFor('256 waiting', 30_000, async () => (await metric(served, 'shardmesh_num_requests_waiting')) === 256);
    const refused = await tryComplete(served);
    expect(refused).toMatchObject({ status: 429, code: 'queue_full' });
    expect(Number(refused.retryAfter)).toBeGreaterThanOrEqual(1);
    abort.abort();
    first.abort();
    await Promise.all(waiting);
    await waitFor('an empty queue', 5_000, async () => (await metric(served, 'shardmesh_num_requests_waiting')) === 0);
    expect((await tryComplete(served)).status).toBe(200);
  });
});

describe('workers started by hand', () => {
  let marked: Marked;
  let folder: string;
  let url: string;
  let nats: Running;
  const running: Running[] = [];

  const serveArgs = (): string[] => ['--nats', url, '--credentials', join(folder, 'coordinator.json'), '--tp', '2', ...small];
  const startWorker = (index: number, args = ['--no-local-model']): Running => {
    const worker = shardmesh(
      ['worker', '--credentials', join(folder, `worker-${index}.json`), '--cores', String(index - 1), ...args],
      {
        ...marked.env,
        SHARDMESH_CACHE: join(folder, `cache-${index}`),
      },
    );
    running.push(worker);
    return worker;
  };
  /** Of the coordinator's latest epoch: bytes fetched by rank. */
  const fetched = (served: Running, ready: number): number[] =>
    served
      .events('shard_ready')
      .slice(-ready)
      .sort((a, b) => Number(a['rank']) - Number(b['rank']))
      .map((event) => Number(event['bytesFetched']));
  const sliceFile = (index: number): string => {
    const slices = join(folder, `cache-${index}`, 'slices');
    const [only, ...others] = readdirSync(slices).filter((name) => name.endsWith('.slice'));
    expect(others).toEqual([]);
    return join(slices, only ?? '');
  };
  const flipByte = (path: string, at: number): void => {
    const file = openSync(path, 'r+');
    const byte = Buffer.alloc(1);
    readSync(file, byte, 0, 1, at);
    byte[0] = (byte[0] ?? 0) ^ 1;
    writeSync(file, byte, 0, 1, at);
    closeSync(file);
  };

  beforeAll(async () => {
    marked = mark();
    folder = join(marked.folder, 'mesh');
    const port = await freePort();
    url = `nats://127.0.0.1:${port}`;
    const keys = shardmesh(['keys', '--workers', '2', '--nats-port', String(port), '--out', folder], marked.env);
    expect(await keys.ended).toBe(0);
    nats = runCommand((await findNatsServer()).path, ['-c', join(folder, 'nats-server.conf')], marked.env);
    await waitFor(
      'the NATS server',
      5_000,
      () => nats.output().includes('Server is ready'),
      () => nats.output(),
    );
  });
  afterAll(async () => {
    for (const process of [...running, nats]) await process?.kill('SIGKILL');
    marked?.dispose();
  });

  it('lifecycle - serve --nats names who is missing; each worker without the model file gets its slice only; the next start moves 0 bytes; a flipped byte is fetched again', async () => {
    const served = shardmesh(['serve', '--port', '0', ...serveArgs()], marked.env);
    running.push(served);
    const says = (text: string | RegExp): Promise<number> =>
      waitFor(
        `serve to say ${String(text)}`,
        20_000,
        () => served.output().search(text) >= 0,
        () => served.output(),
      );
    await says(/waiting for 2 of 2 workers \(stage 0 rank 0, stage 0 rank 1\)/);
    startWorker(1);
    await says(/waiting for 1 of 2 workers \(stage 0 rank 1\)/);
    let second = startWorker(2);
    await says(/^shardmesh ready /m);
    const target = { url: /^shardmesh ready (\S+)/m.exec(served.output())?.[1] ?? '', model: modelName };
    try {
      // Each moved its slice, nothing else, and less than the model.
      const sizes = [statSync(sliceFile(1)).size, statSync(sliceFile(2)).size];
      expect(fetched(served, 2)).toEqual(sizes);
      const modelBytes = statSync(await findModel(modelName)).size;
      for (const size of sizes) expect(size).toBeLessThan(0.6 * modelBytes);
      expect((sizes[0] ?? 0) + (sizes[1] ?? 0)).toBeGreaterThan(0.9 * modelBytes);
      expect(
        served
          .events('slice_sent')
          .map((event) => Number(event['bytes']))
          .sort(),
      ).toEqual([...sizes].sort());
      const answer = (await tryComplete(target, greedy)).text;

      // A second start moves 0 bytes.
      expect(await second.kill('SIGTERM')).toBe(0);
      await waitFor('not ready', 3_500, async () => (await fetch(`${target.url}/readyz`)).status === 503);
      second = startWorker(2);
      await waitFor(
        'ready',
        8_000,
        async () => (await fetch(`${target.url}/readyz`)).status === 200,
        () => served.output(),
      );
      expect(fetched(served, 2)).toEqual([0, 0]);
      expect((await tryComplete(target, greedy)).text).toBe(answer);

      // A flipped byte is noticed before any kernel sees it; the slice is fetched again.
      await second.kill('SIGTERM');
      flipByte(sliceFile(2), 1_000_000);
      second = startWorker(2);
      await waitFor(
        'ready again',
        8_000,
        async () => (await tryComplete(target, greedy)).text === answer,
        () => served.output(),
      );
      expect([...fetched(served, 2)].sort((a, b) => a - b)).toEqual([0, sizes[1]]);

      // One coordinator a mesh; and who has no business here is told so.
      const rival = shardmesh(['serve', '--port', '0', ...serveArgs()], marked.env);
      expect(await rival.ended).toBe(2);
      expect(rival.output()).toMatch(/another coordinator \(process \d+ on .+\) serves this mesh already/);
      expect((await tryComplete(target, greedy)).text).toBe(answer);
    } finally {
      expect(await served.kill('SIGTERM')).toBe(0);
    }
  });

  it('lifecycle - credentials of another mesh, of another role, or readable by others are refused by name', async () => {
    const other = join(marked.folder, 'other');
    expect(await shardmesh(['keys', '--workers', '1', '--out', other], marked.env).ended).toBe(0);
    const stranger = shardmesh(
      ['serve', '--port', '0', '--nats', url, '--credentials', join(other, 'coordinator.json')],
      marked.env,
    );
    expect(await stranger.ended).toBe(1);
    expect(stranger.output()).toContain(`the NATS server at ${url} refused the credentials of this coordinator`);
    const wrongRole = shardmesh(['worker', '--credentials', join(folder, 'coordinator.json')], marked.env);
    expect(await wrongRole.ended).toBe(2);
    expect(wrongRole.output()).toContain('holds the credentials of a coordinator, not of a worker');
  });

  it('lifecycle - weights with a wrong digest never serve, from disk or from the coordinator', async () => {
    const model = join(marked.folder, 'model.gguf');
    copyFileSync(await findModel(modelName), model);
    // Two workers that look for the file themselves find one that was changed after the coordinator had read it.
    // Workers of the tests before would take the seats with the file as it was.
    for (const worker of running) await worker.kill('SIGKILL');
    const serve = shardmesh(['serve', '--port', '0', '--model', model, ...serveArgs()], {
      ...marked.env,
      SHARDMESH_CACHE: join(folder, 'cache-serve'),
    });
    running.push(serve);
    await waitFor(
      'the coordinator to wait',
      20_000,
      () => /waiting for \d of 2 workers/.test(serve.output()),
      () => serve.output(),
    );
    // All over the file, so that each rank's slice has one; and no slice of the tests before is left to fall back on.
    for (let at = 5_000_000; at < 95_000_000; at += 1_000_003) flipByte(model, at);
    for (const cache of ['cache-1', 'cache-2']) rmSync(join(folder, cache), { recursive: true, force: true });
    mkdirSync(join(folder, 'cache-1'), { recursive: true });
    startWorker(1, []);
    startWorker(2, ['--no-local-model']);
    await waitFor(
      'a digest to be refused',
      20_000,
      () => serve.events('worker_failed').some(({ code }) => code === 'digest_mismatch' || code === 'load_failed'),
      () => serve.output(),
    );
    expect(serve.events('epoch_serving')).toEqual([]);
    expect(await serve.kill('SIGTERM')).toBe(0);
  });
});
