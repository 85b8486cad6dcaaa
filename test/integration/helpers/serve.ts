/** Starts `shardmesh serve` as a user would: a process of its own, real workers, a real broker, the real model. */
import { spawn, type ChildProcess } from 'node:child_process';
import { existsSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

export const cli = fileURLToPath(new URL('../../../dist/deploy/cli/main.js', import.meta.url));

export interface Served {
  url: string;
  model: string;
  child: ChildProcess;
  /** Everything it has logged so far (stderr). */
  log(): string;
  /** JSON log lines with this message. */
  events(name: string): Record<string, unknown>[];
  /** Ends it by SIGTERM. @returns exit code */
  stop(): Promise<number | null>;
  /** Exit code, when it has ended by itself. */
  exited: Promise<number | null>;
}

const running = new Set<ChildProcess>();
process.once('exit', () => running.forEach((child) => child.kill('SIGKILL')));

/** Resolves when it says that it is ready. @throws with its log when it ends or takes longer than `timeoutMs` */
export async function startServe(
  args: string[],
  { timeoutMs = 60_000, env = {}, main = cli, detached = false } = {},
): Promise<Served> {
  if (!existsSync(main)) throw new Error(`${main} is not built: npm run build`);
  const child = spawn(process.execPath, ['--enable-source-maps', main, 'serve', '--port', '0', ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { ...process.env, ...env },
    detached,
  });
  running.add(child);
  let stdout = '';
  let stderr = '';
  child.stderr.on('data', (chunk: Buffer) => (stderr += chunk.toString()));
  const ended = new Promise<number | null>((resolve) => child.once('exit', (code) => (running.delete(child), resolve(code))));
  const ready = await new Promise<RegExpExecArray>((resolve, reject) => {
    const timer = setTimeout(() => {
      child.kill('SIGKILL');
      reject(new Error(`serve ${args.join(' ')} was not ready within ${timeoutMs} ms:\n${stderr}`));
    }, timeoutMs);
    child.stdout.on('data', (chunk: Buffer) => {
      stdout += chunk.toString();
      const match = /^shardmesh ready (\S+) model=(\S+) tp=(\d+) pp=(\d+)$/m.exec(stdout);
      if (!match) return;
      clearTimeout(timer);
      resolve(match);
    });
    void ended.then((code) => {
      clearTimeout(timer);
      reject(new Error(`serve ${args.join(' ')} ended with exit code ${code}:\n${stderr}`));
    });
  });
  return {
    url: ready[1] ?? '',
    model: ready[2] ?? '',
    child,
    log: () => stderr,
    events: (name) =>
      stderr
        .split('\n')
        .filter((line) => line.startsWith('{'))
        .map((line) => JSON.parse(line) as Record<string, unknown>)
        .filter((event) => event['msg'] === name),
    exited: ended,
    stop: () => {
      child.kill('SIGTERM');
      return ended;
    },
  };
}

export interface CompletionChoice {
  text: string;
  finish_reason: string | null;
  logprobs: { tokens: string[]; token_logprobs: (number | null)[]; top_logprobs: Record<string, number>[] } | null;
}

export interface Completion {
  choices: CompletionChoice[];
  usage: { prompt_tokens: number; completion_tokens: number; prompt_tokens_details: { cached_tokens: number } };
  error?: { message: string; code: string };
}

/** POST /v1/completions. @throws the server's error */
export async function complete(
  served: Pick<Served, 'url' | 'model'>,
  body: Record<string, unknown>,
  apiKey?: string,
): Promise<Completion> {
  const response = await fetch(`${served.url}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', ...(apiKey === undefined ? {} : { authorization: `Bearer ${apiKey}` }) },
    body: JSON.stringify({ model: served.model, ...body }),
  });
  const completion = (await response.json()) as Completion;
  if (!response.ok) throw new Error(`HTTP ${response.status}: ${completion.error?.code}: ${completion.error?.message}`);
  return completion;
}
