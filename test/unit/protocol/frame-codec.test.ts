import fc from 'fast-check';
import { crc32 } from 'node:zlib';
import { describe, expect, test } from 'vitest';
import { FrameError, type FrameErrorReason } from '../../../protocol/errors.ts';
import { encodeFrameChunks, FrameAssembler } from '../../../protocol/frame-chunks.ts';
import {
  decodeFrame,
  encodeFrame,
  encodeFrameHeader,
  frameHeaderBytes,
  sealFrame,
  type Frame,
  type FrameDtype,
  type FrameHeader,
  type FrameKind,
} from '../../../protocol/frame-codec.ts';
import { idFromBytes, type Id } from '../../../protocol/ids.ts';
import { mutate, seededRandom } from './mutate.ts';

const mesh = idFromBytes(new Uint8Array(16).fill(0x11)) as Id;
const placement = idFromBytes(new Uint8Array(16).fill(0x22)) as Id;

const header: FrameHeader = {
  mesh,
  placement,
  epoch: 3,
  step: 0x01020304,
  operation: 0x0506,
  subtree: 1,
  kind: 'reduce',
  source: { stage: 2, rank: 4 },
  dtype: 'f32',
  rows: 1,
};
const payload = Uint8Array.of(1, 2, 3, 4, 5, 6, 7, 8);

/** A right frame with some bytes changed and its crc made right again. */
function altered(changes: [at: number, bytes: number[]][]): Buffer {
  const frame = encodeFrame(header, payload);
  for (const [at, bytes] of changes) frame.set(bytes, at);
  frame.writeUInt32LE(crc32(frame.subarray(frameHeaderBytes), crc32(frame.subarray(0, 76))), 76);
  return frame;
}

const reasonOf = (bytes: Uint8Array, expectedMesh?: Id): FrameErrorReason | null => {
  try {
    decodeFrame(bytes, expectedMesh);
    return null;
  } catch (error) {
    if (error instanceof FrameError) return error.reason;
    throw error;
  }
};

