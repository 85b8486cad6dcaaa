/**
 * "Hosts" on one machine: network namespaces on one bridge, each with an address, a user and a home of its own. Made by a test and gone with it.
 *
 *   this process ── bridge in a namespace of its own ──┬── veth ── namespace 1 (10.x.y.1, user 61001)
 *                                                      ├── veth ── namespace 2 (10.x.y.2, user 61002)
 */
import { execFileSync, spawn, type ChildProcess } from 'node:child_process';
import { chmodSync, chownSync, cpSync, mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { cli } from '../integration/helpers/serve.ts';

export interface Host {
  /** Of the network, as `ip` and `tc` know it. */
  readonly namespace: string;
  readonly address: string;
  /** Its own; closed to the users of other hosts. */
  readonly home: string;
  /** Bytes that have left through its interface. */
  bytesSent(): number;
  /** Puts a copy of a file or folder into this host's cache. */
  give(path: string, to: string): void;
  /** A command in this host's namespace, as its user. */
  run(file: string, args: string[]): HostProcess;
  shardmesh(...args: string[]): HostProcess;
  /** Waits for the end of it. @returns exit code and everything it said */
  answer(process: HostProcess): Promise<{ code: number | null; output: string }>;
}

export interface HostProcess {
  readonly child: ChildProcess;
  output(): string;
  readonly ended: Promise<number | null>;
}

export interface Hosts {
  readonly hosts: readonly Host[];
  /** Ends what still runs in them, and removes them. */
  close(): Promise<void>;
}

const firstUser = 61_001;
const prefix = 'shardmesh';

/** Why there can be no namespaces here; null when there can. */
export function namespacesMissing(): string | null {
  try {
    const name = `${prefix}-try-${process.pid}`;
    ip('netns', 'add', name);
    ip('netns', 'del', name);
    if (process.getuid?.() !== 0) return 'network namespaces with users of their own need root';
    execFileSync('setpriv', [`--reuid=${firstUser}`, `--regid=${firstUser}`, '--clear-groups', 'test', '-r', cli], {
      stdio: 'pipe',
    });
    return null;
  } catch (error) {
    const said = (error as { stderr?: Buffer }).stderr?.toString().trim() || (error as Error).message;
    return `network namespaces need \`ip\` (iproute2), the right to use it (CAP_NET_ADMIN), and a checkout that other users may read: ${said}`;
  }
}

/**
 * @param count  hosts, at most 200
 */
export function makeHosts(count: number): Hosts {
  const id = `${prefix}-${process.pid}`;
  // Processes outside keep their own network: an address that is used there as well does no harm.
  const subnet = `10.${100 + (process.pid % 100)}.${Math.floor(process.pid / 100) % 250}`;
  const hub = `${id}-hub`;
  const root = mkdtempSync(join(tmpdir(), 'shardmesh-hosts-'));
  chmodSync(root, 0o755);
  const running = new Set<ChildProcess>();
  const names = [hub];
  ip('netns', 'add', hub);
  ip('-n', hub, 'link', 'add', 'bridge0', 'type', 'bridge');
  ip('-n', hub, 'link', 'set', 'bridge0', 'up');
  const hosts = Array.from({ length: count }, (_, index) => {
    const number = index + 1;
    const name = `${id}-${number}`;
    names.push(name);
    ip('netns', 'add', name);
    ip('-n', name, 'link', 'add', 'eth0', 'type', 'veth', 'peer', 'name', `port${number}`, 'netns', hub);
    ip('-n', hub, 'link', 'set', `port${number}`, 'master', 'bridge0', 'up');
    ip('-n', name, 'address', 'add', `${subnet}.${number}/24`, 'dev', 'eth0');
    for (const device of ['lo', 'eth0']) ip('-n', name, 'link', 'set', device, 'up');
    return makeHost({ name, address: `${subnet}.${number}`, user: firstUser + index, home: join(root, String(number)), running });
  });
  return {
    hosts,
    async close() {
      await Promise.all(
        [...running].map(
          (child) =>
            new Promise<void>((resolve) => {
              child.once('exit', () => resolve());
              child.kill('SIGKILL');
            }),
        ),
      );
      for (const name of names) {
        for (const pid of pidsIn(name)) process.kill(pid, 'SIGKILL');
        ip('netns', 'del', name);
      }
      rmSync(root, { recursive: true, force: true });
    },
  };
}

interface HostOptions {
  name: string;
  address: string;
  user: number;
  home: string;
  running: Set<ChildProcess>;
}

function makeHost({ name, address, user, home, running }: HostOptions): Host {
  for (const folder of [home, join(home, 'tmp')]) {
    mkdirSync(folder, { mode: 0o700 });
    chownSync(folder, user, user);
  }
  const env = { PATH: process.env['PATH'] ?? '', HOME: home, TMPDIR: join(home, 'tmp'), SHARDMESH_CACHE: join(home, 'cache') };
  const run = (file: string, args: string[]): HostProcess => {
    const inside = [
      'netns',
      'exec',
      name,
      'setpriv',
      `--reuid=${user}`,
      `--regid=${user}`,
      '--clear-groups',
      '--inh-caps=-all',
      '--',
      file,
      ...args,
    ];
    const child = spawn('ip', inside, { stdio: ['ignore', 'pipe', 'pipe'], env, cwd: home });
    running.add(child);
    let output = '';
    child.stdout.on('data', (part: Buffer) => (output += part.toString()));
    child.stderr.on('data', (part: Buffer) => (output += part.toString()));
    const ended = new Promise<number | null>((resolve) => child.once('close', (code) => (running.delete(child), resolve(code))));
    return { child, output: () => output, ended };
  };
  return {
    namespace: name,
    address,
    home,
    bytesSent: () => {
      const [link] = JSON.parse(execFileSync('ip', ['-n', name, '-s', '-j', 'link', 'show', 'eth0'], { encoding: 'utf8' })) as [
        { stats64: { tx: { bytes: number } } },
      ];
      return link.stats64.tx.bytes;
    },
    run,
    give: (path, to) => {
      const target = join(env.SHARDMESH_CACHE, to);
      cpSync(path, target, { recursive: true, dereference: true });
      execFileSync('chown', ['-R', `${user}:${user}`, env.SHARDMESH_CACHE]);
    },
    shardmesh: (...args) => run(process.execPath, [cli, ...args]),
    answer: async (process) => ({ code: await process.ended, output: process.output() }),
  };
}

/** What a killed process may have left behind in the namespace. */
function pidsIn(name: string): number[] {
  const pids = execFileSync('ip', ['netns', 'pids', name], { encoding: 'utf8' });
  return pids.split('\n').filter(Boolean).map(Number);
}

const ip = (...args: string[]): void => void execFileSync('ip', args, { stdio: ['ignore', 'ignore', 'pipe'] });
