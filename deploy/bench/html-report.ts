/** A result as one page that needs nothing else: styles, script and uPlot are inside. `report-page.ts` draws what can be plotted. */
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';
import type { ShardFigures } from './mesh-figures.ts';
import type { Quantiles } from './quantiles.ts';
import type { BenchResult, BenchRun } from './result.ts';
import { reportScript, reportStyle } from './report-page.ts';
import { milliseconds, warnings } from './text-report.ts';
import { curvePercentiles } from './series.ts';

/** One for each run, in order; the page begins again when there are more runs. Told apart by people who do not see all colours, too. */
export const runColours = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9'];

const colourOf = (run: number): string => runColours[run % runColours.length] ?? '#000';

const escape = (text: string): string => text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('"', '&quot;');
const percent = (share: number): string => `${(100 * share).toFixed(1)} %`;

export function htmlReport(result: BenchResult): string {
  const uplot = createRequire(import.meta.url).resolve('uplot/dist/uPlot.iife.min.js');
  const uplotStyle = readFileSync(fileURLToPath(new URL('uPlot.min.css', `file://${uplot}`)), 'utf8');
  // Names come from a server: nothing in them may end the script.
  const data = JSON.stringify({
    percentiles: curvePercentiles,
    runs: result.runs.map(({ load, series }, run) => ({ load, series, colour: colourOf(run) })),
  }).replaceAll('<', '\\u003c');
  return `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>shardmesh bench: ${escape(result.model)}</title>
<style>${uplotStyle}${reportStyle}</style>
<body>
<header>
<h1>${escape(result.model)}</h1>
<p>${escape(result.url)} · ${escape(result.startedAt.slice(0, 16).replace('T', ' '))} UTC · ${escape(result.workload)} · seed ${result.seed}<br>
client: ${escape(result.client.cpu)}, ${result.client.cores} cores, Node ${escape(result.client.node)}</p>
</header>
<section class="cards">${result.runs.map(card).join('')}</section>
<section class="plots" id="plots"></section>
<section><h2>Latency, milliseconds</h2>${quantileTable(result.runs)}</section>
${result.runs.map(mesh).join('')}
<script>${readFileSync(uplot, 'utf8')}</script>
<script>const bench = ${data};
${reportScript}</script>
</body>
</html>
`;
}

function card({ load, figures }: BenchRun, run: number): string {
  const big = (value: string, unit: string): string => `<div><b>${value}</b><span>${unit}</span></div>`;
  const notes = warnings(figures);
  return `<article style="--run:${colourOf(run)}">
<h2>${escape(load)}</h2>
<div class="figures">
${big(figures.outputTokensPerSecond.toFixed(1), 'output tokens/s')}
${big(figures.promptTokensPerSecond.toFixed(0), 'input tokens/s')}
${big(figures.requestsPerSecond.toFixed(2), 'requests/s')}
${figures.ttftMs ? big(milliseconds(figures.ttftMs.p50), 'ms TTFT, median') : ''}
${figures.itlMs ? big(milliseconds(figures.itlMs.p50), 'ms between tokens, median') : ''}
${figures.goodput ? big(percent(figures.goodput.share), 'within the objectives') : ''}
</div>
<p>${figures.requests} requests in ${figures.seconds.toFixed(1)} s, ${figures.failed} failed; the client took ${percent(figures.clientCpuShare)} of a core</p>
${notes.length > 0 ? `<ul>${notes.map((note) => `<li>${escape(note)}</li>`).join('')}</ul>` : ''}
</article>`;
}

function quantileTable(runs: readonly BenchRun[]): string {
  const row = (run: number, name: string, q: Quantiles | null): string =>
    q === null
      ? ''
      : `<tr><td><i style="background:${colourOf(run)}"></i>${escape(runs[run]?.load ?? '')}</td><td>${name}</td>${[
          q.mean,
          q.p50,
          q.p90,
          q.p99,
          q.max,
        ]
          .map((value) => `<td class="number">${milliseconds(value)}</td>`)
          .join('')}</tr>`;
  const rows = runs.map(({ figures }, run) =>
    [
      row(run, 'time to first token', figures.ttftMs),
      row(run, 'between tokens', figures.itlMs),
      row(run, 'per token of a request', figures.tpotMs),
      row(run, 'end to end', figures.e2eMs),
    ].join(''),
  );
  return `<table><tr><th>load<th><th class="number">mean<th class="number">p50<th class="number">p90<th class="number">p99<th class="number">max</tr>${rows.join('')}</table>`;
}

/** Where a shard's time went, milliseconds a step. */
const shardParts = ({ stepMs, syncMs, linkWaitMs, idleMs }: ShardFigures): [name: string, ms: number][] => [
  ['compute', Math.max(0, stepMs - syncMs)],
  ['sync', syncMs],
  ['link', linkWaitMs],
  ['idle', idleMs],
];

function mesh({ load, mesh: figures }: BenchRun, run: number): string {
  if (!figures) return '';
  const widest = Math.max(...figures.shards.map((shard) => shardParts(shard).reduce((sum, [, ms]) => sum + ms, 0)), 1e-9);
  const bars = figures.shards.map((shard) => {
    const parts = shardParts(shard);
    const bar = parts
      .map(([name, ms]) => `<span class="${name}" style="width:${((100 * ms) / widest).toFixed(2)}%"></span>`)
      .join('');
    const said = parts.map(([name, ms]) => `${name} ${ms.toFixed(2)}`).join(', ');
    const sent =
      shard.messagesPerStep === 0
        ? 'shared memory only'
        : `${(shard.bytesPerStep / 1024).toFixed(1)} KiB in ${shard.messagesPerStep.toFixed(1)} messages a step`;
    return `<tr><td>stage ${shard.stage} rank ${shard.rank}</td><td class="bar"><div>${bar}</div><small>${said} ms a step; ${sent}; ${(shard.rssBytes / 1024 ** 2).toFixed(0)} MiB</small></td></tr>`;
  });
  const level = ({ mean, max }: { mean: number; max: number }): string => `${mean.toFixed(1)} (at most ${max})`;
  return `<section><h2><i style="background:${colourOf(run)}"></i>Mesh at ${escape(load)}</h2>
<p>${figures.steps} steps of ${figures.stepMs.toFixed(2)} ms with ${figures.generationTokensPerStep.toFixed(2)} output tokens each · bubble ${percent(figures.bubbleRatio)} ·
running ${level(figures.running)}, waiting ${level(figures.waiting)} · KV use ${percent(figures.kvUsage.mean)} (at most ${percent(figures.kvUsage.max)}) ·
${figures.cachedTokens} prompt tokens from the cache, ${figures.promptTokens} computed · ${figures.preemptions} preemptions · ${figures.draftTokensAccepted} of ${figures.draftTokens} draft tokens right</p>
<p class="key"><span class="compute"></span>compute<span class="sync"></span>waiting in reductions<span class="link"></span>waiting for the stage before<span class="idle"></span>idle</p>
<table class="bars">${bars.join('')}</table></section>`;
}
