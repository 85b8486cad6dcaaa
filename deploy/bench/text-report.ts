/** A result as tables for a terminal. */
import { table } from '../cli/table.ts';
import type { Figures } from './figures.ts';
import type { Level, MeshFigures } from './mesh-figures.ts';
import type { Quantiles } from './quantiles.ts';
import type { BenchResult, BenchRun } from './result.ts';

const fixed = (value: number, digits: number): string => value.toFixed(digits);
const percent = (share: number): string => `${fixed(100 * share, 1)} %`;
/** Three digits that mean something, whatever the size. */
export const milliseconds = (value: number): string => fixed(value, value >= 100 ? 0 : value >= 10 ? 1 : 2);

export function textReport(result: BenchResult): string {
  const { runs } = result;
  const lines = [`${result.model} at ${result.url}`, `${result.workload}; seed ${result.seed}`, ''];
  const head = ['load', 'seconds', 'requests', 'failed', 'requests/s', 'output tok/s', 'input tok/s', 'goodput', 'client CPU'];
  lines.push(...table(head, runs.map(rateRow)), '');
  const quantileRows = runs.flatMap(({ load, figures }) =>
    (
      [
        ['TTFT', figures.ttftMs],
        ['inter-token', figures.itlMs],
        ['per token', figures.tpotMs],
        ['end to end', figures.e2eMs],
      ] as const
    ).flatMap(([name, quantiles]) => (quantiles ? [[load, name, ...quantileCells(quantiles)]] : [])),
  );
  if (quantileRows.length > 0)
    lines.push(...table(['load', 'milliseconds', 'mean', 'p50', 'p90', 'p99', 'max'], quantileRows), '');
  for (const run of runs) lines.push(...notes(run));
  for (const { load, mesh } of runs) if (mesh) lines.push(...meshLines(load, mesh));
  return lines.join('\n').trimEnd();
}

const quantileCells = ({ mean, p50, p90, p99, max }: Quantiles): string[] => [mean, p50, p90, p99, max].map(milliseconds);

function rateRow({ load, figures }: BenchRun): string[] {
  return [
    load,
    fixed(figures.seconds, 1),
    String(figures.requests),
    String(figures.failed),
    fixed(figures.requestsPerSecond, 2),
    fixed(figures.outputTokensPerSecond, 1),
    fixed(figures.promptTokensPerSecond, 1),
    figures.goodput ? percent(figures.goodput.share) : '-',
    percent(figures.clientCpuShare),
  ];
}

/** What a reader must know before believing the tables. */
export function warnings(figures: Figures): string[] {
  const { errors, withoutUsage, short, tokensPerChunk, sendLagMs, clientCpuShare } = figures;
  const list = Object.entries(errors).map(([kind, count]) => `${count} failed: ${kind}`);
  if (withoutUsage > 0) list.push(`${withoutUsage} answers had no usage: their chunks were counted as tokens`);
  if (short > 0) list.push(`${short} answers were shorter than asked for`);
  if (tokensPerChunk !== null && (tokensPerChunk > 1.05 || tokensPerChunk < 0.95))
    list.push(`${fixed(tokensPerChunk, 2)} tokens a chunk: inter-token times are times between chunks`);
  if (sendLagMs && sendLagMs.p99 > 20)
    list.push(`requests were sent up to ${milliseconds(sendLagMs.p99)} ms late (p99): the client is too slow`);
  if (clientCpuShare > 0.8) list.push(`the client took ${percent(clientCpuShare)} of a core: it may be what was measured`);
  return list;
}

const notes = ({ load, figures }: BenchRun): string[] => warnings(figures).map((warning) => `${load}: ${warning}`);

const level = ({ mean, max }: Level, show: (value: number) => string): string => `${show(mean)} (at most ${show(max)})`;

function meshLines(load: string, mesh: MeshFigures): string[] {
  const count = (value: number): string => fixed(value, 1);
  const head = ['shard', 'steps', 'step ms', 'sync ms', 'link wait ms', 'idle ms', 'sent a step', 'messages a step', 'RSS MiB'];
  const rows = mesh.shards.map((shard) => [
    `stage ${shard.stage} rank ${shard.rank}`,
    String(shard.steps),
    fixed(shard.stepMs, 2),
    fixed(shard.syncMs, 2),
    fixed(shard.linkWaitMs, 2),
    fixed(shard.idleMs, 2),
    ...(shard.messagesPerStep === 0
      ? ['shared memory', '-']
      : [`${fixed(shard.bytesPerStep / 1024, 1)} KiB`, fixed(shard.messagesPerStep, 1)]),
    fixed(shard.rssBytes / 1024 ** 2, 0),
  ]);
  return [
    '',
    `mesh, ${load}: ${mesh.steps} steps of ${fixed(mesh.stepMs, 2)} ms, ${fixed(mesh.generationTokensPerStep, 2)} output tokens a step, bubble ${percent(mesh.bubbleRatio)}; ` +
      `running ${level(mesh.running, count)}, waiting ${level(mesh.waiting, count)}, KV use ${level(mesh.kvUsage, percent)}; ` +
      `${mesh.cachedTokens} prompt tokens from the cache, ${mesh.promptTokens} computed, ${mesh.preemptions} preemptions, ${mesh.draftTokensAccepted} of ${mesh.draftTokens} draft tokens right`,
    ...table(head, rows),
  ];
}
