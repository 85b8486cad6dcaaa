/**
 * Meshes over HTTP whose workers compute on this machine's card, with the default model: real processes, broker and links. Everything that they answer must have one digest
 * with what a mesh of processors answers. Skips where there is no card; SHARDMESH_EMULATED_CARD=1 tries it on the emulated machine, in some minutes.
 */
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { loadAddon } from '../../kernels/index.ts';
import { freePorts, runCommand, shardmesh, type Running } from '../integration/helpers/command.ts';
import { mark, waitFor, type Marked } from '../integration/helpers/processes.ts';
import { cli, complete, startServe, type Served } from '../integration/helpers/serve.ts';
import { emulatedCli } from '../matrix/emulated-cli.ts';

const emulated = process.env['SHARDMESH_EMULATED_CARD'] === '1';
const absent = emulated ? null : loadAddon().cudaFacts().absent;
const common = [
  '--context-tokens-max',
  emulated ? '128' : '2048',
  '--kv-cache-bytes',
  emulated ? '32m' : '256m',
  '--log-level',
  'info',
];
const tokens = emulated ? 2 : 64;
const prompt = 'The capital of France is';
/** Longer than a span of attention and than a step's tokens. */
const long = 'One, two, three, four, five, six, seven, eight, nine, ten. '.repeat(emulated ? 1 : 60);

/** Of all that has bits: texts and log-probabilities, greedy and sampled, alone and side by side. */
async function digest(mesh: Served): Promise<string> {
  const bodies = [
    { prompt, max_tokens: tokens, temperature: 0, logprobs: 3, echo: true },
    { prompt, max_tokens: tokens, temperature: 1, top_p: 0.95, seed: 7, logprobs: 3 },
    { prompt, max_tokens: tokens, temperature: 1, seed: 11 },
    { prompt: long, max_tokens: tokens, temperature: 0, logprobs: 1 },
  ];
  const alone: unknown[] = [];
  for (const body of bodies) alone.push((await complete(mesh, body)).choices);
  const together = await Promise.all(bodies.map(async (body) => (await complete(mesh, body)).choices));
  expect(together).toEqual(alone);
  return createHash('sha256').update(JSON.stringify(alone)).digest('hex');
}

describe.skipIf(absent !== null)(`meshes on a card${absent === null ? '' : ` (skipped: ${absent})`}`, () => {
  let marked: Marked;
  let main: string;
  let want: string;

  const digestOf = async (args: string[], withCard: boolean): Promise<string> => {
    const mesh = await startServe([...args, ...common], { env: marked.env, main: withCard ? main : cli, timeoutMs: 180_000 });
    try {
      return await digest(mesh);
    } finally {
      await mesh.stop();
    }
  };

  beforeAll(async () => {
    main = emulated ? await emulatedCli('shardmesh_cuda_emulated') : cli;
    marked = mark();
    want = await digestOf(['--tp', '1'], false);
  }, 600_000);
  afterAll(() => marked?.dispose());

  it.for([
    ['one worker', ['--tp', '1']],
    ['two ranks', ['--tp', '2']],
    ['two ranks in one process', ['--tp', '2', '--one-process']],
    ['two stages', ['--pp', '2']],
  ] as const)('card mesh - %s on the card answers as a mesh of processors, digest for digest', async ([, cut]) => {
    expect(await digestOf([...cut, '--executor', 'cuda'], true)).toBe(want);
  });

  it('card mesh - a processor and the card share each layer, and answer the same', async () => {
    const folder = join(marked.folder, 'mesh');
    const serving = startServe(
      ['--advertise', `127.0.0.1:${await freePorts(3)}`, '--mesh', folder, '--local-workers', '1', '--tp', '2', ...common],
      { env: marked.env, timeoutMs: 180_000 },
    );
    let worker: Running | null = null;
    try {
      await waitFor('the control socket', 30_000, () => existsSync(join(folder, 'control.sock')));
      const enroll = shardmesh(['enroll', '--mesh', folder], marked.env);
      await enroll.ended;
      const token = /^shardmesh worker --enroll (\S+)$/m.exec(enroll.output())?.[1] ?? '';
      worker = runCommand(process.execPath, [main, 'worker', '--enroll', token, '--executor', 'cuda', '--log-level', 'info'], {
        ...marked.env,
        XDG_CONFIG_HOME: join(marked.folder, 'worker'),
      });
      const mesh = await serving;
      expect(await digest(mesh)).toBe(want);
      expect(mesh.events('worker_joined').filter(({ device }) => device !== undefined)).toHaveLength(1);
    } finally {
      await worker?.kill('SIGKILL');
      await (await serving).stop();
    }
  });
});
