/** `shardmesh bench`: a load on any OpenAI-compatible server, ours or another, and what it did with it. */
import { Command, InvalidArgumentError, Option } from 'commander';
import { writeFileSync } from 'node:fs';
import { cpus } from 'node:os';
import { describeLoad, readTrace, type Load } from '../bench/arrivals.ts';
import { CompletionClient } from '../bench/completion-client.ts';
import { figures } from '../bench/figures.ts';
import { htmlReport } from '../bench/html-report.ts';
import { lengthMax, parseLengthDistribution } from '../bench/length-distribution.ts';
import { MeshWatch } from '../bench/mesh-figures.ts';
import { parseObjectives } from '../bench/objectives.ts';
import type { BenchResult, BenchRun } from '../bench/result.ts';
import { runLoad, warmUp, type LiveFigures } from '../bench/run-load.ts';
import { series } from '../bench/series.ts';
import { milliseconds, textReport } from '../bench/text-report.ts';
import { Workload } from '../bench/workload.ts';
import { addOptions } from './options.ts';
import { ShardmeshError } from '../../protocol/errors.ts';

interface BenchValues {
  url: string;
  askModel?: string;
  apiKey?: string;
  streams?: number[];
  rate?: number[];
  burst?: { size: number; everySeconds: number };
  trace?: string;
  promptTokens: string;
  outputTokens: string;
  sharedPrefix?: { tokens: number; groups: number };
  turns: number;
  chat?: boolean;
  seed: number;
  warmUp: number;
  requests?: number;
  duration?: number;
  slo?: string;
  extraBody: Record<string, unknown>;
  ignoreEos: boolean;
  timeout: number;
  result?: string;
  html?: string;
}

const secondsDefault = 30;

function numbers(text: string, minimum: number, maximum: number, whole: boolean): number[] {
  const list = text.split(',').map(Number);
  if (list.some((value) => !(value >= minimum && value <= maximum) || (whole && !Number.isInteger(value))))
    throw new InvalidArgumentError(`${whole ? 'whole ' : ''}numbers from ${minimum} to ${maximum} are needed, e.g. 4 or 1,4,16.`);
  return list;
}

const one =
  (minimum: number, maximum: number, whole = true) =>
  (text: string): number =>
    numbers(text, minimum, maximum, whole)[0] ?? minimum;

function burst(text: string): { size: number; everySeconds: number } {
  const match = /^(\d+):(\d+(?:\.\d+)?)$/.exec(text);
  const [size, everySeconds] = [Number(match?.[1]), Number(match?.[2])];
  if (!(size >= 1 && size <= 10_000 && everySeconds > 0)) throw new InvalidArgumentError('SIZE:SECONDS is needed, e.g. 8:2.');
  return { size, everySeconds };
}

function sharedPrefix(text: string): { tokens: number; groups: number } {
  const match = /^(\d+)(?::(\d+))?$/.exec(text);
  const [tokens, groups] = [Number(match?.[1]), Number(match?.[2] ?? 1)];
  if (!(tokens >= 1 && tokens <= lengthMax && groups >= 1 && groups <= 10_000))
    throw new InvalidArgumentError('TOKENS or TOKENS:GROUPS is needed, e.g. 512:4.');
  return { tokens, groups };
}

function jsonObject(text: string): Record<string, unknown> {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    value = null;
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value))
    throw new InvalidArgumentError(`a JSON object is needed, e.g. '{"cache_prompt": false}'.`);
  return value as Record<string, unknown>;
}

