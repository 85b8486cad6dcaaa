/**
 * Where a worker gets its weights: from the model file when it is on this host, else from the slice cache, else from the coordinator into the cache. Whatever the
 * way, the bytes are the same and their digest is known before the weights are used.
 */
import { createHash } from 'node:crypto';
import { open, stat, type FileHandle } from 'node:fs/promises';
import { knownSha256 } from '../../kernels/model-file/file-digest.ts';
import type { ModelFacts } from '../../kernels/model-file/model-facts.ts';
import { checkScales } from '../../kernels/model-file/scale-check.ts';
import { readSliceBytes, sliceOf, sliceSha256, type Slice, type SliceEntry } from '../../kernels/model-file/slice.ts';
import type { Program } from '../../kernels/programs/program.ts';
import { ShardmeshError } from '../../protocol/errors.ts';
import { SliceCache, type SliceName } from './slice-cache.ts';
import { fetchSlice, type SliceFetchOptions } from './slice-fetch.ts';

export type SliceOrigin = 'disk' | 'cache' | 'coordinator';

export interface SliceSource {
  readonly origin: SliceOrigin;
  readonly bytes: number;
  /** Bytes that crossed the network for it. */
  readonly bytesFetched: number;
  /** Every weight of the program once, in the order of the file: raw blocks, rows in order. Each buffer is the taker's own. */
  weights(): AsyncGenerator<{ index: number; data: Buffer }, void, undefined>;
  /** Digest of the bytes that `weights()` gave. @throws {ShardmeshError} `internal`: not all of them have been taken yet */
  sha256(): string;
  close(): Promise<void>;
}

export interface OpenSliceOptions {
  facts: ModelFacts;
  program: Pick<Program, 'weights'>;
  /** sha256 the slice must have. */
  sliceSha256: string;
  /** May not exist on this host. */
  modelPath: string;
  cacheDirectory: string;
  /** Coordinator's weight server; null: nothing is fetched. */
  fetch: Pick<SliceFetchOptions, 'server' | 'secret' | 'tls' | 'caller'> | null;
  onProgress?: (bytesDone: number, bytesTotal: number, origin: SliceOrigin) => void;
  signal?: AbortSignal;
}

/**
 * @throws {ShardmeshError} `load_failed`: the slice is nowhere to be had; `digest_mismatch`: what was fetched is not the slice
 */
export async function openSlice(options: OpenSliceOptions): Promise<SliceSource> {
  const slice = sliceOf(options.program, options.facts);
  return (await fromDisk(options, slice)) ?? (await fromCache(options, slice)) ?? (await fromCoordinator(options, slice));
}

/** The model file, when it is here and is that file: its digest is remembered from an earlier look, or the slice's own is computed. */
async function fromDisk(options: OpenSliceOptions, slice: Slice): Promise<SliceSource | null> {
  const { modelPath, facts, cacheDirectory } = options;
  if (modelPath === '') return null;
  const found = await stat(modelPath).catch(() => null);
  if (!found?.isFile() || found.size !== facts.sourceBytes) return null;
  const known = await knownSha256(modelPath, cacheDirectory);
  if (known !== null && known !== facts.sourceSha256) return null;
  if (known === null) {
    const sha256 = await sliceSha256(modelPath, slice, (done) =>
      options.onProgress?.(Math.floor(done / 2), slice.bytes, 'disk'),
    ).catch(() => null);
    if (sha256 !== options.sliceSha256) return null;
  }
  return new FileSlice(await open(modelPath, 'r'), slice, 'disk', 0, options);
}

const nameOf = (options: OpenSliceOptions, slice: Slice): SliceName => ({
  address: slice.address,
  bytes: slice.bytes,
  sha256: options.sliceSha256,
});

async function fromCache(options: OpenSliceOptions, slice: Slice): Promise<SliceSource | null> {
  const path = await new SliceCache(options.cacheDirectory).find(nameOf(options, slice), (done) =>
    options.onProgress?.(Math.floor(done / 2), slice.bytes, 'cache'),
  );
  return path === null ? null : new FileSlice(await open(path, 'r'), compact(slice), 'cache', 0, options);
}

async function fromCoordinator(options: OpenSliceOptions, slice: Slice): Promise<SliceSource> {
  const { fetch, signal } = options;
  if (!fetch)
    throw new ShardmeshError(
      'load_failed',
      `the model file is not at ${options.modelPath}, its slice is not cached, and there is no coordinator to fetch it from`,
    );
  const { path, bytesFetched } = await new SliceCache(options.cacheDirectory).fill(
    nameOf(options, slice),
    (offset) => fetchSlice({ ...fetch, slice, offset, ...(signal && { signal }) }),
    { onBytes: (done) => options.onProgress?.(done, slice.bytes, 'coordinator'), ...(signal && { signal }) },
  );
  return new FileSlice(await open(path, 'r'), compact(slice), 'coordinator', bytesFetched, options);
}

/** The same slice as it lies in a file of its own. */
const compact = (slice: Slice): Slice => ({
  ...slice,
  entries: slice.entries.map((entry) => ({ ...entry, offset: entry.at, rowStride: entry.rowBytes })),
});

/** Bytes read at once: progress is told and the abort signal is looked at between reads. */
const readBytes = 4 << 20;

class FileSlice implements SliceSource {
  readonly origin: SliceOrigin;
  readonly bytesFetched: number;
  readonly #file: FileHandle;
  readonly #slice: Slice;
  readonly #options: Pick<OpenSliceOptions, 'onProgress' | 'signal'>;
  #sha256: string | null = null;

  constructor(
    file: FileHandle,
    slice: Slice,
    origin: SliceOrigin,
    bytesFetched: number,
    options: Pick<OpenSliceOptions, 'onProgress' | 'signal'>,
  ) {
    this.#file = file;
    this.#slice = slice;
    this.origin = origin;
    this.bytesFetched = bytesFetched;
    this.#options = options;
  }

  get bytes(): number {
    return this.#slice.bytes;
  }

  async *weights(): AsyncGenerator<{ index: number; data: Buffer }, void, undefined> {
    const hash = createHash('sha256');
    for (const entry of this.#slice.entries) {
      const data = await this.#read(entry, (part) => hash.update(part));
      checkScales(entry.tensor, entry.type, data);
      yield { index: entry.weight, data };
    }
    this.#sha256 = hash.digest('hex');
  }

  async #read(entry: SliceEntry, onPart: (part: Buffer) => void): Promise<Buffer> {
    const { onProgress, signal } = this.#options;
    const data = Buffer.allocUnsafeSlow(entry.bytes);
    for (let done = 0; done < data.length;) {
      signal?.throwIfAborted();
      const part = data.subarray(done, Math.min(data.length, done + readBytes));
      await readSliceBytes(this.#file, this.#slice, entry.at + done, part);
      onPart(part);
      done += part.length;
      onProgress?.(Math.floor((this.#slice.bytes + entry.at + done) / 2), this.#slice.bytes, this.origin);
    }
    return data;
  }

  sha256(): string {
    if (this.#sha256 === null)
      throw new ShardmeshError('internal', 'the digest of a slice was asked for before all of its weights were taken');
    return this.#sha256;
  }

  async close(): Promise<void> {
    await this.#file.close();
  }
}
