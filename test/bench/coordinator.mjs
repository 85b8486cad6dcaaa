/**
 * `npm run bench:coordinator -- [--streams 512] [--seconds 10] [--clients 1] [--json]`: how many tokens a second the coordinator can schedule, turn into text and
 * write as server-sent events, when computing costs nothing. Real NATS, real HTTP; the worker is `stand-in-worker.mjs`, the clients are `sse-clients.mjs`.
 * Says what each process took of the CPU. With `--serve --step-ms 8` it only serves, a step every 8 ms: load tools of different makes should say the same of it.
 */
import { fork, spawn, spawnSync } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const { values } = parseArgs({
  options: {
    streams: { type: 'string', default: '512' },
    seconds: { type: 'string', default: '10' },
    clients: { type: 'string', default: '1' },
    'prompt-tokens': { type: 'string', default: '16' },
    'output-tokens': { type: 'string', default: '256' },
    'step-ms': { type: 'string', default: '0' },
    serve: { type: 'boolean', default: false },
    json: { type: 'boolean', default: false },
    help: { type: 'boolean', default: false },
  },
});
if (values.help) {
  console.log(
    `npm run bench:coordinator -- [--streams 512] [--seconds 10] [--clients 1] [--prompt-tokens 16] [--output-tokens 256] [--json]
or, to hold load tools against each other:  npm run bench:coordinator -- --serve [--step-ms 8] [--streams 16]`,
  );
  process.exit(0);
}
const [streams, seconds, clients, promptTokens, outputTokens] = [
  'streams',
  'seconds',
  'clients',
  'prompt-tokens',
  'output-tokens',
].map((name) => Number(values[name]));
const here = (path) => fileURLToPath(new URL(path, import.meta.url));
const cli = here('../../dist/deploy/cli/main.js');
const folder = mkdtempSync(join(tmpdir(), 'bench-coordinator-'));
const children = [];
process.on('exit', () => {
  for (const child of children) child.kill('SIGKILL');
  rmSync(folder, { recursive: true, force: true });
});
for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => process.exit(1));

const freePort = () =>
  new Promise((resolve) => {
    const server = createServer().listen(0, '127.0.0.1', () => {
      const { port } = server.address();
      server.close(() => resolve(port));
    });
  });

/** CPU seconds of a process so far: its event loop's thread, and all threads. */
function cpuOf(pid) {
  let all = 0;
  for (const thread of readdirSync(`/proc/${pid}/task`))
    all += Number(readFileSync(`/proc/${pid}/task/${thread}/schedstat`, 'latin1').split(' ')[0]) / 1e9;
  return { loop: Number(readFileSync(`/proc/${pid}/task/${pid}/schedstat`, 'latin1').split(' ')[0]) / 1e9, all };
}

const { findNatsServer } = await import('../../dist/coordinator/mesh/nats-server.js');
const natsPort = await freePort();
const keys = spawnSync(
  process.execPath,
  [cli, 'keys', '--workers', '1', '--out', join(folder, 'mesh'), '--nats-port', String(natsPort)],
  { encoding: 'utf8' },
);
if (keys.status !== 0) throw new Error(keys.stderr);
const natsServer = await findNatsServer();
const broker = spawn(natsServer.path, ['-c', join(folder, 'mesh', 'nats-server.conf')], { stdio: 'ignore' });
children.push(broker);

const blocksEach = Math.ceil((promptTokens + outputTokens) / 16) + 1;
const stand = spawn(
  process.execPath,
  [here('stand-in-worker.mjs'), join(folder, 'mesh', 'worker-1.json'), String(streams * blocksEach + 1_024), values['step-ms']],
  { stdio: ['ignore', 'ignore', 'inherit'] },
);
children.push(stand);
stand.once('exit', (code) => {
  console.error(`bench:coordinator: the stand-in worker ended with exit code ${code}`);
  process.exit(1);
});
const coordinator = spawn(
  process.execPath,
  [
    cli,
    'serve',
    '--port',
    '0',
    '--log-level',
    'error',
    '--credentials',
    join(folder, 'mesh', 'coordinator.json'),
    '--sequences-max',
    String(streams),
    '--step-tokens-max',
    String(Math.max(512, streams)),
  ],
  { stdio: ['ignore', 'pipe', 'inherit'] },
);
children.push(coordinator);
const [, port, model] = await new Promise((resolve, reject) => {
  let text = '';
  coordinator.stdout.on('data', (data) => {
    text += data;
    const match = /ready http:\/\/[^:]+:(\d+) model=(\S+)/.exec(text);
    if (match) resolve(match);
  });
  coordinator.once('exit', (code) => reject(new Error(`the coordinator ended with exit code ${code}`)));
});

if (values.serve) {
  console.log(`http://127.0.0.1:${port} model=${model}`);
  await new Promise(() => undefined);
}

const swarm = Array.from({ length: clients }, (_, index) => {
  const share = Math.floor(((index + 1) * streams) / clients) - Math.floor((index * streams) / clients);
  const child = fork(here('sse-clients.mjs'), [
    JSON.stringify({ port: Number(port), model, streams: share, promptTokens, outputTokens }),
  ]);
  children.push(child);
  return child;
});
const ask = (child) =>
  new Promise((resolve, reject) => {
    child.once('message', (answer) => (answer.error ? reject(new Error(answer.error)) : resolve(answer)));
    child.send('count');
  });
const read = async () => {
  const answers = await Promise.all(swarm.map(ask));
  const sum = (name) => answers.reduce((total, answer) => total + answer[name], 0);
  return {
    at: performance.now(),
    tokens: sum('tokens'),
    refused: sum('refused'),
    clients: sum('cpuSeconds'),
    coordinator: cpuOf(coordinator.pid),
    broker: cpuOf(broker.pid).all,
    worker: cpuOf(stand.pid).all,
  };
};
// Everyone has a stream by then.
await new Promise((resolve) => setTimeout(resolve, 2_000 + streams * 4));
const before = await read();
await new Promise((resolve) => setTimeout(resolve, seconds * 1_000));
const after = await read();
const tokens = after.tokens - before.tokens;
const elapsed = (after.at - before.at) / 1e3;
const microseconds = (used) => Math.round((used / tokens) * 1e7) / 10;
const figures = {
  streams,
  outputTokens,
  tokensPerSecond: Math.round(tokens / elapsed),
  refusedRequests: after.refused - before.refused,
  cpuMicrosecondsPerToken: {
    coordinatorEventLoop: microseconds(after.coordinator.loop - before.coordinator.loop),
    coordinator: microseconds(after.coordinator.all - before.coordinator.all),
    broker: microseconds(after.broker - before.broker),
    standInWorker: microseconds(after.worker - before.worker),
    clients: microseconds(after.clients - before.clients),
  },
};
if (values.json) console.log(JSON.stringify(figures));
else {
  console.log(`${figures.tokensPerSecond} tokens/s through SSE at ${streams} streams; CPU microseconds a token:`);
  for (const [name, value] of Object.entries(figures.cpuMicrosecondsPerToken))
    console.log(`  ${name.padEnd(22)}${String(value).padStart(8)}`);
}
process.exit(0);