export function benchCommand(): Command {
  const command = new Command('bench').description(
    'Puts load on an OpenAI-compatible server and reports what it did with it: latencies, rates, errors; of our own mesh each shard.',
  );
  addOptions(command, ['url', 'apiKey']);
  return command
    .addOption(new Option('--ask-model <name>', 'model to ask for (default: the first that the server lists)'))
    .addOption(
      new Option(
        '--streams <n,..>',
        'closed loop: each stream asks again when it is answered; several: one after another (default: 1)',
      ).argParser((text) => numbers(text, 1, 10_000, true)),
    )
    .addOption(
      new Option('--rate <r,..>', 'open loop: requests a second, as a Poisson process; several: one after another').argParser(
        (text) => numbers(text, 0.001, 100_000, false),
      ),
    )
    .addOption(
      new Option('--burst <size:seconds>', 'open loop: so many requests at once, again after so many seconds').argParser(burst),
    )
    .addOption(
      new Option(
        '--trace <file>',
        'open loop: arrivals and lengths of a JSONL file, {"at": seconds, "prompt": tokens, "output": tokens} a line',
      ),
    )
    .addOption(
      new Option('--prompt-tokens <length>', '128, 64-256, normal:MEAN:DEVIATION, lognormal:MEDIAN:SIGMA or file:PATH').default(
        '128',
      ),
    )
    .addOption(new Option('--output-tokens <length>', 'the same for answers').default('64'))
    .addOption(
      new Option(
        '--shared-prefix <tokens[:groups]>',
        'every prompt begins with one of so many texts of so many tokens',
      ).argParser(sharedPrefix),
    )
    .addOption(new Option('--turns <n>', 'turns of a conversation; each sends all before it').default(1).argParser(one(1, 1000)))
    .addOption(new Option('--chat', 'ask /v1/chat/completions instead of /v1/completions'))
    .addOption(new Option('--seed <n>', 'of texts, lengths and arrivals').default(1).argParser(one(0, 2 ** 32 - 1)))
    .addOption(new Option('--warm-up <n>', 'requests before those that count').default(2).argParser(one(0, 100_000)))
    .addOption(new Option('--requests <n>', 'end after so many').argParser(one(1, 10_000_000)))
    .addOption(
      new Option(
        '--duration <seconds>',
        `stop sending after so many (default: ${secondsDefault}, without --requests and --trace)`,
      ).argParser(one(0.1, 86_400, false)),
    )
    .addOption(
      new Option(
        '--slo <objectives>',
        'count as goodput what keeps ttft, itl (p99 of a request), tpot, e2e: ttft=500ms,itl=50ms',
      ),
    )
    .addOption(new Option('--extra-body <json>', 'fields to send with every request').default({}, '{}').argParser(jsonObject))
    .addOption(new Option('--no-ignore-eos', 'let answers end by themselves (some servers refuse ignore_eos)'))
    .addOption(
      new Option('--timeout <seconds>', 'give a request up after so many').default(300).argParser(one(0.1, 86_400, false)),
    )
    .addOption(new Option('--result <file>', 'write the result there as JSON ("-": to stdout, in place of tables)'))
    .addOption(new Option('--html <file>', 'write a page with plots there'))
    .addHelpText(
      'after',
      `
Examples:
  shardmesh bench --streams 1,4,16 --requests 48
  shardmesh bench --rate 4 --duration 60 --prompt-tokens lognormal:200:0.8 --output-tokens 16-128 --slo ttft=500ms,itl=50ms
  shardmesh bench --url http://127.0.0.1:8000 --trace requests.jsonl --html report.html
`,
    )
    .action(async (values: BenchValues) => bench(values));
}

/** @throws {ShardmeshError} `config_invalid`: more than one kind of load was asked for */
function loads({ streams, rate, burst: bursts, trace }: BenchValues): Load[] {
  const kinds = [streams, rate, bursts, trace].filter((value) => value !== undefined);
  if (kinds.length > 1)
    throw new ShardmeshError('config_invalid', 'one of --streams, --rate, --burst and --trace is possible, not several');
  if (rate) return rate.map((perSecond) => ({ kind: 'poisson', perSecond }));
  if (bursts) return [{ kind: 'burst', ...bursts }];
  if (trace !== undefined) return [{ kind: 'trace', arrivals: readTrace(trace) }];
  return (streams ?? [1]).map((count) => ({ kind: 'closed', streams: count }));
}

async function firstModel(url: string, apiKey: string | null): Promise<string> {
  const response = await fetch(`${url}/v1/models`, {
    headers: apiKey === null ? {} : { authorization: `Bearer ${apiKey}` },
  }).catch((cause: unknown) => {
    throw new ShardmeshError('config_invalid', `no server answers at ${url}; start one with \`shardmesh serve\``, { cause });
  });
  if (!response.ok)
    throw new ShardmeshError('config_invalid', `${url}/v1/models: HTTP ${response.status}: ${await response.text()}`);
  const { data } = (await response.json()) as { data?: { id: string }[] };
  if (!data?.[0]) throw new ShardmeshError('config_invalid', `${url}/v1/models lists no model: name one with --ask-model`);
  return data[0].id;
}

