/**
 * Whole programs on the CUDA executor, its kernels on the emulated machine (simt/machine.h). Copies and launches are queued as on a card and done as late as a card may,
 * in changing orders of threads and blocks; memory is guarded and poisoned. Not shown: speed, and what only a card's memory can do.
 */
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { loadAddonFrom, type Addon } from '../../kernels/index.ts';
import { buildKernelTarget } from './build-target.ts';
import { describeCudaPrograms, programmaticEdges } from './cuda-programs.ts';
import { randomTokens, TinyMesh, type TinyMeshOptions } from './tiny-model.ts';

const load = async (target: string): Promise<Addon> => loadAddonFrom(`${await buildKernelTarget(target)}.node`);

describe.skipIf(process.platform !== 'linux' || process.arch !== 'x64')('cuda executor on the emulated machine', () => {
  describeCudaPrograms(() => load('shardmesh_cuda_emulated'));

  /** What `use` finds while the emulated card has a fault that the runtime under test/ knows by name. */
  const withFault = async <T>(name: string, value: string, use: () => Promise<T>): Promise<T> => {
    process.env[name] = value;
    try {
      return await use();
    } finally {
      delete process.env[name];
    }
  };
  const prompt = randomTokens(30);
  const generate = async (options: TinyMeshOptions): Promise<unknown> => {
    const mesh = await TinyMesh.start(options);
    try {
      return await mesh.generate(prompt, {}, 6).catch((error: unknown) => error);
    } finally {
      await mesh.stop();
    }
  };

  it('cuda executor - two steps are on the card before the result of the first is read', async () => {
    const addon = await load('shardmesh_cuda_emulated');
    const folder = mkdtempSync(join(tmpdir(), 'shardmesh-card-'));
    try {
      const log = join(folder, 'graphs');
      const mesh = await TinyMesh.start({ addon, kind: 'cuda' });
      const began = performance.now();
      await withFault('SHARDMESH_EMULATED_CARD_LOG', log, () => mesh.generate(prompt, { logprobs: null }, 16));
      const elapsedUs = (performance.now() - began) * 1000;
      const behind = mesh.members[0]!.executor.graphs()[0]!.stepsBehind;
      const { totalUs, idleUs } = mesh.members[0]!.executor.totals().timings;
      await mesh.stop();
      // The prompt is no graph, and behind the last step there is none.
      const graphs = readFileSync(log, 'utf8').trim().split('\n').map(Number);
      expect(graphs).toEqual([0, ...Array.from({ length: 14 }, () => 2), 1]);
      expect(behind).toBe(14);
      // Between two steps the card has nothing to do for a moment, by its own clock; steps and moments are no more than the time that went by.
      expect(idleUs).toBeGreaterThan(0);
      expect(totalUs + idleUs).toBeLessThan(elapsedUs);
    } finally {
      rmSync(folder, { recursive: true });
    }
  });

  it.for([
    ['one place for what a step needs to know', 'place', /the host has changed what a queued copy reads/],
    ['one place for results', 'report', null],
    ['tokens of the step that was read last', 'token', null],
  ] as const)('cuda executor - queued steps with %s are found', async ([, fault, message]) => {
    const addon = await load('shardmesh_cuda_broken_queue');
    const run = async (options: TinyMeshOptions): Promise<unknown> => {
      const mesh = await TinyMesh.start(options);
      try {
        return await mesh.generate(prompt, { logprobs: null, temperature: 0.9, seed: 3n }, 16).catch((error: unknown) => error);
      } finally {
        await mesh.stop();
      }
    };
    const want = await run({});
    expect(await run({ addon, kind: 'cuda' })).toEqual(want); // nothing is taken away
    const found = await withFault('SHARDMESH_BROKEN_QUEUE', fault, () => run({ addon, kind: 'cuda' }));
    if (message) expect((found as Error).message).toMatch(message);
    else expect(found).not.toEqual(want);
  });

  it('cuda executor - a graph that lacks an edge is found', async () => {
    const addon = await load('shardmesh_cuda_emulated');
    const want = await generate({});
    expect(await generate({ addon, kind: 'cuda' })).toEqual(want);
    // Node 1 is the first norm, 2 the products q, k and v, 5 the products gate and up.
    for (const node of ['1', '2', '5'])
      expect(await withFault('SHARDMESH_EMULATED_GRAPH_WITHOUT_EDGE', node, () => generate({ addon, kind: 'cuda' }))).not.toEqual(
        want,
      );
  });

  it('cuda executor - graphs have programmatic edges where the table asks for them and the card knows them', async () => {
    const addon = await load('shardmesh_cuda_emulated');
    const edges = async (sm: string, cudaTuning?: string) => {
      const options = { addon, kind: 'cuda', ...(cudaTuning ? { cudaTuning } : {}) } as const;
      const mesh = await withFault('SHARDMESH_EMULATED_CARD_SM', sm, () => TinyMesh.start(options));
      const [one] = mesh.members[0]!.executor.graphs();
      await mesh.stop();
      return [one!.nodes, one!.programmaticEdges];
    };
    expect(await edges('90', programmaticEdges)).toEqual([[18], [17]]);
    expect(await edges('89', programmaticEdges)).toEqual([[18], [0]]);
    expect(await edges('90')).toEqual([[18], [0]]);
  });

  it('cuda executor - says what the card has no room for, what is free, and the --kv-cache-bytes that fits', async () => {
    const addon = await load('shardmesh_cuda_emulated');
    const start = (bytes: number, kvBlocks: number) =>
      withFault('SHARDMESH_EMULATED_CARD_BYTES', String(bytes), () => TinyMesh.start({ addon, kind: 'cuda', kvBlocks }));
    const message = await start(64 << 20, 40_000).then(
      () => '',
      (error: unknown) => (error as Error).message,
    );
    const [, asked, free, fits] =
      /^executor kind 'cuda': no room for the KV cache: (\d+) MiB on the card, where (\d+) MiB are free \(out of memory\); --kv-cache-bytes (\d+)m fits$/.exec(
        message,
      ) ?? [message];
    expect(Number(asked)).toBeGreaterThan(64);
    expect(Number(fits)).toBeGreaterThan(0.9 * Number(free));
    const perBlock = (Number(asked) * 2 ** 20) / 40_000;
    const mesh = await start(64 << 20, Math.floor((Number(fits) * 2 ** 20) / perBlock));
    await mesh.stop();
    await expect(start(1 << 20, 16)).rejects.toThrow(
      /^executor kind 'cuda': no room for the .*: \d+ MiB on the card, where \d MiB are free \(out of memory\); cut the model over more workers, or take a smaller one$/,
    );
  });

  it('cuda executor - a fault that stays fails the step as a lost card, with its reason', async () => {
    const addon = await load('shardmesh_cuda_emulated');
    const error = await withFault('SHARDMESH_EMULATED_CARD_FAULT_AFTER', '3', () => generate({ addon, kind: 'cuda' }));
    expect(error).toMatchObject({ code: 'device_lost' });
    expect((error as Error).message).toMatch(
      /^step \d+: the card \(emulated CUDA machine\) does nothing more for this process: uncorrectable ECC error encountered$/,
    );
  });

  it('cuda executor - a card that hangs fails the step as a lost card', async () => {
    const addon = await load('shardmesh_cuda_emulated');
    const mesh = await TinyMesh.start({ addon, kind: 'cuda' });
    const error = await withFault('SHARDMESH_EMULATED_CARD_HANGS', '1', () =>
      mesh.generate(prompt, {}, 2).catch((e: unknown) => e),
    );
    await mesh.stop();
    expect(error).toMatchObject({ code: 'device_lost' });
    expect((error as Error).message).toContain('the card has not finished in time');
  });

  it('cuda executor - says in one line that there is no card, and that a build has no CUDA part', async () => {
    const start = (addon: Addon) => TinyMesh.start({ addon, kind: 'cuda' });
    const emulated = await load('shardmesh_cuda_emulated');
    process.env['SHARDMESH_EMULATED_CARD_ABSENT'] = 'no NVIDIA driver here';
    try {
      await expect(start(emulated)).rejects.toThrow("executor kind 'cuda': no NVIDIA driver here");
    } finally {
      delete process.env['SHARDMESH_EMULATED_CARD_ABSENT'];
    }
    const plain = await load('shardmesh_emulated');
    await expect(start(plain)).rejects.toThrow(
      "executor kind 'cuda': this addon was built without its CUDA part; run: npm run build:cuda",
    );
  });
});
