/** Runs `shardmesh` commands as processes, in a world of their own (see `mark`). */
import { spawn } from 'node:child_process';
import { createServer, type AddressInfo } from 'node:net';
import { cli } from './serve.ts';

export interface Running {
  readonly pid: number;
  /** stdout and stderr so far. */
  output(): string;
  /** JSON log lines with this message. */
  events(name: string): Record<string, unknown>[];
  /** Exit code; null after a signal. */
  readonly ended: Promise<number | null>;
  kill(signal: NodeJS.Signals): Promise<number | null>;
}

export function runCommand(file: string, args: string[], env: Record<string, string>): Running {
  const child = spawn(file, args, { stdio: ['ignore', 'pipe', 'pipe'], env: { ...process.env, ...env } });
  let output = '';
  child.stdout.on('data', (chunk: Buffer) => (output += chunk.toString()));
  child.stderr.on('data', (chunk: Buffer) => (output += chunk.toString()));
  const ended = new Promise<number | null>((resolve) => child.once('close', (code) => resolve(code)));
  return {
    pid: child.pid ?? 0,
    output: () => output,
    events: (name) =>
      output
        .split('\n')
        .filter((line) => line.startsWith('{') && line.endsWith('}'))
        .map((line) => JSON.parse(line) as Record<string, unknown>)
        .filter((event) => event['msg'] === name),
    ended,
    kill: (signal) => {
      child.kill(signal);
      return ended;
    },
  };
}

export const shardmesh = (args: string[], env: Record<string, string>): Running =>
  runCommand(process.execPath, ['--enable-source-maps', cli, ...args], env);

export async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

/** The first of `count` ports in a row that are free now. */
export async function freePorts(count: number): Promise<number> {
  for (;;) {
    const first = await freePort();
    const taken = await Promise.all(Array.from({ length: count }, (_, offset) => isTaken(first + offset)));
    if (!taken.includes(true)) return first;
  }
}

const isTaken = (port: number): Promise<boolean> =>
  new Promise((resolve) => {
    if (port > 65_535) return resolve(true);
    const server = createServer();
    server.once('error', () => resolve(true));
    server.listen(port, '127.0.0.1', () => server.close(() => resolve(false)));
  });
