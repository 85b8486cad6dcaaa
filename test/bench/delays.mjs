/**
 * `npm run bench:delays -- [options]` (as root): stages on hosts that are far apart. Coordinator and workers are in network namespaces of their own; everything between
 * them, NATS and gRPC alike, goes through a relay (delay-relay.py) that holds each byte for a while. Beside it the same stages on one host over shared memory. All
 * share this machine's first two cores, the relay too.
 */
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { makeHosts, namespacesMissing } from '../hosts/network-namespaces.ts';
import { giveCoordinatorFiles, until, workerStarter } from './host-mesh.mjs';

const { values } = parseArgs({
  options: {
    delays: { type: 'string', default: '0.5,2,10' },
    streams: { type: 'string', default: '1,4,16' },
    stages: { type: 'string', default: '2,3' },
    wires: { type: 'string', default: 'f32' },
    'steps-in-flight': { type: 'string', default: 'designed' },
    json: { type: 'boolean', default: false },
    help: { type: 'boolean', default: false },
  },
});
if (values.help) {
  console.log(`npm run bench:delays -- [options]

  --delays LIST            one way, milliseconds (0.5,2,10)
  --streams LIST           sequences that decode together (1,4,16)
  --stages LIST            (2,3)
  --wires LIST             f32, bf16, q8 (f32)
  --steps-in-flight LIST   1, or designed (designed)
  --json                   one JSON object

Example: npm run bench:delays -- --delays 2 --stages 2 --streams 4,16,64 --steps-in-flight 1,designed`);
  process.exit(0);
}
const missing = namespacesMissing();
if (missing) throw new Error(missing);
const list = (text) => text.split(',');
const relayScript = fileURLToPath(new URL('delay-relay.py', import.meta.url));
const meshPort = 7422;
const workerPort = 7500;

const network = makeHosts(Math.max(...list(values.stages).map(Number)) + 2);
const [coordinator, relay, ...others] = network.hosts;
const startWorker = workerStarter(coordinator);
const rows = [];
try {
  await giveCoordinatorFiles(coordinator);
  for (const stages of list(values.stages).map(Number)) {
    await measure({ stages, delay: null, wire: 'f32', inFlight: 'designed' });
    for (const delay of list(values.delays).map(Number))
      for (const wire of list(values.wires))
        for (const inFlight of list(values['steps-in-flight'])) await measure({ stages, delay, wire, inFlight });
  }
} finally {
  await network.close();
}

/** `delay` null: all workers on the coordinator's host, over shared memory. */
async function measure({ stages, delay, wire, inFlight }) {
  const far = delay !== null;
  const hosts = far ? others.slice(0, stages) : [];
  const routes = [0, 1, 2].map((offset) => `${meshPort + offset}=${coordinator.address}:${meshPort + offset}`);
  for (const [index, host] of hosts.entries()) routes.push(`${workerPort + index}=${host.address}:${workerPort + index}`);
  const started = [];
  if (far) {
    started.push(relay.run('/usr/bin/python3', [relayScript, String(delay), ...routes]));
    await until('the relay', () => /relay ready/.test(started[0].output()), started[0].output);
  }
  const serve = coordinator.shardmesh(
    'serve',
    ...['--pp', String(stages), '--wire', wire, '--speculation', 'off', '--port', '0', '--log-level', 'error'],
    ...['--context-tokens-max', '512', '--kv-cache-bytes', '64m'],
    ...(inFlight === 'designed' ? [] : ['--steps-in-flight', inFlight]),
    ...(far
      ? ['--advertise', `${relay.address}:${meshPort}`, '--local-workers', '0', '--link', 'grpc']
      : ['--link', 'shm', '--cores', '0,1']),
  );
  started.push(serve);
  if (far) await until('the broker', () => /waiting for \d of \d workers/.test(serve.output()), serve.output);
  for (const [index, host] of hosts.entries()) {
    const at = ['--advertise', `${relay.address}:${workerPort + index}`, '--cores', String(index % 2)];
    started.push(await startWorker(host, at));
  }
  const said = () => started.map((one) => one.output()).join('\n');
  await until('the mesh', () => /^shardmesh ready /m.test(serve.output()), said);
  const url = /^shardmesh ready (\S+)/m.exec(serve.output())[1];
  for (const streams of list(values.streams)) {
    const { code, output } = await coordinator.answer(
      coordinator.shardmesh(
        'bench',
        ...['--url', url, '--streams', streams, '--requests', String(2 * Number(streams)), '--warm-up', streams],
        ...['--prompt-tokens', '16', '--output-tokens', '96', '--result', '-'],
      ),
    );
    if (code !== 0) throw new Error(`${output}\n${said()}`);
    const { figures, mesh } = JSON.parse(output.slice(output.indexOf('{'))).runs[0];
    const perToken = (name) => mesh.shards.reduce((sum, shard) => sum + shard[name], 0) / mesh.generationTokensPerStep;
    rows.push({
      stages,
      delayMs: delay,
      wire,
      inFlight,
      streams: Number(streams),
      tokensPerSecond: (Number(streams) * 1_000) / figures.tpotMs.p50,
      bubbleRatio: mesh.bubbleRatio,
      bytesPerToken: perToken('bytesPerStep'),
      messagesPerToken: perToken('messagesPerStep'),
    });
  }
  for (const { child, ended } of started.reverse()) {
    child.kill('SIGTERM');
    await ended;
  }
}

if (values.json) console.log(JSON.stringify({ rows }));
else {
  console.log(
    '| stages | one way | wire | steps in flight | streams | tokens/s | of shared memory | bubbles | KB a token | messages a token |\n|---|---|---|---|---|---|---|---|---|---|',
  );
  for (const row of rows) {
    const near = rows.find(
      ({ stages, streams, delayMs }) => delayMs === null && stages === row.stages && streams === row.streams,
    );
    const { stages, delayMs, wire, inFlight, streams, tokensPerSecond, bubbleRatio, bytesPerToken, messagesPerToken } = row;
    console.log(
      `| ${stages} | ${delayMs === null ? 'shared memory' : `${delayMs} ms`} | ${wire} | ${inFlight} | ${streams} | ${tokensPerSecond.toFixed(0)} | ${((100 * tokensPerSecond) / near.tokensPerSecond).toFixed(0)} % | ${(100 * bubbleRatio).toFixed(0)} % | ${(bytesPerToken / 1e3).toFixed(1)} | ${messagesPerToken.toFixed(2)} |`,
    );
  }
}
