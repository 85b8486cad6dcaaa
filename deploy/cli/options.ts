/**
 * Every option of the command line, named once: the same flag means the same in every command. `parse` turns text into a checked value and says what is
 * wrong, the value and the limit.
 */
import { parseAddress } from '../../protocol/addresses.ts';
import { InvalidArgumentError, Option, type Command } from 'commander';

/** First of the three ports of `serve --advertise`. */
export const meshPort = 7422;

const sizes: Record<string, number> = { '': 1, k: 1024, m: 1024 ** 2, g: 1024 ** 3 };

function integer(minimum: number, maximum: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (!/^\d+$/.test(text) || value < minimum || value > maximum)
      throw new InvalidArgumentError(`a whole number from ${minimum} to ${maximum} is needed.`);
    return value;
  };
}

function bytes(text: string): number {
  const match = /^(\d+(?:\.\d+)?)\s*([kmg]?)(?:i?b)?$/i.exec(text);
  const value = match ? Math.floor(Number(match[1]) * (sizes[(match[2] ?? '').toLowerCase()] ?? 1)) : 0;
  if (value < 1024 ** 2) throw new InvalidArgumentError('a size of at least 1m is needed, e.g. 512m or 2g.');
  return value;
}

/** `3` is a count of equal shares, `3:2:1` are the shares themselves. */
export interface Shares {
  count: number;
  /** null: equal. */
  parts: number[] | null;
}

function shares(name: string): (text: string) => Shares {
  return (text) => {
    const parts = text.split(':').map(Number);
    if (!/^\d+(:\d+)*$/.test(text) || parts.some((part) => part < 1 || part > 65_536) || parts.length > 64)
      throw new InvalidArgumentError(`${name} is a count (2) or a list of shares (3:2:1).`);
    const [count] = parts;
    if (parts.length === 1 && count !== undefined) {
      if (count > 64) throw new InvalidArgumentError(`at most 64 are possible.`);
      return { count, parts: null };
    }
    return { count: parts.length, parts };
  };
}

/** As given on the command line: without a port the command has its own. */
export interface Advertised {
  host: string;
  port: number | null;
}

/** `host`, `host:port` or `[::1]:port`. */
function advertised(text: string): Advertised {
  const address = parseAddress(text);
  const host = address?.host ?? parseAddress(`${text.includes(':') ? `[${text}]` : text}:0`)?.host;
  // serve takes the two ports after it as well.
  if (host === undefined || (address?.port ?? 0) > 65_533 || /^(0\.0\.0\.0|::)$/.test(host))
    throw new InvalidArgumentError('an address that other hosts can reach is needed, e.g. 192.0.2.7 or 192.0.2.7:7500.');
  return { host, port: address?.port ?? null };
}

function cores(text: string): number[] {
  const list: number[] = [];
  for (const item of text.split(',')) {
    const match = /^(\d+)(?:-(\d+))?$/.exec(item);
    if (!match) throw new InvalidArgumentError('a list of cores is needed, e.g. 0,2-3.');
    const from = Number(match[1]);
    const to = Number(match[2] ?? match[1]);
    if (to < from || to > 4095) throw new InvalidArgumentError(`no such range of cores: ${item}.`);
    for (let core = from; core <= to; core++) list.push(core);
  }
  return list;
}

