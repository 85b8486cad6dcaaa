/** What a test does to the processes of a mesh, and how it sees that none is left. */
import { randomUUID } from 'node:crypto';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

/** Marks everything that descends from one start: the environment and the temporary folder are inherited, whatever becomes of the parent. */
export interface Marked {
  env: Record<string, string>;
  /** Command lines of the processes that are left, by pid. */
  processes(): Map<number, string>;
  /** Its temporary folder. */
  folder: string;
  /** Files in its temporary folder. */
  files(): string[];
  /** Kills what is left, removes the folder. */
  dispose(): void;
}

export function mark(): Marked {
  const tag = `SHARDMESH_TEST_RUN=${randomUUID()}`;
  const folder = mkdtempSync(join(tmpdir(), 'test-shardmesh-'));
  const processes = (): Map<number, string> => {
    const found = new Map<number, string>();
    for (const name of readdirSync('/proc')) {
      if (!/^\d+$/.test(name)) continue;
      try {
        if (!readFileSync(`/proc/${name}/environ`, 'latin1').includes(tag)) continue;
        // A zombie has no command line and holds nothing; whoever inherits it reaps it.
        if (/^State:\s+Z/m.test(readFileSync(`/proc/${name}/status`, 'latin1'))) continue;
        found.set(Number(name), readFileSync(`/proc/${name}/cmdline`, 'latin1').replaceAll('\0', ' ').trim());
      } catch {
        // It ended while we looked.
      }
    }
    return found;
  };
  return {
    env: { [tag.split('=')[0] ?? '']: tag.split('=')[1] ?? '', TMPDIR: folder },
    folder,
    processes,
    files: () => readdirSync(folder),
    dispose: () => {
      for (const pid of processes().keys()) signal(pid, 'SIGKILL');
      rmSync(folder, { recursive: true, force: true });
    },
  };
}

/** Sends a signal; one that comes too late is fine. */
export function signal(pid: number, name: NodeJS.Signals): void {
  try {
    process.kill(pid, name);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}

/** pid of the process whose command line matches. @throws when there is none, or more than one */
export function pidOf(marked: Marked, pattern: RegExp): number {
  const found = [...marked.processes()].filter(([, command]) => pattern.test(command));
  const [only] = found;
  if (!only || found.length > 1)
    throw new Error(`${found.length} processes match ${pattern}: ${JSON.stringify([...marked.processes()])}`);
  return only[0];
}

export const natsServerPattern = /^\S*nats-server -c /;

/** Names in shared memory and the temporary folder that a mesh could have left. */
export function leftovers(marked: Marked): string[] {
  const shared = readdirSync('/dev/shm').filter((name) => name.includes('shardmesh'));
  return [...[...marked.processes()].map(([pid, command]) => `${pid} ${command}`), ...marked.files(), ...shared];
}

/** Asks again and again. @returns milliseconds it took @throws when `check` stays false or undefined */
export async function waitFor(
  what: string,
  timeoutMs: number,
  check: () => boolean | Promise<boolean>,
  detail: () => unknown = () => '',
): Promise<number> {
  const started = performance.now();
  for (;;) {
    if (await check()) return performance.now() - started;
    if (performance.now() - started > timeoutMs)
      throw new Error(`not within ${timeoutMs} ms: ${what} ${JSON.stringify(detail())}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}
