/**
 * A mesh of one processor and one "card": the real processes, broker and model over HTTP; the second worker is an unchanged process whose addon runs the CUDA executor
 * on the emulated machine (test/kernels/simt). Its answers must be those of a mesh of processors, number for number.
 */
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { buildKernelTarget } from '../kernels/build-target.ts';
import { bf16Shape, kQuantShape } from '../kernels/small-model.ts';
import { writeSmallModel } from '../kernels/small-model-file.ts';
import { emulatedCli } from '../matrix/emulated-cli.ts';
import { freePorts, runCommand, shardmesh, type Running } from './helpers/command.ts';
import { mark, signal, waitFor, type Marked } from './helpers/processes.ts';
import { complete, startServe, type Served } from './helpers/serve.ts';

const small = ['--tp', '2', '--context-tokens-max', '128', '--kv-cache-bytes', '32m', '--log-level', 'info'];

describe.skipIf(process.platform !== 'linux' || process.arch !== 'x64')('a mesh with a CUDA worker, emulated', () => {
  let marked: Marked;
  let served: Served;
  let worker: Running;
  let main: string;
  let workerEnv: Record<string, string>;

  beforeAll(async () => {
    main = await emulatedCli('shardmesh_cuda_emulated');
    marked = mark();
    workerEnv = { ...marked.env, XDG_CONFIG_HOME: join(marked.folder, 'worker') };
    const folder = join(marked.folder, 'mesh');
    const port = await freePorts(3);
    const serving = startServe(['--advertise', `127.0.0.1:${port}`, '--mesh', folder, '--local-workers', '1', ...small], {
      env: marked.env,
      main,
    });
    await waitFor('the control socket', 30_000, () => existsSync(join(folder, 'control.sock')));
    const enroll = shardmesh(['enroll', '--mesh', folder], marked.env);
    await enroll.ended;
    const token = /^shardmesh worker --enroll (\S+)$/m.exec(enroll.output())?.[1] ?? '';
    const command = ['worker', '--enroll', token, '--executor', 'cuda', '--log-level', 'info'];
    worker = runCommand(process.execPath, [main, ...command], workerEnv);
    served = await serving;
  }, 600_000);

  afterAll(async () => {
    await worker?.kill('SIGKILL');
    await served?.stop();
    marked?.dispose();
  });

  /** Everything that has bits: tokens and log-probabilities, greedy and sampled, of the prompt too; and a text that best candidates give. */
  const answers = async (mesh: Served): Promise<unknown[]> => {
    const prompt = 'The capital of France is';
    const bodies = [
      { prompt, max_tokens: 3, temperature: 0, logprobs: 3, echo: true },
      { prompt, max_tokens: 2, temperature: 1, top_p: 0.95, seed: 7, logprobs: 3 },
      { prompt, max_tokens: 2, temperature: 1, seed: 11 },
    ];
    const found: unknown[] = [];
    for (const body of bodies) {
      const { choices } = await complete(mesh, body);
      found.push(choices[0]?.text, choices[0]?.logprobs);
    }
    return found;
  };

  it('cuda mesh - a processor and an emulated card answer as two processors do, number for number', async () => {
    const mixed = await answers(served);
    const plain = await startServe(small);
    try {
      expect(mixed).toEqual(await answers(plain));
    } finally {
      await plain.stop();
    }
    expect(mixed[0]).toContain('The capital of France is Paris');
  });

  it('cuda mesh - serve makes a local worker on a card, which has the next step before the result of the one in front of it is read', async () => {
    const body = { prompt: 'The capital of France is', max_tokens: 3, temperature: 0 };
    const log = join(marked.folder, 'graphs');
    const env = { ...marked.env, SHARDMESH_EMULATED_CARD_LOG: log, SHARDMESH_EMULATED_CARD_BUSY_MS: '1000' };
    const cuda = await startServe(['--executor', 'cuda', ...small.with(1, '1')], { env, main });
    try {
      const [want, found] = [await complete(served, body), await complete(cuda, body)];
      expect(found.choices).toEqual(want.choices);
      expect(cuda.events('shard_loaded').map(({ executor }) => executor)).toEqual(['cuda']);
      // Of the three tokens the first is the prompt's, which is no graph; behind the last step there is none.
      expect(readFileSync(log, 'utf8').trim().split('\n').slice(-2)).toEqual(['2', '1']);
    } finally {
      await cuda.stop();
    }
  });

  describe('cards that read each other', () => {
    const body = { prompt: 'The capital of France is', max_tokens: 2, temperature: 0, logprobs: 1 };
    const chosen = (mesh: Served) => mesh.events('link_chosen').map(({ driver, memory }) => [driver, memory]);
    let want: Awaited<ReturnType<typeof complete>>;

    it("cuda mesh - two cards of one host read each other's sums, with the same bits; a killed rank is replaced", async () => {
      want = await complete(served, body);
      const cuda = await startServe(['--executor', 'cuda', ...small], { env: marked.env, main });
      try {
        expect((await complete(cuda, body)).choices).toEqual(want.choices);
        expect(chosen(cuda)[0]).toEqual(['peer', 'card']);
        const served = cuda.events('epoch_serving').length;
        signal(Number(cuda.events('worker_started')[1]!['pid']), 'SIGKILL');
        await waitFor(
          'another epoch',
          30_000,
          () => cuda.events('epoch_serving').length > served,
          () => cuda.log(),
        );
        expect((await complete(cuda, body)).choices).toEqual(want.choices);
        expect(new Set(chosen(cuda).map(([driver]) => driver))).toEqual(new Set(['peer']));
      } finally {
        await cuda.stop();
      }
    });

    it('cuda mesh - cards that do not reach each other read memory of the host, with the same bits', async () => {
      const env = { ...marked.env, SHARDMESH_EMULATED_CARDS_APART: '1' };
      const cuda = await startServe(['--executor', 'cuda', ...small], { env, main });
      try {
        expect((await complete(cuda, body)).choices).toEqual(want.choices);
        // A busy machine may lose an epoch more.
        expect(chosen(cuda).slice(0, 2)).toEqual([
          ['peer', 'card'],
          ['peer', 'host'],
        ]);
        expect(String(cuda.events('worker_failed')[0]?.['message'])).toMatch(
          /^memory of rank \d cannot be read here: the card does not reach the memory of process \d+: cards are apart$/,
        );
      } finally {
        await cuda.stop();
      }
    });
  });

  it('cuda mesh - two ranks of one process share its card, with the digest of one processor; when the process is killed, both come back', async () => {
    const folder = join(marked.folder, 'small');
    mkdirSync(folder);
    const model = writeSmallModel(folder, kQuantShape);
    const args = ['--model', model, '--kv-cache-bytes', '8m', '--log-level', 'info'];
    const digest = async (mesh: Served): Promise<string> => {
      const hash = createHash('sha256');
      for (const body of [
        { prompt: 'ab c'.repeat(9), max_tokens: 8, temperature: 0, logprobs: 3, echo: true },
        { prompt: 'ab c', max_tokens: 12, temperature: 1, seed: 11 },
      ])
        hash.update(JSON.stringify((await complete(mesh, body)).choices));
      return hash.digest('hex');
    };
    const one = await startServe(args, { env: marked.env });
    const want = await digest(one).finally(() => one.stop());
    const card = await startServe([...args, '--executor', 'cuda', '--tp', '2', '--one-process'], { env: marked.env, main });
    try {
      expect(await digest(card)).toBe(want);
      const pids = card.events('worker_started').map(({ pid }) => Number(pid));
      expect(pids).toHaveLength(2);
      expect(new Set(pids).size).toBe(1);
      signal(pids[0]!, 'SIGKILL');
      const before = card.events('epoch_serving').length;
      await waitFor(
        'another epoch',
        30_000,
        () => card.events('epoch_serving').length > before,
        () => card.log(),
      );
      expect(await digest(card)).toBe(want);
      expect(card.events('worker_restarting')).toHaveLength(2);
      expect(card.events('link_chosen').map(({ driver, memory }) => [driver, memory])).toEqual([
        ['card', null],
        ['card', null],
      ]);
    } finally {
      await card.stop();
    }
  });

  describe('BF16 weights', () => {
    // A token is a byte: the prompt is one step of 68 tokens.
    const body = { prompt: 'ab c'.repeat(17), max_tokens: 2, temperature: 0, logprobs: 1, echo: true };
    let model: string[];

    beforeAll(() => {
      model = ['--model', writeSmallModel(marked.folder, { ...bf16Shape, architecture: 'llama' })];
    });

    const answer = async (args: string[], env: Record<string, string> = {}) => {
      const mesh = await startServe([...model, '--kv-cache-bytes', '8m', '--log-level', 'info', ...args], {
        env: { ...marked.env, ...env },
        main,
      });
      try {
        const { text, logprobs } = (await complete(mesh, body)).choices[0]!;
        const notes = mesh.events('executor_note').map(({ message }) => message);
        return { text, logprobs: logprobs!.token_logprobs.slice(1) as number[], notes };
      } finally {
        await mesh.stop();
      }
    };
    // Activations are rounded to bf16.
    const farthest = (a: number[], b: number[]) => Math.max(...a.map((value, i) => Math.abs(value - b[i]!)));
    const cuda = ['--executor', 'cuda'];

    it('cuda mesh - BF16 weights with --bits per-kind give one answer on any cut of cards, near that of a processor; with --bits free cuBLASLt computes, and its worker says so', async () => {
      const exact = await answer([]);
      expect(exact.logprobs).toHaveLength(69);
      const one = await answer([...cuda, '--bits', 'per-kind', '--pp', '2']);
      expect(one.logprobs).not.toEqual(exact.logprobs);
      expect(farthest(one.logprobs, exact.logprobs)).toBeLessThan(0.06);
      expect(await answer([...cuda, '--bits', 'per-kind', '--tp', '2'])).toEqual(one);
      expect(one.notes).toEqual([]);

      const library = join(dirname(await buildKernelTarget('cublas_lt_stand_in')), 'libcublas_lt_stand_in.so');
      const free = await answer([...cuda, '--bits', 'free'], { SHARDMESH_EMULATED_CUBLASLT: library });
      expect(free.notes).toEqual(['BF16 products of more than 64 tokens by cuBLASLt 13.1.0']);
      expect(free.logprobs).not.toEqual(one.logprobs);
      expect(farthest(free.logprobs, exact.logprobs)).toBeLessThan(0.06);
    });
  });

  it('cuda mesh - the card is named where its worker joins, and its shard says what computes it', () => {
    expect(served.events('worker_joined').map(({ device, isa }) => device ?? typeof isa)).toEqual(
      expect.arrayContaining(['emulated CUDA machine, sm_90', 'string']),
    );
    expect(worker.events('shard_loaded')).toMatchObject([{ executor: 'cuda' }]);
  });

  it('cuda mesh - a worker that finds no card ends with one line', async () => {
    const absent = { ...workerEnv, SHARDMESH_EMULATED_CARD_ABSENT: 'no NVIDIA driver here' };
    const refused = runCommand(process.execPath, [main, 'worker', '--executor', 'cuda'], absent);
    expect(await refused.ended).toBe(72);
    expect(refused.output().trim()).toBe('shardmesh: --executor cuda: no NVIDIA driver here');
  });

  it('cuda mesh - a worker that is to be two without a card, or one twice, ends with one line', async () => {
    const file = join(workerEnv['XDG_CONFIG_HOME']!, 'shardmesh', 'worker.json');
    const refusal = async (...args: string[]): Promise<string> => {
      const refused = runCommand(process.execPath, [main, 'worker', '--also', file, ...args], workerEnv);
      expect(await refused.ended).toBe(2);
      return refused.output().trim();
    };
    expect(await refusal()).toBe('shardmesh: --also is for workers that share a card and needs --executor cuda');
    expect(await refusal('--executor', 'cuda')).toBe(
      'shardmesh: --also names the credentials of a worker that this process is already',
    );
  });

  it('cuda mesh - a card that answers no more ends its worker with a code of its own, and the coordinator says why in one line', async () => {
    const env = { ...marked.env, SHARDMESH_EMULATED_CARD_FAULT_AFTER: '4' };
    const cuda = await startServe(['--executor', 'cuda', ...small.slice(2)], { env, main });
    try {
      await expect(complete(cuda, { prompt: 'Paris', max_tokens: 8, temperature: 0 })).rejects.toThrow();
      expect(cuda.events('epoch_ended')[0]?.['message']).toContain('does nothing more for this process: uncorrectable ECC error');
      await waitFor('the worker to be started again', 10_000, () => cuda.events('worker_restarting').length > 0);
      expect(cuda.events('worker_restarting')[0]?.['cause']).toMatch(
        /ended with exit code 71 \(its card answered no more: .*Xid\) after/,
      );
    } finally {
      await cuda.stop();
    }
  });
});
