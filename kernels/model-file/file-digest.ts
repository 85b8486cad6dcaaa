/** sha256 of files, remembered by path, size and time of change, so that a large model is hashed once. */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { mkdir, readFile, rename, stat, writeFile } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';

/** sha256 of a file (or of its first `bytes`), lower-case hex. @param onBytes bytes hashed so far */
export async function fileSha256(
  path: string,
  options: { bytes?: number; onBytes?: (done: number) => void } = {},
): Promise<string> {
  const hash = createHash('sha256');
  let done = 0;
  if (options.bytes === 0) return hash.digest('hex');
  const end = options.bytes === undefined ? {} : { end: options.bytes - 1 };
  for await (const chunk of createReadStream(path, { highWaterMark: 1 << 20, ...end })) {
    hash.update(chunk as Buffer);
    done += (chunk as Buffer).length;
    options.onBytes?.(done);
  }
  return hash.digest('hex');
}

interface Remembered {
  path: string;
  bytes: number;
  changedNs: string;
  sha256: string;
}

/** As `fileSha256`, from memory when size and time of change are those of the last time. */
export async function rememberedSha256(path: string, cacheDirectory: string, onBytes?: (done: number) => void): Promise<string> {
  const known = await knownSha256(path, cacheDirectory);
  if (known !== null) return known;
  // Taken before the bytes are read: a file that changes meanwhile is hashed again next time.
  const now = await stateOf(path);
  const sha256 = await fileSha256(now.path, onBytes ? { onBytes } : {});
  await remember({ ...now, sha256 }, cacheDirectory);
  return sha256;
}

/** What is remembered of this file as it is now, null when nothing is. */
export async function knownSha256(path: string, cacheDirectory: string): Promise<string | null> {
  const now = await stateOf(path);
  const known = await readRecord(recordPath(now.path, cacheDirectory));
  return known && known.path === now.path && known.bytes === now.bytes && known.changedNs === now.changedNs ? known.sha256 : null;
}

/** Notes the digest of a file that has just been computed, so that the next start need not. */
export async function rememberSha256(path: string, sha256: string, cacheDirectory: string): Promise<void> {
  await remember({ ...(await stateOf(path)), sha256 }, cacheDirectory);
}

async function stateOf(path: string): Promise<Omit<Remembered, 'sha256'>> {
  const full = resolve(path);
  const found = await stat(full, { bigint: true });
  return { path: full, bytes: Number(found.size), changedNs: String(found.mtimeNs) };
}

const recordPath = (full: string, cacheDirectory: string): string =>
  join(cacheDirectory, 'digests', `${createHash('sha256').update(full).digest('hex')}.json`);

async function remember(record: Remembered, cacheDirectory: string): Promise<void> {
  // Only a convenience: a read-only or full cache directory costs time at the next start, nothing else.
  await writeAtomically(recordPath(record.path, cacheDirectory), JSON.stringify(record)).catch(() => undefined);
}

async function readRecord(path: string): Promise<Remembered | null> {
  try {
    const value = JSON.parse(await readFile(path, 'utf8')) as Partial<Remembered> | null;
    return typeof value?.sha256 === 'string' && /^[0-9a-f]{64}$/.test(value.sha256) ? (value as Remembered) : null;
  } catch {
    return null;
  }
}

/** Writes a small file so that readers see all of it or none. */
export async function writeAtomically(path: string, text: string): Promise<void> {
  await mkdir(dirname(path), { recursive: true });
  const temporary = `${path}.${process.pid}.${Math.random().toString(36).slice(2)}.tmp`;
  await writeFile(temporary, text);
  await rename(temporary, path);
}
