/** `shardmesh trace`: a timeline of a running mesh's steps, for the browser's trace viewer, and the same in numbers. */
import { Command, InvalidArgumentError, Option } from 'commander';
import { writeFileSync } from 'node:fs';
import type { TraceDocument } from '../../coordinator/observe/trace-document.ts';
import { tracePicture } from '../../coordinator/observe/trace-picture.ts';
import type { ProcessSummary } from '../../coordinator/observe/trace-summary.ts';
import { traceLimits } from '../../protocol/limits.ts';
import { ShardmeshError } from '../../protocol/errors.ts';
import { addOptions } from './options.ts';
import { table } from './table.ts';

interface TraceValues {
  url: string;
  seconds: number;
  ownStreams: number;
  file: string;
  picture?: string;
  apiKey?: string;
  json?: boolean;
}

type Traced = TraceDocument & { summary: ProcessSummary[] };

/** Before the trace begins: its own streams are past their prompts by then. */
const settleMs = 1_500;

const number =
  (minimum: number, maximum: number) =>
  (text: string): number => {
    const value = Number(text);
    if (!(value >= minimum && value <= maximum))
      throw new InvalidArgumentError(`a number from ${minimum} to ${maximum} is needed.`);
    return value;
  };

export function traceCommand(): Command {
  const command = new Command('trace')
    .description(
      'Records what every process of a running mesh does for a while. Open the file in chrome://tracing or ui.perfetto.dev.',
    )
    .addOption(
      new Option('--seconds <n>', 'how long to record').default(1).argParser(number(0.001, traceLimits.millisecondsMax / 1_000)),
    )
    .addOption(
      new Option('--own-streams <n>', 'streams of our own to decode meanwhile (0: what others ask for)')
        .default(0)
        .argParser(number(0, 512)),
    )
    .addOption(new Option('--file <file>', 'where the timeline goes').default('trace.json'))
    .addOption(new Option('--picture <file>', 'two steps of it as a picture as well (SVG)'));
  return addOptions(command, ['url', 'apiKey', 'json'])
    .addHelpText(
      'after',
      '\nExamples:\n  shardmesh trace --own-streams 4\n  shardmesh trace --url http://127.0.0.1:9090 --seconds 3 --file steps.json\n  shardmesh trace --own-streams 1 --picture steps.svg\n',
    )
    .action(async (values: TraceValues) => trace(values));
}

async function trace({ url, seconds, ownStreams: streams, file, picture, apiKey, json }: TraceValues): Promise<void> {
  const headers = { 'content-type': 'application/json', ...(apiKey ? { authorization: `Bearer ${apiKey}` } : {}) };
  const ours = new AbortController();
  const load = Array.from({ length: streams }, (_, index) => decode(url, headers, index, ours.signal));
  try {
    if (streams > 0) await new Promise((resolve) => setTimeout(resolve, settleMs));
    const response = await fetch(`${url}/trace`, {
      method: 'POST',
      headers,
      body: JSON.stringify({ milliseconds: Math.round(seconds * 1_000) }),
    }).catch((cause: unknown) => {
      throw new ShardmeshError('config_invalid', `no server answers at ${url}; start one with \`shardmesh serve\``, { cause });
    });
    if (!response.ok) throw new Error(`the trace was answered with HTTP ${response.status}: ${await response.text()}`);
    const { summary, ...document } = (await response.json()) as Traced;
    writeFileSync(file, JSON.stringify(document));
    if (picture !== undefined) writeFileSync(picture, tracePicture(document));
    process.stdout.write(
      json ? `${JSON.stringify(summary)}\n` : `${describe(summary)}\n${file}: ${document.traceEvents.length} events\n`,
    );
  } finally {
    ours.abort();
    await Promise.allSettled(load);
  }
}

/** A stream that goes on until it is aborted. Its text is thrown away. */
async function decode(url: string, headers: Record<string, string>, index: number, signal: AbortSignal): Promise<void> {
  const models = (await (await fetch(`${url}/v1/models`, { headers, signal })).json()) as { data: { id: string }[] };
  const body = {
    model: models.data[0]?.id,
    prompt: `${index}: Once upon a time`,
    max_tokens: 1_000,
    ignore_eos: true,
    stream: true,
  };
  while (!signal.aborted) {
    const response = await fetch(`${url}/v1/completions`, { method: 'POST', headers, body: JSON.stringify(body), signal });
    if (!response.ok || !response.body)
      throw new Error(`a stream was answered with HTTP ${response.status}: ${await response.text()}`);
    for await (const _ of response.body);
  }
}

/** A table of each process; times in microseconds. */
function describe(summary: readonly ProcessSummary[]): string {
  return summary
    .map(({ name, steps, loopUsPerStep, loopWaitUsPerStep, processUsPerStep, idleShare, gcShare, spans }) => {
      const numbers = [
        `event loop ${loopUsPerStep.toFixed(0)} µs of CPU a step`,
        `waited ${loopWaitUsPerStep.toFixed(0)} µs for a core`,
        `all threads ${processUsPerStep.toFixed(0)} µs`,
        `gc ${(100 * gcShare).toFixed(2)} %`,
        ...(idleShare > 0 ? [`compute thread idle ${(100 * idleShare).toFixed(1)} %`] : []),
      ];
      const rows = spans.map((span) => [
        span.name,
        String(span.count),
        span.usPerStep.toFixed(1),
        span.medianUs.toFixed(1),
        span.p99Us.toFixed(1),
        span.lane,
      ]);
      const lines = table(['span', 'count', 'µs a step', 'median', 'p99', 'thread'], rows);
      return [`${name}: ${steps} steps; ${numbers.join(', ')}`, ...lines.map((line) => `  ${line}`), ''].join('\n');
    })
    .join('\n');
}
