/** `node hosts-client.mjs URL STREAMS`, inside a namespace: decodes twice and takes a trace beside; prints { tokensPerSecond, tokens, syncShare }. */
import { decode, target } from './peers/measures.mjs';

const [url, streams] = [process.argv[2], Number(process.argv[3])];
const server = await target(url);
const output = streams === 1 ? 128 : 64;
await decode(server, streams, 16);
const runs = [await decode(server, streams, output), await decode(server, streams, output)];
const traced = decode(server, streams, output);
await new Promise((resolve) => setTimeout(resolve, 400));
const response = await fetch(`${url}/trace`, {
  method: 'POST',
  headers: { 'content-type': 'application/json' },
  body: JSON.stringify({ milliseconds: 700 }),
});
const { summary } = await response.json();
await traced;
const first = summary.find(({ name }) => name === 'worker 0.0');
const span = (name) => first.spans.find((one) => one.name === name)?.usPerStep ?? 0;
console.log(
  JSON.stringify({
    tokensPerSecond: Math.max(...runs),
    tokens: streams * (16 + 3 * output),
    syncShare: (span('reduce') + span('gather rows') + span('gather logits')) / span('step'),
  }),
);