describe('frame codec', () => {
  test('frame codec - lays the header out as documented, 80 bytes, little-endian', () => {
    const frame = encodeFrame(header, payload);
    expect(frame.length).toBe(88);
    expect(frame.subarray(0, 76).toString('hex')).toBe(
      '534d4652' + // SMFR
        '0100' + // version 1
        '01' + // reduce
        '01' + // f32
        '11'.repeat(16) +
        '22'.repeat(16) +
        '03000000' + // epoch
        '04030201' + // step
        '0605' + // operation
        '0100' + // subtree
        '0200' + // stage
        '0400' + // rank
        '01000000' + // rows
        '08000000' + // length
        '00000000' + // offset
        '08000000' + // total
        '00000000',
    );
    expect(frame.subarray(80).toString('hex')).toBe('0102030405060708');
  });

  test('frame codec - gives the payload as a view, without a copy', () => {
    const frame = encodeFrame(header, payload);
    const decoded = decodeFrame(frame);
    expect(decoded.payload.buffer).toBe(frame.buffer);
    expect(decoded.payload.byteOffset).toBe(frame.byteOffset + 80);
  });

  test('frame codec - a header alone, a sealed buffer and a whole frame are the same bytes', () => {
    const whole = encodeFrame(header, payload);
    expect(Buffer.concat([encodeFrameHeader(header, payload), payload])).toEqual(whole);
    const inPlace = Buffer.alloc(88);
    inPlace.set(payload, 80);
    sealFrame(inPlace, header);
    expect(inPlace).toEqual(whole);
  });

  test('frame codec - seals a payload where it lies when there is room in front of it, and copies it when there is not', () => {
    const whole = encodeFrame(header, payload);
    const room = Buffer.alloc(100, 0xff);
    const behind = room.subarray(90, 98);
    behind.set(payload);
    const sealed = encodeFrame(header, behind, 80);
    expect(sealed).toEqual(whole);
    expect([sealed.buffer, sealed.byteOffset]).toEqual([room.buffer, room.byteOffset + 10]);
    expect([room[9], room[98]]).toEqual([0xff, 0xff]);
    const copied = encodeFrame(header, behind, 79);
    expect(copied).toEqual(whole);
    expect(copied.buffer === room.buffer && copied.byteOffset === room.byteOffset + 10).toBe(false);
  });

  test('frame codec - brings every frame back', () => {
    const kinds: FrameKind[] = ['reduce', 'rows', 'logits', 'hidden', 'tokens', 'probe', 'echo'];
    const elementBytes: Record<FrameDtype, number> = { f32: 4, bf16: 2, q8: 34, i32: 4, bytes: 1 };
    const bytes16 = fc.uint8Array({ minLength: 16, maxLength: 16 }).map((bytes) => idFromBytes(bytes) as Id);
    const frames = fc.record({
      mesh: bytes16,
      placement: bytes16,
      epoch: fc.integer({ min: 0, max: 0xffff_ffff }),
      step: fc.integer({ min: 0, max: 0xffff_ffff }),
      operation: fc.integer({ min: 0, max: 0xffff }),
      subtree: fc.integer({ min: 0, max: 0xffff }),
      kind: fc.constantFrom(...kinds),
      source: fc.record({ stage: fc.integer({ min: 0, max: 0xffff }), rank: fc.integer({ min: 0, max: 0xffff }) }),
      dtype: fc.constantFrom<FrameDtype>('f32', 'bf16', 'q8', 'i32', 'bytes'),
      rows: fc.integer({ min: 0, max: 1_048_576 }),
    });
    fc.assert(
      fc.property(frames, fc.uint8Array({ maxLength: 40 }), (fields, unit) => {
        const bytes = new Uint8Array(unit.length * elementBytes[fields.dtype]).map((_, i) => unit[i % unit.length] ?? 0);
        const { payload: decodedPayload, offset, total, ...decoded } = decodeFrame(encodeFrame(fields, bytes), fields.mesh);
        expect(decoded).toEqual(fields);
        expect(Buffer.from(decodedPayload)).toEqual(Buffer.from(bytes));
        expect([offset, total]).toEqual([0, bytes.length]);
      }),
    );
  });

  test.each<[string, FrameErrorReason, Uint8Array]>([
    ['an empty frame', 'short', new Uint8Array(0)],
    ['a header that ends early', 'short', encodeFrame(header, payload).subarray(0, 79)],
    ['another magic', 'magic', altered([[0, [0x47]]])],
    ['a version this build does not read', 'version', altered([[4, [2, 0]]])],
    ['version 0', 'version', altered([[4, [0, 0]]])],
    ['an unknown kind', 'kind', altered([[6, [0]]])],
    ['a kind beyond the table', 'kind', altered([[6, [255]]])],
    ['an unknown dtype', 'dtype', altered([[7, [6]]])],
    ['more rows than the limit', 'range', altered([[56, [1, 0, 16, 0]]])],
    ['a payload shorter than announced', 'length', encodeFrame(header, payload).subarray(0, 87)],
    ['bytes behind the payload', 'length', Buffer.concat([encodeFrame(header, payload), Buffer.alloc(1)])],
    ['a chunk that ends behind its whole', 'length', altered([[64, [4, 0, 0, 0]]])],
    ['a whole payload over the limit', 'length', altered([[68, [0, 0, 0, 8]]])],
    ['a payload that is no whole number of elements', 'length', altered([[7, [3]]])],
    ['a reserved field that is used', 'reserved', altered([[72, [1]]])],
  ])('frame codec - rejects %s', (_, reason, bytes) => {
    expect(reasonOf(bytes)).toBe(reason);
  });

  test('frame codec - rejects a frame longer than its limit without allocating it', () => {
    const frame = encodeFrame(header, payload);
    frame.writeUInt32LE(0xffff_ffff, 60);
    const before = process.memoryUsage().arrayBuffers;
    expect(() => decodeFrame(frame)).toThrow('payload of 4294967295 bytes is over the limit of 67108864');
    expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(1_000_000);
  });

  test('frame codec - rejects a frame of another mesh', () => {
    expect(reasonOf(encodeFrame(header, payload), placement)).toBe('mesh');
    expect(reasonOf(encodeFrame(header, payload), mesh)).toBeNull();
  });

  test('frame codec - sees every single flipped bit of a frame', () => {
    const frame = encodeFrame(header, payload);
    for (let bit = 0; bit < frame.length * 8; bit++) {
      const flipped = Buffer.from(frame);
      flipped[bit >> 3] = (flipped[bit >> 3] ?? 0) ^ (1 << (bit & 7));
      expect(reasonOf(flipped), `bit ${bit}`).not.toBeNull();
    }
  });

  test.each([
    ['epoch', { epoch: -1 }],
    ['step', { step: 2 ** 32 }],
    ['operation', { operation: 65_536 }],
    ['subtree', { subtree: 0.5 }],
    ['rank', { source: { stage: 0, rank: -1 } }],
    ['rows', { rows: 1_048_577 }],
    ['mesh', { mesh: 'not-an-id' as Id }],
  ])('frame codec - does not encode a frame whose %s does not fit', (name, change) => {
    expect(() => encodeFrame({ ...header, ...change }, payload)).toThrow(FrameError);
    expect(() => encodeFrame({ ...header, ...change }, payload)).toThrow(name);
  });

  test('frame codec fuzz - 20,000 broken frames give FrameError or a frame, nothing else', () => {
    const seed = 42;
    const random = seededRandom(seed);
    const right = encodeFrame(header, payload);
    let accepted = 0;
    for (let i = 0; i < 20_000; i++) {
      const bytes = mutate(right, random);
      try {
        decodeFrame(bytes);
        accepted++;
        // Only a mutation that changed nothing may pass.
        expect(Buffer.compare(bytes, right)).toBe(0);
      } catch (error) {
        if (!(error instanceof FrameError)) throw new Error(`seed ${seed}, input ${i}: ${String(error)}`, { cause: error });
      }
    }
    expect(accepted).toBeLessThan(1_000);
  });

  test('frame codec fuzz - 20,000 frames with wrong fields and a right crc give FrameError or a frame within limits', () => {
    const seed = 43;
    const random = seededRandom(seed);
    let accepted = 0;
    for (let i = 0; i < 20_000; i++) {
      const bytes = altered([[Math.floor(random() * 76), [Math.floor(random() * 256)]]]);
      try {
        const frame = decodeFrame(bytes);
        accepted++;
        expect(frame.offset + frame.payload.length).toBeLessThanOrEqual(frame.total);
        expect(frame.rows).toBeLessThanOrEqual(1_048_576);
      } catch (error) {
        if (!(error instanceof FrameError)) throw new Error(`seed ${seed}, input ${i}: ${String(error)}`, { cause: error });
      }
    }
    expect(accepted).toBeGreaterThan(5_000);
  });
});

