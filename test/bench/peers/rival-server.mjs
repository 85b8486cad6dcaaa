/** A server of another engine: started on a free port of loopback, waited for, and ended with all processes that it started. */
import { spawn } from 'node:child_process';
import { closeSync, mkdirSync, openSync, readFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { homedir } from 'node:os';
import { dirname, join } from 'node:path';

/** Where rivals' programs, converted models and logs are kept. */
export const peersFolder = join(process.env['XDG_CACHE_HOME'] || join(homedir(), '.cache'), 'shardmesh', 'peers');

const running = new Set();
process.once('exit', () => running.forEach((child) => signalGroup(child, 'SIGKILL')));

const freePort = () =>
  new Promise((resolve) => {
    const server = createServer().listen(0, '127.0.0.1', () => {
      const { port } = server.address();
      server.close(() => resolve(port));
    });
  });

/** A group of its own for each server: vLLM's worker processes must not outlive it. */
function signalGroup(child, signal) {
  try {
    process.kill(-child.pid, signal);
  } catch {
    // Nothing of it is left.
  }
}

/**
 * Resolves when `/health` of the server answers: { url, readySeconds, stop() }.
 * @param argumentsFor  its arguments for a port
 * @param log  file for what it prints; an earlier one is overwritten
 * @throws when it ends before it answers, or does not answer within `readySecondsMax`: says which, and where its log is, with the log's end
 */
export async function startRivalServer(name, command, argumentsFor, { log, readySecondsMax, env = process.env }) {
  const port = await freePort();
  mkdirSync(dirname(log), { recursive: true });
  const out = openSync(log, 'w');
  const began = performance.now();
  const child = spawn(command, argumentsFor(port), { stdio: ['ignore', out, out], detached: true, env });
  closeSync(out);
  let ended = null;
  child.once('error', (error) => (ended = error.message));
  child.once('exit', (code, signal) => (ended ??= signal ?? `exit code ${code}`));
  running.add(child);
  const stop = async () => {
    signalGroup(child, 'SIGTERM');
    for (let waited = 0; ended === null && waited < 10_000; waited += 50) await sleep(50);
    signalGroup(child, 'SIGKILL');
    running.delete(child);
  };
  const url = `http://127.0.0.1:${port}`;
  const seconds = () => (performance.now() - began) / 1000;
  while (!(await answers(`${url}/health`))) {
    if (ended === null && seconds() < readySecondsMax) {
      await sleep(100);
      continue;
    }
    const what = ended === null ? `did not answer within ${readySecondsMax} s` : `ended before it answered (${ended})`;
    await stop();
    throw new Error(`${name} ${what}; its log: ${log}\n${readFileSync(log, 'utf8').slice(-1_500)}`.trimEnd());
  }
  return { url, readySeconds: seconds(), stop };
}

const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

const answers = (url) =>
  fetch(url, { signal: AbortSignal.timeout(5_000) }).then(
    (response) => response.ok,
    () => false,
  );
