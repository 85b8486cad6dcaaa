/**
 * `npm run bench:plan -- [--rounds 3] [--json]`: what `shardmesh plan` predicts for some placements beside what they then do over HTTP, one stream and eight. Plan and
 * measurement of a placement follow one another, so that both meet the machine in the same mood; each has the best of its rounds.
 */
import { execFile } from 'node:child_process';
import { cpus } from 'node:os';
import { fileURLToPath } from 'node:url';
import { parseArgs, promisify } from 'node:util';
import { decodeAlone, target } from './peers/measures.mjs';
import { startServe } from './peers/serve.mjs';

const { values } = parseArgs({
  options: { rounds: { type: 'string', default: '3' }, json: { type: 'boolean', default: false } },
});
const cli = fileURLToPath(new URL('../../dist/deploy/cli/main.js', import.meta.url));
const placements = [
  '--tp 1',
  '--tp 1 --cores 0',
  '--tp 2',
  '--tp 3:2:1',
  '--tp 3',
  '--pp 2',
  '--pp 10:20',
  '--pp 3',
  '--tp 2 --pp 2',
  '--tp 2 --link tcp',
  '--tp 2 --link grpc',
];

const rows = placements.map((placement) => ({ placement, predicted: [0, 0], measured: [0, 0] }));
const keepBest = (list, index, value) => (list[index] = Math.max(list[index], value));
for (let round = 0; round < Number(values.rounds); round++)
  for (const { placement, predicted, measured } of rows) {
    const args = placement.split(' ');
    const { stdout } = await promisify(execFile)(process.execPath, [cli, 'plan', '--json', ...args], { maxBuffer: 1 << 26 });
    const { asked } = JSON.parse(stdout);
    keepBest(predicted, 0, asked.oneStream.tokensPerSecond);
    keepBest(predicted, 1, asked.eightStreams.tokensPerSecond);
    const mesh = await startServe(args);
    const server = await target(mesh.url);
    await decodeAlone(server, 1, 64);
    keepBest(measured, 0, await decodeAlone(server, 1, 128));
    keepBest(measured, 1, await decodeAlone(server, 8, 64));
    await mesh.stop();
  }

if (values.json) console.log(JSON.stringify({ cpu: cpus()[0]?.model, cores: cpus().length, rows }));
else {
  console.log(
    '| placement | one stream: predicted, measured | off by | eight: predicted, measured | off by |\n|---|---|---|---|---|',
  );
  const cells = (predicted, measured) =>
    `${predicted.toFixed(0)}, ${measured.toFixed(0)} | ${((predicted / measured - 1) * 100).toFixed(0)} %`;
  for (const { placement, predicted, measured } of rows)
    console.log(`| \`${placement}\` | ${cells(predicted[0], measured[0])} | ${cells(predicted[1], measured[1])} |`);
}
