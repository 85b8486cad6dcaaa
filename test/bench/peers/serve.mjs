/** `shardmesh serve` as a user starts it, but without drafts (`bench:speculation` has those): greedy answers of a small model repeat themselves, and rivals' tools draft nothing. */
import { spawn } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const cli = fileURLToPath(new URL('../../../dist/deploy/cli/main.js', import.meta.url));

const kvCacheBytes = 256 * 1024 ** 2;

const running = new Set();
process.once('exit', () => running.forEach((child) => child.kill('SIGKILL')));

/** Resolves when it is ready: { url, readySeconds, processes() (resident bytes of each without K/V), stop() }. */
export async function startServe(args) {
  const began = performance.now();
  const child = spawn(
    process.execPath,
    [cli, 'serve', '--port', '0', '--log-level', 'error', '--kv-cache-bytes', `${kvCacheBytes}`, '--speculation', 'off', ...args],
    {
      stdio: ['ignore', 'pipe', 'inherit'],
    },
  );
  running.add(child);
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

/** Without the K/V cache: the one mapping of just its size. */
function residentBytes(pid) {
  let resident = 0;
  let size = 0;
  for (const line of readFileSync(`/proc/${pid}/smaps`, 'latin1').split('\n')) {
    const range = /^([0-9a-f]+)-([0-9a-f]+) /.exec(line);
    if (range) size = parseInt(range[2], 16) - parseInt(range[1], 16);
    const pages = /^Rss:\s+(\d+)/.exec(line);
    if (pages && size !== kvCacheBytes) resident += Number(pages[1]) * 1024;
  }
  return resident;
}

/** A process and all below it. */
function treeOf(root) {
  const parents = readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map((name) => [Number(name), Number(/^PPid:\s+(\d+)/m.exec(statusOf(name))?.[1] ?? 0)]);
  const below = (pid) => [pid, ...parents.filter(([, parent]) => parent === pid).flatMap(([child]) => below(child))];
  return below(root);
}
