/** The commands of the compose file as real processes: keys, nats-server with the configuration they wrote, two workers, a coordinator. */
import { spawn, type ChildProcess } from 'node:child_process';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, symlinkSync } from 'node:fs';
import { createServer, type AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { findNatsServer } from '../../coordinator/mesh/nats-server.ts';
import { defaultCacheDirectory } from '../../kernels/model-file/cache-directory.ts';
import { readCompose, type Compose, type ComposeService } from '../unit/deploy/container-files.ts';
import { cli, complete } from './helpers/serve.ts';

type ServiceName = keyof Compose['services'];

interface Running {
  child: ChildProcess;
  output: () => string;
  ended: Promise<number | null>;
}

const { services } = readCompose();
let app: string;
let natsPort: number;
let httpPort: number;
const running = new Map<ServiceName, Running>();
const killAll = (): void => running.forEach(({ child }) => child.kill('SIGKILL'));
process.once('exit', killAll);

async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

/** The container's folder is `app`, its ports are free ones; nothing else of a command changes. */
const local = (word: string): string =>
  word
    .replaceAll('/app/', `${app}/`)
    .replaceAll(/\b4222\b/g, String(natsPort))
    .replaceAll(/\b8080\b/g, String(httpPort));

/** What a container of the service would run: the image's entry point, unless it has its own. */
function start(name: ServiceName): Running {
  const service: ComposeService = services[name];
  const [command = '', ...args] = service.entrypoint
    ? [...service.entrypoint, ...service.command]
    : [process.execPath, cli, ...service.command];
  const child = spawn(command, args.map(local), {
    cwd: app,
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { ...process.env, SHARDMESH_CACHE: defaultCacheDirectory(), NODE_ENV: 'production' },
  });
  let output = '';
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (chunk: Buffer) => (output += chunk.toString()));
  const ended = new Promise<number | null>((resolve) => child.once('exit', (code) => resolve(code)));
  const process_ = { child, output: () => output, ended };
  running.set(name, process_);
  return process_;
}

async function until(what: string, timeoutMs: number, condition: () => boolean | Promise<boolean>): Promise<void> {
  const end = performance.now() + timeoutMs;
  while (!(await condition())) {
    const dead = [...running].find(([, { child }]) => child.exitCode !== null && child.exitCode !== 0);
    if (dead || performance.now() > end)
      throw new Error(
        `${what}: ${dead ? `${dead[0]} ended with exit code ${dead[1].child.exitCode}` : `not within ${timeoutMs} ms`}\n${[...running].map(([name, { output }]) => `--- ${name}\n${output()}`).join('\n')}`,
      );
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

beforeAll(async () => {
  app = mkdtempSync(join(tmpdir(), 'shardmesh-app-'));
  natsPort = await freePort();
  httpPort = await freePort();
  // As in the image: the server lies in the cache, under its version.
  const { path, version } = await findNatsServer();
  mkdirSync(join(app, 'cache', 'nats-server', version), { recursive: true });
  symlinkSync(path, join(app, 'cache', 'nats-server', version, 'nats-server'));
  mkdirSync(join(app, 'mesh'), { mode: 0o700 });
});

afterAll(async () => {
  killAll();
  await Promise.all([...running.values()].map(({ ended }) => ended));
  rmSync(app, { recursive: true, force: true });
});

describe.sequential('compose commands', () => {
  test('compose commands - keys writes one file a process, all 0600', async () => {
    expect(await start('keys').ended).toBe(0);
    running.delete('keys');
    const files = readdirSync(join(app, 'mesh')).sort();
    expect(files).toEqual(['coordinator.json', 'nats-server.conf', 'system.json', 'worker-1.json', 'worker-2.json']);
    expect(files.map((file) => statSync(join(app, 'mesh', file)).mode & 0o777)).toEqual(files.map(() => 0o600));
    expect(readFileSync(join(app, 'mesh', 'nats-server.conf'), 'utf8')).toContain(`port: ${natsPort}`);
  });

  test('compose commands - a mesh of two workers answers a completion', async () => {
    start('nats');
    start('worker-1');
    start('worker-2');
    const { output } = start('coordinator');
    await until('the coordinator is ready', 90_000, () => /^shardmesh ready /m.test(output()));
    const [, url = '', model = ''] = /^shardmesh ready (\S+) model=(\S+) tp=2 pp=1$/m.exec(output()) ?? [];
    expect(url).toBe(`http://127.0.0.1:${httpPort}`);
    const completion = await complete({ url, model }, { prompt: 'The capital of France is', max_tokens: 8, temperature: 0 });
    expect(completion.choices[0]?.text).toContain('Paris');
    expect(completion.usage).toMatchObject({ prompt_tokens: 5, completion_tokens: 8 });
    const health = await fetch(`${url}/readyz`);
    expect(health.status).toBe(200);
  });

  test('compose commands - doctor measures between the workers of the running mesh', async () => {
    const child = spawn(
      process.execPath,
      [cli, 'doctor', '--json', '--port', '0', '--credentials', join(app, 'mesh', 'coordinator.json')],
      { stdio: ['ignore', 'pipe', 'pipe'], env: { ...process.env, SHARDMESH_CACHE: defaultCacheDirectory() } },
    );
    let stdout = '';
    child.stdout.on('data', (chunk: Buffer) => (stdout += chunk.toString()));
    await new Promise((resolve) => child.once('close', resolve));
    const { findings } = JSON.parse(stdout) as { findings: { what: string; status: string; value: string }[] };
    const mesh = findings.slice(findings.findIndex(({ what }) => what === 'mesh workers'));
    expect(mesh.map(({ what, status }) => `${what.replace(/[a-z0-9]{6}-[a-z0-9]{6}/, 'a-b')} ${status}`)).toEqual([
      'mesh workers ok',
      'nats a-b ok',
    ]);
    expect(mesh[0]?.value).toMatch(/^\w{6} connected, \w{6} connected$/);
    expect(findings.find(({ what }) => what === 'nats permissions')).toMatchObject({ status: 'ok' });
  });

  test('compose commands - the mesh still answers after that', async () => {
    const response = await fetch(`http://127.0.0.1:${httpPort}/readyz`);
    expect(response.status).toBe(200);
  });

  test('compose commands - SIGTERM ends every one of them, the coordinator first', async () => {
    for (const name of ['coordinator', 'worker-2', 'worker-1', 'nats'] as const) {
      const process_ = running.get(name);
      process_?.child.kill('SIGTERM');
      const code = await process_?.ended;
      // nats-server ends by the signal's own number in some versions.
      expect([name, code]).toEqual([name, name === 'nats' ? expect.anything() : 0]);
      running.delete(name);
    }
    await expect(fetch(`http://127.0.0.1:${httpPort}/livez`)).rejects.toThrow();
  });
});
