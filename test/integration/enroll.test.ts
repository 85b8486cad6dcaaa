/**
 * Workers of other hosts, all on loopback: `--advertise` makes every connection mutual TLS there as well, so that the rules are the same. The real processes and the
 * real model; test/hosts has the same in network namespaces.
 */
import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync, statSync } from 'node:fs';
import { createConnection } from 'node:net';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { connect as connectTls } from 'node:tls';
import { status } from '@grpc/grpc-js';
import { connect as connectPlain } from 'nats';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { MeshAuthority } from '../../coordinator/authority/mesh-authority.ts';
import { askCoordinator } from '../../coordinator/authority/control-socket.ts';
import { newUser } from '../../coordinator/mesh/broker-config.ts';
import { readCredentials } from '../../protocol/credentials.ts';
import { parseToken, tokenText } from '../../protocol/enrollment.ts';
import { createGrpcClient, openLinkStream, openWeightsFetch } from '../../protocol/grpc/index.ts';
import { newWorkerId, type WorkerId } from '../../protocol/ids.ts';
import { connectNats } from '../../protocol/nats-transport.ts';
import { meshSubjects } from '../../protocol/subjects.ts';
import { coordinatorName, workerName } from '../../protocol/tls.ts';
import { enroll } from '../../shard-worker/enroll.ts';
import { freePorts, shardmesh, type Running } from './helpers/command.ts';
import { mark, waitFor, type Marked } from './helpers/processes.ts';
import { complete, startServe, type Served } from './helpers/serve.ts';

const small = ['--context-tokens-max', '512', '--kv-cache-bytes', '64m', '--log-level', 'info'];
const greedy = { prompt: 'The capital of France is', max_tokens: 8, temperature: 0 };

let marked: Marked;
let folder: string;
let port: number;
let served: Served;
let first: Running;
let firstFile: string;

const env = (name: string): Record<string, string> => ({ ...marked.env, XDG_CONFIG_HOME: join(marked.folder, name) });
const command = async (...args: string[]): Promise<{ code: number | null; output: string }> => {
  const running = shardmesh(args, marked.env);
  return { code: await running.ended, output: running.output() };
};
const newToken = async (): Promise<string> => (await askCoordinator(folder, { command: 'token', minutes: 1 })).token;

/** The ports that a worker listens on: of gRPC, and of sealed tcp links. */
function portsOf(pid: number): number[] {
  const lines = execFileSync('sh', ['-c', `cat /proc/${pid}/net/tcp; ls -l /proc/${pid}/fd`], { encoding: 'utf8' });
  const sockets = new Set([...lines.matchAll(/socket:\[(\d+)\]/g)].map((match) => match[1]));
  return lines
    .split('\n')
    .map((line) => line.trim().split(/\s+/))
    .filter((columns) => columns[3] === '0A' && sockets.has(columns[9]))
    .map((columns) => parseInt(columns[1]?.split(':')[1] ?? '', 16));
}

/** Whether a TLS server answers there within 300 ms; a tcp link says nothing to a stranger. */
const speaksTls = (port: number): Promise<boolean> =>
  new Promise((resolve) => {
    const socket = connectTls({ host: '127.0.0.1', port, rejectUnauthorized: false });
    const end = (answer: boolean): void => {
      socket.destroy();
      resolve(answer);
    };
    socket.on('secureConnect', () => end(true)).on('error', () => end(true));
    setTimeout(end, 300, false);
  });

async function gRpcPortOf(pid: number): Promise<number> {
  const ports = portsOf(pid);
  const tls = await Promise.all(ports.map(speaksTls));
  expect(tls.filter(Boolean)).toHaveLength(1);
  return ports[tls.indexOf(true)] ?? 0;
}

const codeOf = (stream: NodeJS.EventEmitter): Promise<number> =>
  new Promise((resolve) => stream.on('data', () => undefined).once('error', (error: { code: number }) => resolve(error.code)));

beforeAll(async () => {
  marked = mark();
  folder = join(marked.folder, 'mesh');
  port = await freePorts(3);
  const serving = startServe(
    ['--advertise', `127.0.0.1:${port}`, '--mesh', folder, '--local-workers', '1', '--tp', '2', '--link', 'grpc', ...small],
    {
      env: marked.env,
    },
  );
  await waitFor('the control socket', 30_000, () => existsSync(join(folder, 'control.sock')));
  firstFile = join(marked.folder, 'first', 'shardmesh', 'worker.json');
  const { output } = await command('enroll', '--mesh', folder);
  first = shardmesh(/^shardmesh (worker --enroll \S+)$/m.exec(output)?.[1]?.split(' ') ?? [], env('first'));
  served = await serving;
});
afterAll(async () => {
  await first?.kill('SIGKILL');
  await served?.stop();
  marked?.dispose();
});

