import { execFile } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { BenchResult } from '../../deploy/bench/result.ts';
import { cli, startServe, type Served } from './helpers/serve.ts';

const folder = mkdtempSync(join(tmpdir(), 'shardmesh-bench-'));
let served: Served;

beforeAll(async () => {
  served = await startServe(['--tp', '2', '--log-level', 'error']);
});
afterAll(async () => {
  await served.stop();
  rmSync(folder, { recursive: true });
});

/** stdout and stderr. @throws with both when it fails */
async function bench(...args: string[]): Promise<{ stdout: string; stderr: string }> {
  return promisify(execFile)(process.execPath, [cli, 'bench', ...args]);
}

async function benchResult(...args: string[]): Promise<BenchResult> {
  return JSON.parse((await bench('--result', '-', ...args)).stdout) as BenchResult;
}

describe('shardmesh bench on our own mesh', () => {
  it('closed loop - tokens, requests and steps agree with what the mesh counted', async () => {
    const html = join(folder, 'report.html');
    const { runs } = await benchResult(
      ...['--url', served.url, '--streams', '1,3', '--requests', '3', '--prompt-tokens', '40', '--output-tokens', '8'],
      ...['--warm-up', '1', '--html', html],
    );
    expect(runs.map(({ load }) => load)).toEqual(['1 stream', '3 streams']);
    for (const { figures, mesh } of runs) {
      expect(figures).toMatchObject({ requests: 3, failed: 0, errors: {}, withoutUsage: 0, short: 0, cachedTokens: 0 });
      // One word is one token of this vocabulary.
      expect(figures.promptTokens).toMatchObject({ count: 3, mean: 40 });
      expect(figures.outputTokens).toMatchObject({ count: 3, mean: 8 });
      expect(figures.outputTokensPerSecond * figures.seconds).toBeCloseTo(24, 6);
      expect(figures.ttftMs?.count).toBe(3);
      expect(mesh?.promptTokens).toBe(120);
      expect(mesh?.shards.map(({ stage, rank }) => [stage, rank])).toEqual([
        [0, 0],
        [0, 1],
      ]);
    }
    const page = readFileSync(html, 'utf8');
    expect(page).toContain('uPlot');
    expect(page).not.toMatch(/<(script|link)[^>]+(src|href)=/);
  });

  it('conversations - later turns find the earlier ones in the cache', async () => {
    const { runs } = await benchResult(
      ...[
        '--url',
        served.url,
        '--streams',
        '1',
        '--requests',
        '3',
        '--turns',
        '3',
        '--prompt-tokens',
        '48',
        '--output-tokens',
        '4',
      ],
      ...['--warm-up', '0', '--seed', '5', '--chat'],
    );
    const [run] = runs;
    expect(run?.figures).toMatchObject({ requests: 3, failed: 0 });
    expect(run?.figures.cachedTokens).toBeGreaterThanOrEqual(32 + 80);
    expect(run?.mesh?.cachedTokens).toBe(run?.figures.cachedTokens);
  });

  it('open loop - sends when it is time, not when it is answered', async () => {
    const { runs } = await benchResult(
      ...['--url', served.url, '--burst', '4:60', '--requests', '4', '--prompt-tokens', '16', '--output-tokens', '4'],
      ...['--warm-up', '0', '--shared-prefix', '32', '--seed', '9', '--slo', 'e2e=60s'],
    );
    const [run] = runs;
    expect(run?.figures).toMatchObject({ requests: 4, failed: 0, goodput: { share: 1 } });
    expect(run?.figures.promptTokens?.mean).toBe(48);
    expect(run?.figures.sendLagMs?.count).toBe(4);
  });

  it('prints tables for a person, and errors by kind', async () => {
    const { stdout } = await bench('--url', served.url, '--requests', '1', '--output-tokens', '2', '--warm-up', '0');
    expect(stdout).toContain('output tok/s');
    expect(stdout).toContain('stage 0 rank 1');
    const tooLong = bench('--url', served.url, '--requests', '2', '--prompt-tokens', '9000', '--warm-up', '0');
    await expect(tooLong).rejects.toMatchObject({
      code: 2,
      stdout: expect.stringContaining('2 failed: HTTP 400 context_length_exceeded') as string,
    });
  });
});

describe('shardmesh bench on a server that is not ours', () => {
  let server: Server;
  let url: string;

  beforeAll(async () => {
    // Two tokens a chunk, as servers with speculation send them, then an answer that breaks off.
    server = createServer((request, response) => {
      if (request.url === '/v1/models') return response.end('{"data": [{"id": "other"}]}');
      if (request.url !== '/v1/completions') return response.writeHead(404).end();
      response.writeHead(200, { 'content-type': 'text/event-stream' });
      for (const text of ['a b', ' c d']) response.write(`data: ${JSON.stringify({ choices: [{ text }] })}\n\n`);
      if (breakOff) return response.destroy();
      response.write('data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}}\n\ndata: [DONE]\n\n');
      return response.end();
    });
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/v1`;
  });
  afterAll(() => void server.close());
  let breakOff = false;

  it('counts tokens by usage and has no figures of a mesh', async () => {
    const { runs, model } = await benchResult('--url', url, '--requests', '2', '--output-tokens', '4', '--warm-up', '0');
    expect(model).toBe('other');
    expect(runs[0]).toMatchObject({
      mesh: null,
      figures: { requests: 2, failed: 0, tokensPerChunk: 2, outputTokens: { mean: 4 } },
    });
  });

  it('does not take a broken answer for a whole one', async () => {
    breakOff = true;
    await expect(bench('--url', url, '--requests', '1', '--warm-up', '0')).rejects.toMatchObject({
      code: 2,
      stdout: expect.stringMatching(/1 failed: (ECONNRESET|stream: cut short)/) as string,
    });
  });

  it('says that nobody answers', async () => {
    await expect(bench('--url', 'http://127.0.0.1:1')).rejects.toMatchObject({
      code: 2,
      stderr: expect.stringContaining('no server answers') as string,
    });
  });
});
