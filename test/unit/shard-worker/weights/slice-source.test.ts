import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { copyFileSync, existsSync, mkdirSync, readdirSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { WeightServer } from '../../../../coordinator/mesh/weight-server.ts';
import { openModel } from '../../../../kernels/model-file/model-file.ts';
import type { ModelFacts } from '../../../../kernels/model-file/model-facts.ts';
import { sliceOf, sliceSha256, type Slice } from '../../../../kernels/model-file/slice.ts';
import { buildProgram, cutModel, unitsOfModel } from '../../../../kernels/programs/index.ts';
import type { Program } from '../../../../kernels/programs/program.ts';
import { newMeshId } from '../../../../protocol/ids.ts';
import { createGrpcClient, openWeightsFetch } from '../../../../protocol/grpc/index.ts';
import { fetchSlice } from '../../../../shard-worker/weights/slice-fetch.ts';
import { openSlice, type OpenSliceOptions } from '../../../../shard-worker/weights/slice-source.ts';
import { scratchDirectory, tinyModel, writeGguf } from '../../kernels/model-file/gguf-writer.ts';

const secret = 'a-secret-of-this-mesh';
const access = { secret, mesh: newMeshId(), tls: null };
let directory: string;
let modelPath: string;
let facts: ModelFacts;
let program: Program;
let slice: Slice;
let sha256: string;
let server: WeightServer;
let address: string;
let refused: string[];

beforeEach(async () => {
  directory = scratchDirectory();
  modelPath = writeGguf(directory, tinyModel({ layers: 3, vocabulary: 8000 }));
  ({ facts } = await openModel(modelPath, { cacheDirectory: join(directory, 'coordinator') }));
  const cut = cutModel(unitsOfModel(facts), { count: 2, parts: null }, { count: 1, parts: null });
  program = buildProgram(facts, cut, { stage: 0, rank: 1, activations: 'int8', kvType: 'auto', contextTokensMax: null });
  slice = sliceOf(program, facts);
  sha256 = await sliceSha256(modelPath, slice);
  refused = [];
  server = new WeightServer(access, { onRefused: ({ reason }) => refused.push(reason) });
  address = await server.listen();
  server.offer(slice, modelPath);
});
afterEach(() => {
  server.close();
  rmSync(directory, { recursive: true, force: true });
});

const options = (rest: Partial<OpenSliceOptions> = {}): OpenSliceOptions => ({
  facts,
  program,
  sliceSha256: sha256,
  modelPath: '/nowhere/model.gguf',
  cacheDirectory: join(directory, 'worker'),
  fetch: { server: address, secret, tls: null, caller: 'worker-1' },
  ...rest,
});

async function take(given: OpenSliceOptions) {
  const source = await openSlice(given);
  try {
    const weights = new Map<number, Buffer>();
    for await (const { index, data } of source.weights()) weights.set(index, data);
    return { origin: source.origin, bytesFetched: source.bytesFetched, sha256: source.sha256(), weights };
  } finally {
    await source.close();
  }
}

/** Blocks of a weight, cut from the whole file the obvious way. */
function blocksOf(index: number): Buffer {
  const weight = program.weights[index];
  const tensor = facts.tensors.find(({ name }) => name === weight?.tensor);
  if (!weight || !tensor) throw new Error('no such weight');
  const file = readFileSync(modelPath);
  const [block, bytes] = weight.type === 'F32' ? [1, 4] : [32, 34];
  const stride = ((tensor.shape[0] ?? 0) / block) * bytes;
  const rows: Buffer[] = [];
  for (let row = weight.rows.from; row < weight.rows.to; row++)
    rows.push(
      file.subarray(
        tensor.offset + row * stride + (weight.columns.from / block) * bytes,
        tensor.offset + row * stride + (weight.columns.to / block) * bytes,
      ),
    );
  return Buffer.concat(rows);
}

describe('slice source', () => {
  it('slice source - gives each weight of the program its own blocks, whatever the way', async () => {
    const ways = [await take(options({ modelPath })), await take(options()), await take(options())];
    expect(ways.map(({ origin, bytesFetched }) => [origin, bytesFetched])).toEqual([
      ['disk', 0],
      ['coordinator', slice.bytes],
      ['cache', 0],
    ]);
    for (const { weights, sha256: digest } of ways) {
      expect(digest).toBe(sha256);
      expect(weights.size).toBe(program.weights.length);
      for (const [index, data] of weights) expect(data.equals(blocksOf(index))).toBe(true);
    }
  });

  it('slice source - a second start moves 0 bytes', async () => {
    await take(options());
    expect(server.bytesSent).toBe(slice.bytes);
    await take(options({ fetch: null }));
    expect(server.bytesSent).toBe(slice.bytes);
  });

  it('slice source - fetches only what is missing after an interrupted fetch', async () => {
    const slices = join(directory, 'worker', 'slices');
    await take(options());
    const whole = readFileSync(join(slices, `${slice.address}.slice`));
    rmSync(join(slices, `${slice.address}.slice`));
    writeFileSync(join(slices, `${slice.address}.incomplete`), whole.subarray(0, 100_000));
    expect(await take(options())).toMatchObject({ origin: 'coordinator', bytesFetched: slice.bytes - 100_000, sha256 });
    expect(readdirSync(slices)).toEqual([`${slice.address}.slice`]);
  });

  it('slice source - throws a damaged cached slice away and fetches it again', async () => {
    await take(options());
    const cached = join(directory, 'worker', 'slices', `${slice.address}.slice`);
    const bytes = readFileSync(cached);
    bytes[1000] = (bytes[1000] ?? 0) ^ 1;
    writeFileSync(cached, bytes);
    expect(await take(options())).toMatchObject({ origin: 'coordinator', sha256 });
    truncateSync(cached, 10);
    expect(await take(options())).toMatchObject({ origin: 'coordinator', sha256 });
  });

  it('slice source - a slice with another digest than expected is not kept', async () => {
    await expect(take(options({ sliceSha256: 'ff'.repeat(32) }))).rejects.toMatchObject({ code: 'digest_mismatch' });
    expect(readdirSync(join(directory, 'worker', 'slices'))).toEqual([]);
  });

  it('slice source - does not use a model file of the same size with other bytes', async () => {
    const other = join(directory, 'other.gguf');
    copyFileSync(modelPath, other);
    const bytes = readFileSync(other);
    const at = facts.tensors.find(({ name }) => name === 'output_norm.weight')?.offset ?? 0;
    bytes[at] = (bytes[at] ?? 0) ^ 1;
    writeFileSync(other, bytes);
    expect(await take(options({ modelPath: other }))).toMatchObject({ origin: 'coordinator', sha256 });
  });

  it('slice source - refuses a scale that is not finite before it gives the weight out', async () => {
    const bytes = readFileSync(modelPath);
    const tensor = facts.tensors.find(({ name }) => name === 'blk.1.ffn_up.weight');
    bytes.writeUInt16LE(0x7c00, (tensor?.offset ?? 0) + (tensor?.bytes ?? 0) - 34);
    writeFileSync(modelPath, bytes);
    const digest = await sliceSha256(modelPath, slice);
    await expect(take(options({ modelPath, sliceSha256: digest }))).rejects.toThrow(
      'tensor blk.1.ffn_up.weight (Q8_0) has a scale that is not finite',
    );
  });

  it('slice source - two workers that want one slice at once fetch it once', async () => {
    const both = await Promise.all([take(options()), take(options())]);
    expect(both.map((one) => one.sha256)).toEqual([sha256, sha256]);
    expect(server.bytesSent).toBe(slice.bytes);
    expect(existsSync(join(directory, 'worker', 'slices', `${slice.address}.slice.lock`))).toBe(false);
  });

  it('slice source - tells progress up to the whole', async () => {
    const seen: [number, number, string][] = [];
    const report = (done: number, total: number, origin: string): void => void seen.push([done, total, origin]);
    await take(options({ onProgress: report }));
    expect(seen.at(-1)).toEqual([slice.bytes, slice.bytes, 'coordinator']);
    expect(seen.length).toBeGreaterThan(5);
  });

  it('slice source - without file, cache and coordinator says so', async () => {
    await expect(openSlice(options({ fetch: null }))).rejects.toThrow(
      'the model file is not at /nowhere/model.gguf, its slice is not cached',
    );
  });
});

describe('weight server', () => {
  const fetchAll = async (rest: Partial<Parameters<typeof fetchSlice>[0]> = {}): Promise<Buffer> => {
    const parts: Buffer[] = [];
    for await (const part of fetchSlice({
      server: address,
      secret,
      tls: null,
      caller: 'worker-1',
      slice,
      offset: 0,
      backoffMs: 5,
      triesMax: 3,
      ...rest,
    }))
      parts.push(part);
    return Buffer.concat(parts);
  };

  it('weight server - refuses a wrong secret, an unknown slice and an offset past the end', async () => {
    await expect(fetchAll({ secret: 'another-secret-here' })).rejects.toThrow(
      'the call does not carry the secret, or the certificate,',
    );
    await expect(fetchAll({ slice: { address: 'ab'.repeat(32), bytes: 10 } })).rejects.toThrow(
      'slice abababababab is of no rank of this placement',
    );
    await expect(fetchAll({ slice: { ...slice, bytes: slice.bytes + 10 }, offset: slice.bytes + 1 })).rejects.toThrow(
      `is past the slice's ${slice.bytes} bytes`,
    );
    server.withdraw(slice.address);
    await expect(fetchAll()).rejects.toThrow('is of no rank of this placement');
    expect(refused).toHaveLength(4);
    expect(server.bytesSent).toBe(0);
  });

  it.each([
    '',
    '{',
    '[]',
    '{"slice":"../../etc/passwd","offset":0}',
    '{"offset":0}',
    `{"slice":"${'ab'.repeat(32)}","offset":-1}`,
    `{"slice":"${'ab'.repeat(32)}","offset":1e99}`,
  ])('weight server - answers request %j with INVALID_ARGUMENT', async (request) => {
    const client = createGrpcClient(address);
    const call = openWeightsFetch(client, secret, 'worker-1', Buffer.from(request), 5_000);
    const error = await new Promise<unknown>((resolve) => call.on('error', resolve).on('data', () => undefined));
    expect(error).toMatchObject({ code: 3 });
    client.close();
  });

  it('weight server - goes on from an offset', async () => {
    const whole = await fetchAll();
    expect((await fetchAll({ offset: 300_000 })).equals(whole.subarray(300_000))).toBe(true);
    expect(await fetchAll({ offset: slice.bytes })).toHaveLength(0);
  });

  it('weight server - that restarts in the middle is asked for the rest', async () => {
    const port = Number(address.split(':')[1]);
    const parts: Buffer[] = [];
    for await (const part of fetchSlice({
      server: address,
      secret,
      tls: null,
      caller: 'worker-1',
      slice,
      offset: 0,
      backoffMs: 20,
      triesMax: 20,
    })) {
      parts.push(part);
      if (parts.length !== 1) continue;
      server.close();
      server = new WeightServer(access);
      await server.listen({ port });
      server.offer(slice, modelPath);
    }
    expect(Buffer.concat(parts).equals(await fetchAll())).toBe(true);
  });

  it('weight server - that is gone is named after a few tries', async () => {
    server.close();
    await expect(fetchAll()).rejects.toThrow(
      `could not be fetched from coordinator ${address} (at byte 0 of ${slice.bytes}, try 3)`,
    );
  });

  it('weight server - that lost its model file says so without the path', async () => {
    rmSync(modelPath);
    mkdirSync(modelPath);
    await expect(fetchAll()).rejects.toThrow('the model file could not be read: EISDIR');
  });
});