async function bench(values: BenchValues): Promise<void> {
  const url = values.url.replace(/\/+$/, '').replace(/\/v1$/, '');
  const apiKey = values.apiKey ?? null;
  const list = loads(values);
  const objectives = values.slo === undefined ? null : parseObjectives(values.slo);
  const secondsMax = values.duration ?? (values.requests === undefined && values.trace === undefined ? secondsDefault : null);
  const lengths = {
    promptTokens: parseLengthDistribution(values.promptTokens),
    outputTokens: parseLengthDistribution(values.outputTokens),
  };
  const model = values.askModel ?? (await firstModel(url, apiKey));
  const extraBody = { ...(values.ignoreEos ? { ignore_eos: true } : {}), ...values.extraBody };
  const client = new CompletionClient({ url, model, apiKey, timeoutMs: values.timeout * 1000, extraBody });
  const result: BenchResult = {
    version: 1,
    startedAt: new Date().toISOString(),
    url,
    model,
    seed: values.seed,
    workload: describeWorkload(values),
    client: { node: process.version, cpu: cpus()[0]?.model ?? 'unknown', cores: cpus().length },
    runs: [],
  };
  const chat = values.chat ?? false;
  try {
    for (const [index, load] of list.entries()) {
      // Every run has texts of its own, or the second would find the first one's in the cache.
      const seed = values.seed + 1_000_003 * index;
      const workload = new Workload({ seed, ...lengths, turns: values.turns, sharedPrefix: values.sharedPrefix ?? null });
      if (values.warmUp > 0)
        await warmUp(client, workload, {
          requests: values.warmUp,
          streams: load.kind === 'closed' ? load.streams : values.warmUp,
          chat,
        });
      const watch = await MeshWatch.start(url, apiKey);
      const name = describeLoad(load);
      const run = await runLoad(client, workload, {
        load,
        seed,
        chat,
        requestsMax: values.requests ?? null,
        secondsMax,
        onProgress: (live) => showProgress(name, live),
      });
      if (process.stderr.isTTY) process.stderr.write('\r\x1b[K');
      result.runs.push({
        load: name,
        figures: figures(run, objectives),
        series: series(run),
        mesh: (await watch?.finish()) ?? null,
      });
    }
  } finally {
    client.close();
  }
  if (values.result !== undefined && values.result !== '-') writeFileSync(values.result, `${JSON.stringify(result)}\n`);
  if (values.html !== undefined) writeFileSync(values.html, htmlReport(result));
  process.stdout.write(`${values.result === '-' ? JSON.stringify(result) : textReport(result)}\n`);
  if (result.runs.every(answeredNothing))
    throw new ShardmeshError('config_invalid', `no request was answered; ${firstError(result.runs)}`);
}

const answeredNothing = ({ figures: { requests, failed } }: BenchRun): boolean => requests === failed;

const firstError = (runs: readonly BenchRun[]): string =>
  runs.flatMap(({ figures: { errors } }) => Object.keys(errors))[0] ?? 'none was sent';

function showProgress(name: string, live: LiveFigures): void {
  if (!process.stderr.isTTY) return;
  const { seconds, running, finished, failed, outputTokens, ttftMs } = live;
  process.stderr.write(
    `\r\x1b[K${name}: ${seconds.toFixed(0)} s, ${running} running, ${finished} finished${failed > 0 ? `, ${failed} failed` : ''}, ` +
      `${(outputTokens / Math.max(seconds, 0.001)).toFixed(0)} tokens/s${ttftMs === null ? '' : `, last TTFT ${milliseconds(ttftMs)} ms`}`,
  );
}

function describeWorkload(values: BenchValues): string {
  const { promptTokens, outputTokens, sharedPrefix: prefix, turns, chat, trace } = values;
  return [
    trace === undefined ? `prompts of ${promptTokens} tokens, answers of ${outputTokens}` : `prompts and answers of ${trace}`,
    ...(prefix ? [`each behind one of ${prefix.groups} prefixes of ${prefix.tokens}`] : []),
    ...(turns > 1 ? [`${turns} turns`] : []),
    chat ? 'as chat' : 'as completions',
  ].join(', ');
}