describe('frame chunks', () => {
  const large = new Uint8Array(1_200_000).map((_, i) => (i * 31 + (i >> 8)) & 255);
  const chunksOf = (bytes: Uint8Array, change: Partial<FrameHeader> = {}): Frame[] =>
    [...encodeFrameChunks({ ...header, ...change }, bytes, 1_048_576)].map((chunk) => decodeFrame(chunk, mesh));

  test('frame chunks - cuts at 512 KiB and joins in any order, repeated chunks included', () => {
    const chunks = chunksOf(large);
    expect(chunks.map(({ offset, payload: part }) => [offset, part.length])).toEqual([
      [0, 524_288],
      [524_288, 524_288],
      [1_048_576, 151_424],
    ]);
    const assembler = new FrameAssembler();
    const [first, second, third] = chunks as [Frame, Frame, Frame];
    expect(assembler.add(third)).toBeNull();
    expect(assembler.add(first)).toBeNull();
    expect(assembler.add(first)).toBeNull();
    const whole = assembler.add(second);
    expect(whole?.offset).toBe(0);
    expect(Buffer.compare(whole?.payload ?? new Uint8Array(0), large)).toBe(0);
    expect(assembler.pendingBytes).toBe(0);
  });

  test('frame chunks - keeps every chunk within a smaller message limit', () => {
    const chunks = [...encodeFrameChunks(header, large, 65_536)];
    expect(chunks).toHaveLength(19);
    expect(Math.max(...chunks.map((chunk) => chunk.length))).toBe(65_536);
  });

  test('frame chunks - hands whole frames through, the empty one too', () => {
    const assembler = new FrameAssembler();
    for (const bytes of [payload, new Uint8Array(0)]) {
      const [only] = chunksOf(bytes) as [Frame];
      expect(assembler.add(only)).toBe(only);
    }
  });

  test('frame chunks - keeps frames of two steps, sources and subtrees apart', () => {
    const assembler = new FrameAssembler();
    const variants = [{}, { step: 9 }, { subtree: 2 }, { source: { stage: 2, rank: 5 } }, { operation: 7 }, { epoch: 4 }];
    const cut = variants.map((change) => chunksOf(large, change));
    for (const chunks of cut) expect(assembler.add(chunks[0] as Frame)).toBeNull();
    for (const chunks of cut) expect(assembler.add(chunks[1] as Frame)).toBeNull();
    for (const chunks of cut) expect(assembler.add(chunks[2] as Frame)?.payload.length).toBe(1_200_000);
  });

  test('frame chunks - drops the oldest incomplete frame when there is no room', () => {
    const assembler = new FrameAssembler({ framesMax: 64, bytesMax: 3_000_000 });
    for (let step = 1; step <= 3; step++) assembler.add(chunksOf(large, { step })[0] as Frame);
    expect(assembler.dropped).toBe(1);
    expect(assembler.pendingBytes).toBe(2_400_000);
    // Step 1 is gone: its other chunks do not complete it.
    for (const chunk of chunksOf(large, { step: 1 }).slice(1)) expect(assembler.add(chunk)).toBeNull();
  });

  test('frame chunks - forgets the chunks of old epochs', () => {
    const assembler = new FrameAssembler();
    assembler.add(chunksOf(large, { epoch: 3 })[0] as Frame);
    assembler.add(chunksOf(large, { epoch: 4 })[0] as Frame);
    assembler.forgetBefore(4);
    expect(assembler.pendingBytes).toBe(1_200_000);
  });

  test('frame chunks - refuses chunks that contradict each other or are tiny', () => {
    const [first, second] = chunksOf(large) as [Frame, Frame];
    const assembler = new FrameAssembler();
    assembler.add(first);
    expect(() => assembler.add({ ...second, total: 1_300_000 })).toThrow(FrameError);
    expect(assembler.pendingBytes).toBe(0);
    expect(() => assembler.add({ ...second, payload: second.payload.subarray(0, 100) })).toThrow('below the least of 1024');
    // As many bytes as the whole has, but overlapping.
    const third = { ...second, offset: 262_144 };
    const fourth = { ...second, offset: 1_048_576, payload: second.payload.subarray(0, 151_424) };
    assembler.add(first);
    assembler.add(third);
    expect(() => assembler.add(fourth)).toThrow('overlap');
    expect(assembler.pendingBytes).toBe(0);
  });
});
