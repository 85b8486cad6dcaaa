/**
 * The slice of a model file that one program needs: byte ranges of its weights, in the order of the file. Read one after the other they are the slice's bytes, of
 * which there is one sha256, however a worker gets them. Where a border falls inside a 256-wide block the slice holds the whole block.
 */
import { createHash } from 'node:crypto';
import { open, readFile, type FileHandle } from 'node:fs/promises';
import { join } from 'node:path';
import type { Program, WeightSlice } from '../programs/program.ts';
import { writeAtomically } from './file-digest.ts';
import type { ModelFacts } from './model-facts.ts';
import { ModelFileError } from './model-file-error.ts';
import { quantType } from './quant-types.ts';

/** Blocks of one weight: `rows` pieces of `rowBytes`, `rowStride` apart in the file; in the slice they are adjacent. */
export interface SliceEntry {
  /** Index into `Program.weights`. */
  weight: number;
  tensor: string;
  type: WeightSlice['type'];
  /** Of the first piece, from the start of the file. */
  offset: number;
  rows: number;
  rowBytes: number;
  rowStride: number;
  /** Where the entry begins in the slice. */
  at: number;
  bytes: number;
}

export interface Slice {
  /** What is in it, in words: equal keys of one source are equal bytes. */
  key: string;
  /** sha256 of source digest and key: name of the slice in caches and requests. */
  address: string;
  bytes: number;
  /** Ascending in the file, and so in the slice. */
  entries: SliceEntry[];
}

/** Part of a slice that is read or sent at once. */
export const slicePartBytes = 256 * 1024;

/** @throws {ModelFileError} `inconsistent`: the program names a tensor or a range that the model does not have */
export function sliceOf(program: Pick<Program, 'weights'>, facts: Pick<ModelFacts, 'tensors' | 'sourceSha256'>): Slice {
  const tensors = new Map(facts.tensors.map((tensor) => [tensor.name, tensor]));
  const unplaced = program.weights.map((weight, index) => {
    const tensor = tensors.get(weight.tensor);
    if (!tensor || tensor.type !== weight.type) throw outside(weight, 'the model has no such tensor');
    const { blockValues, blockBytes } = quantType(tensor.type);
    const width = tensor.shape[0] ?? 0;
    const height = tensor.shape.slice(1).reduce((product, size) => product * size, 1);
    const { rows, columns } = weight;
    if (!(
      0 <= rows.from &&
      rows.from < rows.to &&
      rows.to <= height &&
      0 <= columns.from &&
      columns.from < columns.to &&
      columns.to <= width
    ))
      throw outside(weight, `the tensor has ${height} rows of ${width}`);
    const firstBlock = Math.floor(columns.from / blockValues);
    const rowStride = (width / blockValues) * blockBytes;
    const rowBytes = (Math.ceil(columns.to / blockValues) - firstBlock) * blockBytes;
    const count = rows.to - rows.from;
    return {
      weight: index,
      tensor: weight.tensor,
      type: weight.type,
      offset: tensor.offset + rows.from * rowStride + firstBlock * blockBytes,
      rows: count,
      rowBytes,
      rowStride,
      bytes: count * rowBytes,
    };
  });
  unplaced.sort((a, b) => a.offset - b.offset || a.weight - b.weight);
  let at = 0;
  const entries = unplaced.map((entry): SliceEntry => {
    const placed = { ...entry, at };
    at += entry.bytes;
    return placed;
  });
  const key = entries.map(({ tensor, offset, rows, rowBytes }) => `${tensor} ${offset} ${rows}x${rowBytes}`).join('\n');
  const address = createHash('sha256').update(`slice 1\n${facts.sourceSha256}\n${key}`).digest('hex');
  return { key, address, bytes: at, entries };
}

function outside({ tensor, type, rows, columns }: WeightSlice, why: string): ModelFileError {
  return new ModelFileError(
    'inconsistent',
    `the program needs ${tensor} (${type}), rows ${rows.from}..${rows.to}, columns ${columns.from}..${columns.to}: ${why}`,
    { key: tensor },
  );
}

/** Bytes read from the file at once where rows are cut: pieces are picked out of them. */
const gatherBytes = 1 << 20;

