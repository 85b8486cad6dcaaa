/** Three hosts: a coordinator with one worker, a worker that enrolls, a stranger. Different users, different namespaces, one bridge; the real processes and model. */
import { dirname } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { findNatsServer } from '../../coordinator/mesh/nats-server.ts';
import { findModel } from '../../deploy/cli/find-model.ts';
import { defaultCacheDirectory } from '../../kernels/model-file/cache-directory.ts';
import { waitFor } from '../integration/helpers/processes.ts';
import { makeHosts, namespacesMissing, type Host, type HostProcess, type Hosts } from './network-namespaces.ts';

const missing = namespacesMissing();
if (missing) console.info(`hosts: skipped, ${missing}`);

const small = ['--context-tokens-max', '512', '--kv-cache-bytes', '64m', '--log-level', 'info'];

describe.skipIf(missing !== null)('hosts', () => {
  let network: Hosts;
  let a: Host;
  let b: Host;
  let c: Host;
  let serve: HostProcess;
  let worker: HostProcess;

  const ready = (since = 0): Promise<number> =>
    waitFor(
      'the mesh to serve',
      60_000,
      () => /epoch_serving/.test(serve.output().slice(since)) && /^shardmesh ready /m.test(serve.output()),
      () => [serve.output(), worker.output()],
    );
  const token = async (): Promise<string> => {
    const { output } = await a.answer(a.shardmesh('enroll'));
    return /--enroll (\S+)$/m.exec(output)?.[1] ?? `no token: ${output}`;
  };
  /** A completion, asked for on host A. */
  const completed = async (): Promise<string> => {
    const url = /^shardmesh ready (\S+)/m.exec(serve.output())?.[1];
    const body = JSON.stringify({
      prompt: 'The capital of France is',
      max_tokens: 8,
      temperature: 0,
      model: 'smollm2-135m-instruct-q4_1',
    });
    const script = `fetch('${url}/v1/completions', { method: 'POST', headers: { 'content-type': 'application/json' }, body: ${JSON.stringify(body)} }).then((answer) => answer.text()).then(console.log)`;
    return (await a.answer(a.run(process.execPath, ['-e', script]))).output;
  };
  const startServe = async (link: 'grpc' | 'tcp', cut: string[]): Promise<void> => {
    serve = a.shardmesh(
      'serve',
      '--advertise',
      a.address,
      '--local-workers',
      '1',
      '--port',
      '0',
      '--link',
      link,
      ...cut,
      ...small,
    );
    await waitFor(
      'the broker',
      30_000,
      () => /waiting for \d of 2 workers/.test(serve.output()),
      () => serve.output(),
    );
  };

  beforeAll(async () => {
    network = makeHosts(3);
    [a, b, c] = network.hosts as [Host, Host, Host];
    const model = await findModel('smollm2-135m-instruct-q4_1');
    a.give(model, model.slice(defaultCacheDirectory().length));
    for (const host of [a, c]) host.give(dirname((await findNatsServer()).path), 'nats-server/given');
    await startServe('grpc', ['--pp', '2']);
  });
  afterAll(async () => {
    await network?.close();
  });

  it('hosts - a worker of another host and user enrolls, fetches its slice, and serves a stage over TLS', async () => {
    worker = b.shardmesh('worker', '--enroll', await token());
    await ready();
    expect(await completed()).toContain('Paris');
    const list = await a.answer(a.shardmesh('enroll', '--list'));
    expect(list.output).toContain(b.address);
    const doctor = await b.answer(b.shardmesh('doctor', '--json'));
    expect(doctor.output).toMatch(/"what": "worker certificate",\s+"status": "ok"/);
    expect(doctor.output).toMatch(/"what": "clock skew",\s+"status": "ok"/);
  });

  it('hosts - a stranger on the network gets nothing from any port, and a used token no second worker', async () => {
    const spent = await token();
    const first = c.shardmesh('worker', '--enroll', spent, '--credentials', `${c.home}/spare.json`);
    await waitFor(
      'a spare worker',
      20_000,
      () => /enrolled as worker/.test(first.output()),
      () => first.output(),
    );
    const second = await c.answer(c.shardmesh('worker', '--enroll', spent, '--credentials', `${c.home}/other.json`));
    expect(second).toMatchObject({ code: 1, output: expect.stringContaining('this token was used already') as string });
    first.child.kill('SIGKILL');
    const probe = `
      const { connect } = require('node:tls');
      const ask = (port) => new Promise((resolve) => {
        const socket = connect({ host: '${a.address}', port, rejectUnauthorized: false }, () => socket.write('x'));
        socket.on('error', (error) => resolve(error.code)).on('close', () => resolve('closed')).on('data', () => resolve('data'));
      });
      Promise.all([7422, 7424].map(ask)).then((answers) => console.log(answers.join(' ')));`;
    const answers = (await c.answer(c.run(process.execPath, ['-e', probe]))).output.trim().split(' ');
    expect(answers).toHaveLength(2);
    for (const answer of answers) expect(answer).toMatch(/CERTIFICATE_REQUIRED|closed|ECONNRESET/);
    await c.answer(c.shardmesh('keys', '--workers', '1', '--out', `${c.home}/keys`));
    const plain = await c.answer(
      c.shardmesh('worker', '--credentials', `${c.home}/keys/worker-1.json`, '--nats', `nats://${a.address}:7422`),
    );
    expect(plain).toMatchObject({ code: 2, output: expect.stringContaining('plaintext is refused there') as string });
    const open = await c.answer(c.shardmesh('serve', '--host', c.address));
    expect(open).toMatchObject({ code: 2, output: expect.stringContaining('needs API keys') as string });
  });

  it('hosts - tp 2 across hosts over sealed tcp links, after a restart of serve, with the credentials that are there', async () => {
    serve.child.kill('SIGTERM');
    await serve.ended;
    await startServe('tcp', ['--tp', '2']);
    await ready();
    expect(await completed()).toContain('Paris');
  });

  it('hosts - a revoked worker is cut off within a second', async () => {
    const id = /enrolled as worker (\w+)/.exec(worker.output())?.[1] ?? '';
    const before = serve.output().length;
    expect((await a.answer(a.shardmesh('enroll', '--revoke', id))).output).toContain('is revoked');
    await waitFor(
      'the mesh to miss it',
      1_000,
      () => serve.output().slice(before).includes('was revoked'),
      () => serve.output(),
    );
    expect(await worker.ended).toBe(1);
    const again = await b.answer(b.shardmesh('worker'));
    expect(again).toMatchObject({ code: 1, output: expect.stringContaining('are they of another mesh, or revoked?') as string });
  });
});