const options = {
  model: () =>
    new Option('--model <name|path>', 'name in the catalogue (`shardmesh models list`) or path of a GGUF file').default(
      'smollm2-135m-instruct-q4_1',
    ),
  servedModelName: () =>
    new Option(
      '--served-model-name <name>',
      "the model's name in the API (default: its name in the catalogue, else the one in the file)",
    ),
  tp: () =>
    new Option('--tp <n|a:b:c>', 'ranks a stage, or their shares of the units')
      .default({ count: 1, parts: null }, '1')
      .argParser(shares('--tp')),
  pp: () =>
    new Option('--pp <n|a:b>', 'stages, or their layers').default({ count: 1, parts: null }, '1').argParser(shares('--pp')),
  executor: () =>
    new Option('--executor <kind>', 'what computes (auto: the cpu, or what a worker is told)')
      .choices(['auto', 'cpu', 'cuda', 'reference'])
      .default('auto'),
  isa: () =>
    new Option('--isa <name>', 'instruction set of the cpu executor')
      .choices(['auto', 'amx', 'avx512', 'avx2', 'portable'])
      .default('auto'),
  link: () =>
    new Option('--link <driver>', 'how ranks and stages reach each other')
      .choices(['auto', 'shm', 'tcp', 'grpc', 'nats'])
      .default('auto'),
  wire: () =>
    new Option('--wire <type>', 'how activations travel between ranks; less than f32 gives up that every split has the same bits')
      .choices(['f32', 'bf16', 'q8'])
      .default('f32'),
  port: () => new Option('--port <n>', 'HTTP port (0: any free one)').default(8080).argParser(integer(0, 65535)),
  host: () => new Option('--host <address>', 'HTTP address; beyond loopback API keys are needed').default('127.0.0.1'),
  advertise: () =>
    new Option(
      '--advertise <host[:port]>',
      `how other hosts reach this one: serve lets workers of theirs join (port, default ${meshPort}, and the two after it), a worker is found there by the others (port, and the next for tcp links; default: any free ones)`,
    ).argParser(advertised),
  mesh: () =>
    new Option('--mesh <folder>', 'folder that remembers the mesh of serve --advertise (default: ~/.config/shardmesh/mesh)'),
  localWorkers: () =>
    new Option('--local-workers <n>', 'workers started here (default: one for each rank)').argParser(integer(0, 256)),
  oneProcess: () =>
    new Option(
      '--one-process',
      'with --executor cuda: workers started here are one process, where the ranks of a stage share the card and each of their steps is one graph',
    ),
  also: () =>
    new Option(
      '--also <file>',
      'with --executor cuda: credentials of one more worker that this process is, a rank on the same card; may be given again',
    ).argParser((file: string, before: string[] = []) => [...before, file]),
  enroll: () =>
    new Option('--enroll <token>', 'join the mesh of this one-time token, made by `shardmesh enroll`; - reads it from stdin'),
  nats: () => new Option('--nats <url>', 'a running NATS server (default: a private one)'),
  credentials: () => new Option('--credentials <file>', 'credential file for --nats'),
  apiKeys: () =>
    new Option('--api-keys <file>', 'file with one API key a line (or environment SHARDMESH_API_KEYS, comma-separated)'),
  stepTokensMax: () => new Option('--step-tokens-max <n>', 'most tokens of a step').default(256).argParser(integer(16, 4096)),
  prefillChunkMax: () =>
    new Option(
      '--prefill-chunk-max <n>',
      'most prompt tokens of one sequence in a step (default: as --step-tokens-max)',
    ).argParser(integer(1, 4096)),
  blockTokens: () =>
    new Option('--block-tokens <n>', 'tokens of a KV block: 16, 32, 48 or 64').default(16).argParser(integer(16, 64)),
  kvCacheBytes: () =>
    new Option('--kv-cache-bytes <size>', 'KV cache of each worker, e.g. 512m').default(256 * 1024 ** 2, '256m').argParser(bytes),
  bits: () =>
    new Option(
      '--bits <promise>',
      'exact: one answer on any split and executor; per-kind: only on executors of one kind, where BF16 weights may use tensor cores; free: cuBLASLt may compute them too, and answers hang on what runs beside',
    )
      .choices(['exact', 'per-kind', 'free'])
      .default('exact'),
  activations: () =>
    new Option('--activations <type>', 'activations of quantised products; int16 is slower and a hundred times as exact')
      .choices(['int8', 'int16'])
      .default('int8'),
  kvType: () =>
    new Option('--kv-type <type>', 'K and V in the KV cache; f16-int8: K f16, V int8 (default: what suits the model)')
      .choices(['auto', 'int8', 'f16-int8', 'f16'])
      .default('auto'),
  contextTokensMax: () =>
    new Option('--context-tokens-max <n>', "longest context (default: the model's own)").argParser(integer(16, 1_048_576)),
  cores: () => new Option('--cores <list>', 'cores to compute on, e.g. 0,2-3 (default: all)').argParser(cores),
  sequencesMax: () =>
    new Option('--sequences-max <n>', 'most sequences that run at once').default(256).argParser(integer(1, 4096)),
  noPrefixCache: () => new Option('--no-prefix-cache', 'never reuse blocks of an earlier prompt'),
  stepsInFlight: () =>
    new Option(
      '--steps-in-flight <n>',
      'most steps in flight (default: the running one and the next, short ones in two groups of up to 32 ms; with stages as many as keep all of them busy)',
    ).argParser(integer(1, 128)),
  itlTargetMs: () =>
    new Option(
      '--itl-target-ms <n>',
      'most time between two tokens of a stream while prompts are computed (default: 1.5 times what it is without, 20 ms at least, up to 100 ms where many wait; 100 ms more for a short prompt)',
    ).argParser(integer(1, 60_000)),
  speculation: () =>
    new Option(
      '--speculation <mode>',
      'guess tokens from earlier text of the sequence and check several in one step, where that is faster; the answer is the same',
    )
      .choices(['auto', 'off'])
      .default('auto'),
  noLocalModel: () =>
    new Option('--no-local-model', 'fetch the weight slice from the coordinator even where the model file is on this host'),
  json: () => new Option('--json', 'print one JSON object instead of text'),
  url: () => new Option('--url <url>', 'the server, without /v1').default('http://127.0.0.1:8080'),
  apiKey: () => new Option('--api-key <key>', 'API key of the server').env('SHARDMESH_API_KEY'),
  ask: () => new Option('--ask <question>', 'ask the model one question when it is ready'),
  logLevel: () =>
    new Option('--log-level <level>', 'least level that is logged')
      .choices(['debug', 'info', 'warn', 'error', 'silent'])
      .default('info'),
} as const;

export type OptionName = keyof typeof options;

/** Adds the named options to a command, in this order. */
export function addOptions(command: Command, names: readonly OptionName[]): Command {
  for (const name of names) command.addOption(options[name]());
  return command;
}

/** Values as commander gives them, for the commands that take all of them. */
export interface OptionValues {
  model: string;
  servedModelName?: string;
  tp: Shares;
  pp: Shares;
  executor: 'auto' | 'cpu' | 'cuda' | 'reference';
  isa: 'auto' | 'amx' | 'avx512' | 'avx2' | 'portable';
  link: 'auto' | 'shm' | 'tcp' | 'grpc' | 'nats';
  wire: 'f32' | 'bf16' | 'q8';
  port: number;
  host: string;
  advertise?: Advertised;
  mesh?: string;
  localWorkers?: number;
  oneProcess?: boolean;
  also?: string[];
  enroll?: string;
  nats?: string;
  credentials?: string;
  apiKeys?: string;
  stepTokensMax: number;
  prefillChunkMax?: number;
  blockTokens: number;
  kvCacheBytes: number;
  bits: 'exact' | 'per-kind' | 'free';
  activations: 'int8' | 'int16';
  kvType: 'auto' | 'int8' | 'f16-int8' | 'f16';
  contextTokensMax?: number;
  cores?: number[];
  sequencesMax: number;
  prefixCache: boolean;
  stepsInFlight?: number;
  itlTargetMs?: number;
  speculation: 'auto' | 'off';
  localModel: boolean;
  json?: boolean;
  ask?: string;
  logLevel: string;
}
