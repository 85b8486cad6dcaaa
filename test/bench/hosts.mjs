/**
 * `npm run bench:hosts -- [--rate 1gbit] [--streams 1,8] [--json]` (as root): a mesh whose workers are on hosts of their own, network namespaces behind interfaces that
 * `tc` shapes. Tokens per second, the share of a step in collectives, and what each token costs on the wire (counted by the interface of the second host, headers and
 * plans included), for tensor parallelism over sealed tcp with each wire type; and two stages, with the same on one host over shared memory beside. All "hosts" share
 * this machine's first two cores, one compute thread each, so the network is what is compared, not how much faster more hosts are.
 */
import { execFileSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { makeHosts, namespacesMissing } from '../hosts/network-namespaces.ts';
import { giveCoordinatorFiles, until, workerStarter } from './host-mesh.mjs';

const { values } = parseArgs({
  options: {
    rate: { type: 'string', default: '1gbit' },
    streams: { type: 'string', default: '1,8' },
    json: { type: 'boolean', default: false },
  },
});
const missing = namespacesMissing();
if (missing) throw new Error(missing);
const client = fileURLToPath(new URL('hosts-client.mjs', import.meta.url));
const cases = [
  { cut: ['--tp', '2'], hosts: 2, link: 'tcp', wires: ['f32', 'bf16', 'q8'] },
  { cut: ['--tp', '3'], hosts: 3, link: 'tcp', wires: ['f32', 'bf16', 'q8'] },
  { cut: ['--pp', '2'], hosts: 2, link: 'tcp', wires: ['f32', 'q8'] },
  { cut: ['--pp', '2'], hosts: 1, link: 'shm', wires: ['f32'] },
];

const network = makeHosts(3);
const rows = [];
try {
  const [a, ...others] = network.hosts;
  for (const { namespace } of network.hosts)
    execFileSync('tc', [
      '-n',
      namespace,
      'qdisc',
      'add',
      'dev',
      'eth0',
      'root',
      'tbf',
      'rate',
      values.rate,
      'burst',
      '256kb',
      'latency',
      '20ms',
    ]);
  await giveCoordinatorFiles(a);
  const startWorker = workerStarter(a);

  for (const { cut, hosts, link, wires } of cases)
    for (const wire of wires) {
      const local = cut[0] === '--pp' && hosts === 1 ? '2' : '1';
      const small = [
        '--context-tokens-max',
        '512',
        '--kv-cache-bytes',
        '64m',
        '--speculation',
        'off',
        '--log-level',
        'error',
        '--port',
        '0',
      ];
      const serve = a.shardmesh(
        'serve',
        '--advertise',
        a.address,
        '--local-workers',
        local,
        '--link',
        link,
        '--wire',
        wire,
        '--cores',
        hosts > 1 ? '0' : '0,1',
        ...cut,
        ...small,
      );
      const workers = [];
      if (hosts > 1) await until('the broker', () => /waiting for \d of \d workers/.test(serve.output()), serve.output);
      for (const [index, host] of others.slice(0, hosts - 1).entries()) {
        workers.push(await startWorker(host, ['--cores', String((index + 1) % 2)]));
      }
      const said = () => [serve, ...workers].map((one) => one.output()).join('\n');
      await until('the mesh', () => /^shardmesh ready /m.test(serve.output()), said);
      const url = /^shardmesh ready (\S+)/m.exec(serve.output())[1];
      for (const streams of values.streams.split(',')) {
        const before = others[0].bytesSent();
        const { code, output } = await a.answer(a.run(process.execPath, [client, url, streams]));
        if (code !== 0) throw new Error(`${output}\n${said()}`);
        const figures = JSON.parse(output);
        rows.push({
          cut: cut.join(' ').replace('--', ''),
          hosts,
          link,
          wire,
          streams: Number(streams),
          ...figures,
          bytesPerToken: (others[0].bytesSent() - before) / figures.tokens,
        });
      }
      for (const { child, ended } of [...workers, serve]) {
        child.kill('SIGTERM');
        await ended;
      }
    }
} finally {
  await network.close();
}

if (values.json) console.log(JSON.stringify({ rate: values.rate, rows }));
else {
  console.log(
    `${values.rate} between hosts\n\n| cut | link | wire | streams | tokens/s | share of a step in collectives | KB a token from the second host |\n|---|---|---|---|---|---|---|`,
  );
  for (const { cut, hosts, link, wire, streams, tokensPerSecond, syncShare, bytesPerToken } of rows)
    console.log(
      `| ${cut}, ${hosts} host${hosts > 1 ? 's' : ''} | ${link} | ${wire} | ${streams} | ${tokensPerSecond.toFixed(0)} | ${(syncShare * 100).toFixed(0)} % | ${(bytesPerToken / 1_000).toFixed(1)} |`,
    );
}