/** Fills `target` with the slice's bytes from `position`. @throws {ModelFileError} `truncated`: the file is shorter than it was */
export async function readSliceBytes(file: FileHandle, slice: Slice, position: number, target: Buffer): Promise<void> {
  let index = entryAt(slice, position);
  let done = 0;
  while (done < target.length) {
    const entry = slice.entries[index++];
    if (!entry) throw new RangeError(`position ${position + done} is past the slice's ${slice.bytes} bytes`);
    const from = position + done - entry.at;
    const count = Math.min(entry.bytes - from, target.length - done);
    await readEntryBytes(file, entry, from, target.subarray(done, done + count));
    done += count;
  }
}

/** Index of the entry that holds `position`. */
function entryAt({ entries }: Slice, position: number): number {
  let low = 0;
  let high = entries.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if ((entries[middle]?.at ?? 0) <= position) low = middle;
    else high = middle;
  }
  return low;
}

/** Bytes [from, from + target.length) of one entry. */
async function readEntryBytes(file: FileHandle, entry: SliceEntry, from: number, target: Buffer): Promise<void> {
  const { offset, rowBytes, rowStride } = entry;
  if (rowBytes === rowStride) return readExactly(file, entry.tensor, offset + from, target);
  const spanned = Math.ceil(target.length / rowBytes + 1) * rowStride;
  const window = Buffer.allocUnsafe(Math.max(rowBytes, Math.min(gatherBytes, spanned)));
  let done = 0;
  while (done < target.length) {
    const row = Math.floor((from + done) / rowBytes);
    const skip = (from + done) % rowBytes;
    // Whole rows that fit the window, read with the gaps between them; the last one without the gap after it.
    const rowsWanted = Math.ceil((skip + target.length - done) / rowBytes);
    const rows = Math.max(1, Math.min(rowsWanted, Math.floor((window.length - rowBytes) / rowStride) + 1));
    const span = window.subarray(0, (rows - 1) * rowStride + rowBytes);
    await readExactly(file, entry.tensor, offset + row * rowStride, span);
    for (let i = 0; i < rows && done < target.length; i++) {
      const start = i * rowStride + (i === 0 ? skip : 0);
      done += span.copy(target, done, start, i * rowStride + rowBytes);
    }
  }
}

async function readExactly(file: FileHandle, tensor: string, offset: number, target: Buffer): Promise<void> {
  for (let done = 0; done < target.length;) {
    const { bytesRead } = await file.read(target, done, target.length - done, offset + done);
    if (bytesRead === 0)
      throw new ModelFileError('truncated', `the file ends at byte ${offset + done}, inside tensor ${tensor}`, {
        key: tensor,
        value: offset + done,
        limit: offset + target.length,
      });
    done += bytesRead;
  }
}

/** The slice's bytes from `position` to its end, in parts of at most 256 KiB. Each part is a buffer of its own. */
export async function* sliceParts(file: FileHandle, slice: Slice, position = 0): AsyncGenerator<Buffer, void, undefined> {
  while (position < slice.bytes) {
    const part = Buffer.allocUnsafeSlow(Math.min(slicePartBytes, slice.bytes - position));
    await readSliceBytes(file, slice, position, part);
    yield part;
    position += part.length;
  }
}

/** sha256 of the slice as cut out of the model file at `path`. @param onBytes bytes hashed so far */
export async function sliceSha256(path: string, slice: Slice, onBytes?: (done: number) => void): Promise<string> {
  const file = await open(path, 'r');
  try {
    const hash = createHash('sha256');
    const buffer = Buffer.allocUnsafe(4 << 20);
    for (let position = 0; position < slice.bytes;) {
      const part = buffer.subarray(0, Math.min(buffer.length, slice.bytes - position));
      await readSliceBytes(file, slice, position, part);
      hash.update(part);
      position += part.length;
      onBytes?.(position);
    }
    return hash.digest('hex');
  } finally {
    await file.close();
  }
}

/**
 * As `sliceSha256`, remembered by the slice's address. The caller has checked that the file is the one the slice was made of (`openModel` did).
 */
export async function rememberedSliceSha256(
  path: string,
  slice: Slice,
  cacheDirectory: string,
  onBytes?: (done: number) => void,
): Promise<string> {
  const record = join(cacheDirectory, 'slice-digests', slice.address);
  const known = await readFile(record, 'utf8').catch(() => '');
  if (/^[0-9a-f]{64}$/.test(known)) return known;
  const sha256 = await sliceSha256(path, slice, onBytes);
  await writeAtomically(record, sha256).catch(() => undefined);
  return sha256;
}
