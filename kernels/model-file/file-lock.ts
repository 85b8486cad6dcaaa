/** A lock file: one process at a time works on a path, others wait. Survives crashes: a lock whose owner is gone, or that was not touched for a while, is taken over. */
import { open, readFile, rename, rm, stat, utimes } from 'node:fs/promises';
import { hostname } from 'node:os';

const touchMs = 3_000;
const staleMs = 20_000;
const pollMs = 200;

export interface LockOptions {
  signal?: AbortSignal;
  /** Called once when somebody else holds the lock. */
  onWait?: (owner: string) => void;
}

/** Runs `work` while holding the lock at `path`. Waits as long as its owner lives; `signal` ends the wait. */
export async function withFileLock<T>(path: string, work: () => Promise<T>, options: LockOptions = {}): Promise<T> {
  const token = `${hostname()} ${process.pid} ${Date.now()} ${Math.random()}`;
  for (let waits = 0; !(await tryTake(path, token)); waits++) {
    options.signal?.throwIfAborted();
    if (await removeIfStale(path)) continue;
    if (waits === 0) options.onWait?.((await ownerOf(path)) ?? 'another process');
    await new Promise((resolve) => setTimeout(resolve, pollMs));
  }
  const touch = setInterval(() => void utimes(path, new Date(), new Date()).catch(() => undefined), touchMs);
  touch.unref();
  try {
    return await work();
  } finally {
    clearInterval(touch);
    // Not ours any more when this process was frozen and another took over.
    if ((await ownerOf(path)) === token) await rm(path, { force: true });
  }
}

async function tryTake(path: string, token: string): Promise<boolean> {
  try {
    const file = await open(path, 'wx', 0o600);
    try {
      await file.writeFile(token);
    } finally {
      await file.close();
    }
    return true;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EEXIST') return false;
    throw error;
  }
}

const ownerOf = (path: string): Promise<string | null> => readFile(path, 'utf8').catch(() => null);

/** True when there is no lock any more. */
async function removeIfStale(path: string): Promise<boolean> {
  const owner = await ownerOf(path);
  const found = await stat(path).catch(() => null);
  if (owner === null || !found) return true;
  const [host, pid] = owner.split(' ');
  const dead = host === hostname() && !isAlive(Number(pid));
  if (!dead && Date.now() - found.mtimeMs < staleMs) return false;
  // Moved aside first: of two that find it stale only one moves it, and a lock taken in between is put back.
  const aside = `${path}.${process.pid}.${Math.random().toString(36).slice(2)}.stale`;
  try {
    await rename(path, aside);
  } catch {
    return true;
  }
  if ((await ownerOf(aside)) !== owner) await rename(aside, path).catch(() => undefined);
  await rm(aside, { force: true });
  return true;
}

function isAlive(pid: number): boolean {
  if (!Number.isInteger(pid) || pid < 1) return false;
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}
