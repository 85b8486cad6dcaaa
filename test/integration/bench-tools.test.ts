/** The tools of test/bench, each for a moment: they are not type-checked, and nobody runs them for months. What they measure is not looked at. */
import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { describe, expect, it } from 'vitest';

async function measured(script: string, ...args: string[]): Promise<unknown> {
  const path = fileURLToPath(new URL(`../bench/${script}`, import.meta.url));
  const { stdout } = await promisify(execFile)(process.execPath, [path, ...args, '--json'], { timeout: 60_000 });
  return JSON.parse(stdout);
}
const positive = expect.toSatisfy((value: number) => value > 0) as unknown;

describe('bench tools', () => {
  it('bench:kernels --step - decodes and prefills whole steps of the real model', async () => {
    const size = '--engines 2x1 --sequences 2 --steps 4 --context 8 --prefill 16 --rounds 1';
    expect(await measured('kernels.mjs', '--step', ...size.split(' '))).toMatchObject({
      rows: [
        { work: 'prefill 16', best: positive },
        { work: 'decode 2', best: positive },
      ],
    });
  });

  it('bench:coordinator - streams tokens that nobody computed', async () => {
    expect(await measured('coordinator.mjs', '--streams', '4', '--seconds', '1')).toMatchObject({ tokensPerSecond: positive });
  });

  it('bench:scheduler - plans from 1 to 1,024 sequences', async () => {
    const points = await measured('scheduler.mjs', '--steps', '3');
    expect(points).toHaveLength(11);
    expect(points).toMatchObject({ 10: { sequences: 1_024, plan: positive } });
  });

  it('bench:peers - names a --vllm that is no environment, before anything is started', async () => {
    const script = fileURLToPath(new URL('../bench/peers.mjs', import.meta.url));
    const started = promisify(execFile)(process.execPath, [script, '--vllm', '/nowhere'], { timeout: 60_000 });
    await expect(started).rejects.toThrow(/--vllm \/nowhere: there is no such file or folder; to make one:/);
  });
});