describe('enrollment', () => {
  it('enrollment - a worker that ran the printed command serves tokens over TLS, and its key is in its own file only', async () => {
    expect((await complete(served, greedy)).choices[0]?.text).toContain('Paris');
    const credentials = readCredentials(firstFile);
    expect(statSync(firstFile).mode & 0o777).toBe(0o600);
    expect(credentials.url).toBe(`tls://127.0.0.1:${port}`);
    expect(served.events('worker_enrolled')[0]).toMatchObject({ worker: credentials.worker, host: hostname() });
    const kept = readFileSync(join(folder, 'mesh.json'), 'utf8') + readFileSync(join(folder, 'audit.log'), 'utf8');
    expect(kept).toContain(credentials.nkey);
    expect(kept).not.toContain(credentials.seed);
    expect(kept).not.toContain(credentials.tls?.key.split('\n')[1]);
    for (const name of ['mesh.json', 'audit.log', 'control.sock']) expect(statSync(join(folder, name)).mode & 0o077).toBe(0);
    const { output } = await command('enroll', '--mesh', folder, '--list');
    expect(output).toMatch(new RegExp(`^${credentials.worker} .*stage 0 rank [01]$`, 'm'));
  });

  it('enrollment - a token is good once, and for its own authority only', async () => {
    const token = await newToken();
    await enroll(token);
    await expect(enroll(token)).rejects.toThrow(/refused the enrollment: this token was used already/);
    const parsed = parseToken(await newToken());
    if (!parsed) throw new Error('not a token');
    const forged = { ...parsed, authoritySha256: Buffer.alloc(32) };
    await expect(enroll(tokenText(forged))).rejects.toThrow(/is not the coordinator that made this token/);
    await expect(enroll(tokenText({ ...parsed, secret: 'A'.repeat(43) }))).rejects.toThrow(/this token is not known here/);
    // What went wrong did not use it up.
    await expect(enroll(tokenText(parsed))).resolves.toMatchObject({ clockAheadMs: null });
    await expect(enroll(`${token.slice(0, -20)}`)).rejects.toMatchObject({ code: 'config_invalid' });
    const audit = readFileSync(join(folder, 'audit.log'), 'utf8');
    expect(audit).toMatch(/"enrollment_refused".*used already/);
  });

  it('enrollment - a stranger gets nothing: no certificate, an unknown nkey, another authority, plaintext', async () => {
    const own = readCredentials(firstFile);
    await expect(connectNats({ credentials: { ...own, seed: newUser().seed }, name: 'stranger' })).rejects.toThrow(
      /refused the credentials/,
    );
    const other = MeshAuthority.open(join(marked.folder, 'other'));
    const foreign = { ...other.identityOf(workerName(own.mesh, newWorkerId())), authority: own.tls?.authority ?? '' };
    await expect(connectNats({ credentials: { ...own, tls: foreign }, name: 'stranger' })).rejects.toMatchObject({
      code: 'broker_refused',
    });
    await expect(connectPlain({ servers: own.url.replace('tls', 'nats'), timeout: 1_000, reconnect: false })).rejects.toThrow();
    // The server speaks first in plaintext NATS; here it waits for a handshake and says nothing.
    const said = await new Promise<string>((resolve) => {
      const socket = createConnection({ host: '127.0.0.1', port }, () => setTimeout(() => socket.destroy(), 300));
      let text = '';
      socket.on('data', (part: Buffer) => (text += part.toString())).on('close', () => resolve(text));
    });
    expect(said).toBe('');
    for (const withoutCertificate of [port, port + 2, await gRpcPortOf(first.pid)])
      await expect(
        new Promise((_, reject) => {
          const socket = connectTls({
            host: '127.0.0.1',
            port: withoutCertificate,
            rejectUnauthorized: false,
            ALPNProtocols: ['h2'],
          });
          socket
            .on('error', reject)
            .on('close', () => reject(new Error('closed')))
            .on('data', () => undefined);
          socket.on('secureConnect', () => socket.write('PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'));
        }),
      ).rejects.toThrow(/certificate required|closed/);
    const plain = createGrpcClient(`127.0.0.1:${port + 2}`);
    expect(await codeOf(openWeightsFetch(plain, own.secret, own.worker ?? '', Buffer.from('{}'), 2_000))).toBe(
      status.UNAVAILABLE,
    );
    plain.close();
  });

  it('enrollment - a certificate opens what its name says and nothing else', async () => {
    const { credentials } = await enroll(await newToken());
    const { tls, mesh, secret, worker } = credentials;
    const weights = (caller: string): Promise<number> => {
      const client = createGrpcClient(`127.0.0.1:${port + 2}`, tls, coordinatorName(mesh));
      return codeOf(openWeightsFetch(client, secret, caller, Buffer.from('{}'), 2_000)).finally(() => client.close());
    };
    const other = readCredentials(firstFile).worker ?? '';
    // Its own name gets as far as the request, which is none.
    expect(await weights(worker ?? '')).toBe(status.INVALID_ARGUMENT);
    expect(await weights(other)).toBe(status.UNAUTHENTICATED);
    expect(await weights('coordinator')).toBe(status.UNAUTHENTICATED);
    const link = (caller: string, peerName: string): Promise<number> =>
      gRpcPortOf(first.pid).then((found) => {
        const client = createGrpcClient(`127.0.0.1:${found}`, tls, peerName);
        return codeOf(openLinkStream(client, secret, caller)).finally(() => client.close());
      });
    expect(await link(worker ?? '', workerName(mesh, other as WorkerId))).toBe(status.PERMISSION_DENIED);
    expect(await link(newWorkerId(), workerName(mesh, other as WorkerId))).toBe(status.UNAUTHENTICATED);
    // Who answers must be who was meant.
    expect(await link(worker ?? '', coordinatorName(mesh))).toBe(status.UNAVAILABLE);
    // And a worker's nkey is no coordinator's.
    const transport = await connectNats({ credentials: { ...credentials, role: 'coordinator', worker: null }, name: 'impostor' });
    await expect(transport.subscribe(meshSubjects(mesh).heartbeats(), () => undefined)).rejects.toMatchObject({
      code: 'permission_denied',
    });
    await transport.close();
  });

  it('enrollment - a revoked worker is cut off within a second, and stays out', async () => {
    const { worker } = readCredentials(firstFile);
    const lost = first.ended;
    const revokedAt = performance.now();
    const { output } = await command('enroll', '--mesh', folder, '--revoke', (worker ?? '').slice(0, 8));
    expect(output).toContain(`worker ${worker} is revoked`);
    const afterCommand = performance.now();
    await waitFor(
      'the mesh to miss it',
      1_000,
      () => served.events('worker_lost').some((event) => event['worker'] === worker),
      () => served.log(),
    );
    expect(performance.now() - afterCommand).toBeLessThan(1_000);
    expect(await lost).toBe(1);
    expect(performance.now() - revokedAt).toBeLessThan(6_000);
    expect(first.output()).toMatch(/Authorization|revoked/i);
    first = shardmesh(['worker'], env('first'));
    expect(await first.ended).toBe(1);
    expect(first.output()).toContain('are they of another mesh, or revoked?');
    expect((await command('enroll', '--mesh', folder, '--list')).output).toMatch(new RegExp(`^${worker} .* revoked$`, 'm'));
  });

  it('enrollment - the mesh serves again with another worker', async () => {
    const running = shardmesh(['worker', '--enroll', await newToken()], env('second'));
    first = running;
    await waitFor(
      'ready',
      20_000,
      async () => (await fetch(`${served.url}/readyz`)).status === 200,
      () => [served.log(), running.output()],
    );
    expect((await complete(served, greedy)).choices[0]?.text).toContain('Paris');
    const again = await command(
      'worker',
      '--enroll',
      await newToken(),
      '--credentials',
      join(marked.folder, 'second', 'shardmesh', 'worker.json'),
    );
    expect(again).toMatchObject({ code: 2, output: expect.stringContaining('this host is enrolled already') as string });
    const rival = await command('serve', '--advertise', `127.0.0.1:${port}`, '--mesh', folder, '--port', '0');
    expect(rival).toMatchObject({
      code: 2,
      output: expect.stringContaining('another shardmesh serve runs with --mesh') as string,
    });
  });
});
