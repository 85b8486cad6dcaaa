/**
 * `npm run bench:speculation -- [--rounds 5] [--streams 1] [--text "free text"] [--json] [--serve="--tp 2"]`: output tokens per second with and without drafts, on texts that repeat themselves
 * and on one that does not, interleaved: two meshes, one question to each in turn. The answers must be the same. Best, median and worst of the rounds.
 */
import { cpus } from 'node:os';
import { parseArgs } from 'node:util';
import { target } from './peers/measures.mjs';
import { startServe } from './peers/serve.mjs';

const { values } = parseArgs({
  options: {
    rounds: { type: 'string', default: '5' },
    streams: { type: 'string', default: '1' },
    serve: { type: 'string', default: '--tp 2' },
    text: { type: 'string', default: '' },
    json: { type: 'boolean', default: false },
  },
});

const code = `function total(items) {
  let sum = 0;
  for (let i = 0; i < items.length; i++) {
    if (items[i].price > 0 && items[i].count > 0) {
      sum = sum + items[i].price * items[i].count;
    }
  }
  return sum;
}

function average(items) {
  let sum = 0;
  let count = 0;
  for (let i = 0; i < items.length; i++) {
    if (items[i].price > 0 && items[i].count > 0) {
      sum = sum + items[i].price * items[i].count;
      count = count + items[i].count;
    }
  }
  return sum / count;
}`;
const article = `The river Aare rises in the great glaciers of the Bernese Alps and flows through the lakes of Brienz and Thun before it reaches the city of Bern,
which it encloses in a narrow loop. Below Bern it turns west, then north-east along the foot of the Jura, and takes up the waters of the Emme, the Reuss and the Limmat before it
joins the Rhine at Koblenz. At that point it carries more water than the Rhine itself. Its valley has been a road since Roman times; today it carries the main railway between
Zurich and Bern, several power stations, and most of the country's heavy industry. In summer thousands of people swim in it through the city of Bern, although its water is seldom warmer
than twenty degrees.`;
/** What is asked, and how. */
const texts = {
  'code edited': {
    content: `Rename the variable \`sum\` to \`amount\` in this code and print all of the code again:\n\n\`\`\`js\n${code}\n\`\`\``,
    temperature: 0,
  },
  'text summarised': { content: `Summarise this text in a few sentences, with its own words:\n\n${article}`, temperature: 0 },
  'free text': { content: 'Write a story about a lighthouse keeper who finds a letter in a bottle.', temperature: 0.9 },
};
const outputTokens = 192;

/** @returns tokens per second of `streams` requests that begin together, and their answers */
async function ask({ url, model }, { content, temperature }, round) {
  const began = performance.now();
  const answers = await Promise.all(
    Array.from({ length: Number(values.streams) }, async (_, stream) => {
      const answer = await fetch(`${url}/v1/chat/completions`, {
        method: 'POST',
        headers: { 'content-type': 'application/json' },
        body: JSON.stringify({
          ...{ model, temperature, seed: 100 * round + stream, ignore_eos: true, max_tokens: outputTokens },
          // A text of its own in each round and stream: nothing of its prompt is cached.
          messages: [{ role: 'user', content: `Note ${round}.${stream}. ${content}` }],
        }),
      });
      if (!answer.ok) throw new Error(`${answer.status}: ${await answer.text()}`);
      return (await answer.json()).choices[0].message.content;
    }),
  );
  return { tokensPerSecond: (answers.length * outputTokens) / ((performance.now() - began) / 1000), answers };
}

const args = values.serve.split(' ');
const meshes = {
  off: await startServe([...args, '--speculation', 'off']),
  auto: await startServe([...args, '--speculation', 'auto']),
};
const servers = { off: await target(meshes.off.url), auto: await target(meshes.auto.url) };
const rows = Object.keys(texts)
  .filter((text) => text.includes(values.text))
  .map((text) => ({ text, off: [], auto: [] }));
for (let round = 0; round <= Number(values.rounds); round++)
  for (const row of rows) {
    const answers = {};
    // Each goes first in every second round.
    for (const name of round % 2 ? ['off', 'auto'] : ['auto', 'off']) {
      const done = await ask(servers[name], texts[row.text], round);
      answers[name] = done.answers;
      if (round > 0) row[name].push(done.tokensPerSecond);
    }
    if (JSON.stringify(answers.off) !== JSON.stringify(answers.auto)) throw new Error(`${row.text}: drafts changed the answer`);
  }
const metrics = await (await fetch(`${meshes.auto.url}/metrics`)).text();
const counted = (name) => Number(new RegExp(`^shardmesh[^ ]*${name}[^ ]* (\\S+)`, 'm').exec(metrics)?.[1] ?? NaN);
const drafts = { tokens: counted('num_draft_tokens'), accepted: counted('num_accepted_tokens') };
await Promise.all(Object.values(meshes).map((mesh) => mesh.stop()));

if (values.json)
  console.log(
    JSON.stringify({
      cpu: cpus()[0]?.model,
      cores: cpus().length,
      serve: values.serve,
      streams: Number(values.streams),
      drafts,
      rows,
    }),
  );
else {
  const median = (list) => [...list].sort((a, b) => a - b)[list.length >> 1];
  const cell = (list) => `${Math.max(...list).toFixed(0)} (${median(list).toFixed(0)}, ${Math.min(...list).toFixed(0)})`;
  console.log(
    `serve ${values.serve}, ${values.streams} streams, tokens/s: best (median, worst) of ${values.rounds}; ${drafts.accepted} of ${drafts.tokens} drafted tokens accepted`,
  );
  console.log('| text | without drafts | with | ratio of medians |\n|---|---|---|---|');
  for (const { text, off, auto } of rows)
    console.log(`| ${text} | ${cell(off)} | ${cell(auto)} | ${(median(auto) / median(off)).toFixed(3)} |`);
}
