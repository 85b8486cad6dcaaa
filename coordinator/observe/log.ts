/** Logs by pino: readable on a terminal, JSON otherwise; one line an event, never a prompt or an answer. */
import pino, { type Logger } from 'pino';

export type { Logger };

export interface LogOptions {
  level: string;
  /** In every line: `coordinator`, or a worker's id. */
  name: string;
  /** stdout belongs to the program's answer, so lines go to stderr. */
  terminal?: boolean;
}

const grey = (text: string): string => `\x1b[90m${text}\x1b[0m`;
const levelNames: Record<number, string> = { 20: 'debug', 30: 'info', 40: 'warn', 50: 'error', 60: 'fatal' };

/** `21:04:05 info  coordinator  worker_joined  worker=... cores=1` */
function readable(line: string): string {
  const {
    time,
    level,
    name,
    msg,
    pid: _pid,
    hostname: _hostname,
    ...fields
  } = JSON.parse(line) as Record<string, unknown> & { time: number; level: number };
  const pairs = Object.entries(fields)
    .filter(([, value]) => value !== null && value !== undefined)
    .map(([key, value]) => `${key}=${typeof value === 'string' ? value : JSON.stringify(value)}`);
  return `${grey(new Date(time).toISOString().slice(11, 23))} ${(levelNames[level] ?? '').padEnd(5)} ${String(name).slice(0, 16)} ${String(msg)} ${grey(pairs.join(' '))}\n`;
}

export function createLog({ level, name, terminal = process.stderr.isTTY }: LogOptions): Logger {
  const destination = terminal
    ? { write: (line: string) => void process.stderr.write(readable(line)) }
    : pino.destination({ dest: 2, sync: true });
  return pino(
    { level, name, redact: { paths: ['headers', 'req', 'authorization', '*.authorization'], remove: true } },
    destination,
  );
}
