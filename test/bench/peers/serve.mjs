/** `shardmesh serve` as a user starts it, and what it takes. */
import { spawn } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const cli = fileURLToPath(new URL('../../../dist/deploy/cli/main.js', import.meta.url));

/** Resolves when it is ready: { url, readySeconds, residentBytes(), stop() }. */
export async function startServe(args) {
  const began = performance.now();
  const child = spawn(process.execPath, [cli, 'serve', '--port', '0', '--log-level', 'error', ...args], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  process.on('exit', () => child.kill('SIGKILL'));
  const url = await new Promise((resolve, reject) => {
    let text = '';
    child.stdout.on('data', (data) => {
      text += data;
      const match = /^shardmesh ready (\S+)/m.exec(text);
      if (match) resolve(match[1]);
    });
    child.once('exit', (code) => reject(new Error(`serve ${args.join(' ')} ended with exit code ${code}`)));
  });
  return {
    url,
    readySeconds: (performance.now() - began) / 1000,
    processes: () => treeOf(child.pid).map((pid) => residentBytes(pid)),
    stop: () => new Promise((resolve) => (child.once('exit', resolve), child.kill())),
  };
}

const statusOf = (pid) => {
  try {
    return readFileSync(`/proc/${pid}/status`, 'utf8');
  } catch {
    return '';
  }
};
const residentBytes = (pid) => Number(/^VmRSS:\s+(\d+)/m.exec(statusOf(pid))?.[1] ?? 0) * 1024;

/** A process and all below it. */
function treeOf(root) {
  const parents = readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map((name) => [Number(name), Number(/^PPid:\s+(\d+)/m.exec(statusOf(name))?.[1] ?? 0)]);
  const below = (pid) => [pid, ...parents.filter(([, parent]) => parent === pid).flatMap(([child]) => below(child))];
  return below(root);
}
