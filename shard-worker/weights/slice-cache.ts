/**
 * Weight slices on this worker's disk, named by their address (a digest, so never a path a peer could choose). A slice is gathered in `<address>.incomplete`, which an
 * interrupted fetch leaves for the next one, and takes its name only after its own sha256 is right; it is checked again before every use.
 */
import { mkdir, open, rename, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { fileSha256 } from '../../kernels/model-file/file-digest.ts';
import { withFileLock } from '../../kernels/model-file/file-lock.ts';
import { ShardmeshError } from '../../protocol/errors.ts';

/** What identifies a slice: where it is kept, and what it must be. */
export interface SliceName {
  address: string;
  bytes: number;
  sha256: string;
}

export class SliceCache {
  readonly #directory: string;

  /** @param cacheDirectory slices go to its folder `slices` */
  constructor(cacheDirectory: string) {
    this.#directory = join(cacheDirectory, 'slices');
  }

  path({ address }: SliceName): string {
    if (!/^[0-9a-f]{64}$/.test(address))
      throw new ShardmeshError('internal', `slice address ${JSON.stringify(address)} is not a sha256`);
    return join(this.#directory, `${address}.slice`);
  }

  /**
   * Path of the slice when it is here and its digest is right. One that is wrong is removed.
   * @param onBytes bytes checked so far
   */
  async find(name: SliceName, onBytes?: (done: number) => void): Promise<string | null> {
    const path = this.path(name);
    const found = await stat(path).catch(() => null);
    if (!found) return null;
    if (found.size === name.bytes && (await fileSha256(path, onBytes ? { onBytes } : {})) === name.sha256) return path;
    await rm(path, { force: true });
    return null;
  }

  /**
   * Gathers a slice that is not here. Processes that want the same one wait for each other, and the second finds what the first has fetched.
   * @param fetch the slice's bytes from an offset on; called once, with how much an earlier run left
   * @returns path, and bytes that were fetched now
   * @throws {ShardmeshError} `digest_mismatch`: what came is not the slice, nothing of it is kept; `load_failed`: the disk is full
   */
  async fill(
    name: SliceName,
    fetch: (offset: number) => AsyncIterable<Uint8Array>,
    options: { onBytes?: (done: number) => void; signal?: AbortSignal } = {},
  ): Promise<{ path: string; bytesFetched: number }> {
    const path = this.path(name);
    await mkdir(this.#directory, { recursive: true });
    const lock = options.signal ? { signal: options.signal } : {};
    try {
      return await withFileLock(
        `${path}.lock`,
        async () => {
          const ready = await this.find(name);
          if (ready) return { path: ready, bytesFetched: 0 };
          return { path, bytesFetched: await this.#gather(name, path, fetch, options.onBytes) };
        },
        lock,
      );
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOSPC') throw error;
      throw new ShardmeshError(
        'load_failed',
        `the disk of ${this.#directory} is full: a slice of ${name.bytes} bytes does not fit; free some space`,
        {
          cause: error,
        },
      );
    }
  }

  async #gather(
    name: SliceName,
    path: string,
    fetch: (offset: number) => AsyncIterable<Uint8Array>,
    onBytes?: (done: number) => void,
  ): Promise<number> {
    const partial = path.replace(/\.slice$/, '.incomplete');
    const file = await open(partial, 'a+', 0o600);
    let fetched = 0;
    try {
      let { size } = await file.stat();
      if (size > name.bytes) {
        await file.truncate(0);
        size = 0;
      }
      if (size < name.bytes)
        for await (const part of fetch(size)) {
          if (size + part.length > name.bytes)
            throw new ShardmeshError('load_failed', `the slice has ${name.bytes} bytes, ${size + part.length} came`);
          await file.appendFile(part);
          size += part.length;
          fetched += part.length;
          onBytes?.(size);
        }
      if (size !== name.bytes)
        throw new ShardmeshError('load_failed', `the slice has ${name.bytes} bytes, the transfer ended at ${size}`);
      await file.sync();
    } finally {
      await file.close();
    }
    const sha256 = await fileSha256(partial);
    if (sha256 !== name.sha256) {
      await rm(partial, { force: true });
      throw new ShardmeshError(
        'digest_mismatch',
        `the fetched slice has sha256 ${sha256}, expected ${name.sha256}; nothing of it is kept`,
      );
    }
    await rename(partial, path);
    await syncDirectory(this.#directory);
    return fetched;
  }
}

/** Makes a rename survive a power cut. */
async function syncDirectory(path: string): Promise<void> {
  const directory = await open(path, 'r');
  try {
    await directory.sync();
  } finally {
    await directory.close();
  }
}
