/**
 * Reads single entries of a zip file (a Python wheel) as a stream: stored and deflated ones, no zip64, no encryption. Names are only compared, never used as
 * paths. Every offset and length is checked against the file, and an entry never yields more bytes than its directory says.
 *
 * Source: the .ZIP file format specification (APPNOTE 6.3), sections 4.3 and 4.4.
 */
import { createReadStream } from 'node:fs';
import { open, type FileHandle } from 'node:fs/promises';
import { crc32, createInflateRaw } from 'node:zlib';

export class ZipError extends Error {
  constructor(path: string, message: string) {
    super(`${path}: ${message}`);
    this.name = 'ZipError';
  }
}

export interface ZipEntry {
  name: string;
  /** 0: stored, 8: deflated. */
  method: number;
  crc: number;
  compressedBytes: number;
  bytes: number;
  headerOffset: number;
}

const endSignature = 0x06054b50;
const centralSignature = 0x02014b50;
const localSignature = 0x04034b50;
const entriesMax = 10_000;
const directoryBytesMax = 16 * 1024 * 1024;

/** Entries of the central directory. @throws {ZipError} */
export async function readZipEntries(path: string): Promise<ZipEntry[]> {
  const file = await open(path, 'r');
  try {
    const { size } = await file.stat();
    const tailBytes = Math.min(size, 22 + 0xffff);
    const tail = await readExactly(file, path, size - tailBytes, tailBytes);
    const end = tail.lastIndexOf(Buffer.from([0x50, 0x4b, 0x05, 0x06]));
    if (end < 0 || end + 22 > tail.length || tail.readUInt32LE(end) !== endSignature)
      throw new ZipError(path, 'not a zip file, or cut off: its end record is missing');
    const count = tail.readUInt16LE(end + 10);
    const directoryBytes = tail.readUInt32LE(end + 12);
    const directoryOffset = tail.readUInt32LE(end + 16);
    if (count > entriesMax || directoryBytes > directoryBytesMax)
      throw new ZipError(
        path,
        `its directory has ${count} entries in ${directoryBytes} bytes, limit ${entriesMax} in ${directoryBytesMax}`,
      );
    if (directoryOffset + directoryBytes > size)
      throw new ZipError(
        path,
        `its directory ends at ${directoryOffset + directoryBytes}, the file has ${size} bytes (zip64 is not supported)`,
      );
    return parseDirectory(path, await readExactly(file, path, directoryOffset, directoryBytes), count);
  } finally {
    await file.close();
  }
}

function parseDirectory(path: string, directory: Buffer, count: number): ZipEntry[] {
  const entries: ZipEntry[] = [];
  let at = 0;
  for (let i = 0; i < count; i++) {
    if (at + 46 > directory.length || directory.readUInt32LE(at) !== centralSignature)
      throw new ZipError(path, `entry ${i} of its directory is broken`);
    const nameBytes = directory.readUInt16LE(at + 28);
    const next = at + 46 + nameBytes + directory.readUInt16LE(at + 30) + directory.readUInt16LE(at + 32);
    if (next > directory.length) throw new ZipError(path, `entry ${i} of its directory goes past its end`);
    const name = directory.toString('utf8', at + 46, at + 46 + nameBytes);
    if ((directory.readUInt16LE(at + 8) & 1) !== 0) throw new ZipError(path, `entry ${JSON.stringify(name)} is encrypted`);
    entries.push({
      name,
      method: directory.readUInt16LE(at + 10),
      crc: directory.readUInt32LE(at + 16),
      compressedBytes: directory.readUInt32LE(at + 20),
      bytes: directory.readUInt32LE(at + 24),
      headerOffset: directory.readUInt32LE(at + 42),
    });
    at = next;
  }
  return entries;
}

/** Content of an entry, in chunks. @throws {ZipError} wrong length or checksum, after the last chunk at the latest */
export async function* readZipEntry(path: string, entry: ZipEntry): AsyncGenerator<Buffer, void, undefined> {
  if (entry.method !== 0 && entry.method !== 8)
    throw new ZipError(
      path,
      `entry ${JSON.stringify(entry.name)} uses compression method ${entry.method}; 0 and 8 are supported`,
    );
  const start = await dataOffset(path, entry);
  let done = 0;
  let crc = 0;
  for await (const chunk of contentStream(path, entry, start)) {
    done += chunk.length;
    if (done > entry.bytes)
      throw new ZipError(path, `entry ${JSON.stringify(entry.name)} is longer than the ${entry.bytes} bytes its directory says`);
    crc = crc32(chunk, crc);
    yield chunk;
  }
  if (done !== entry.bytes)
    throw new ZipError(path, `entry ${JSON.stringify(entry.name)} has ${done} bytes, its directory says ${entry.bytes}`);
  if (crc !== entry.crc)
    throw new ZipError(path, `entry ${JSON.stringify(entry.name)} has checksum ${crc}, its directory says ${entry.crc}`);
}

async function* contentStream(path: string, entry: ZipEntry, start: number): AsyncGenerator<Buffer, void, undefined> {
  if (entry.compressedBytes === 0) return;
  const raw = createReadStream(path, { start, end: start + entry.compressedBytes - 1, highWaterMark: 1 << 18 });
  if (entry.method === 0) {
    for await (const chunk of raw) yield chunk as Buffer;
    return;
  }
  const inflate = createInflateRaw({ chunkSize: 1 << 18 });
  raw.on('error', (error) => inflate.destroy(error));
  raw.pipe(inflate);
  try {
    for await (const chunk of inflate) yield chunk as Buffer;
  } catch (cause) {
    throw new ZipError(path, `entry ${JSON.stringify(entry.name)} cannot be inflated: ${(cause as Error).message}`);
  } finally {
    raw.destroy();
    inflate.destroy();
  }
}

/** The local header repeats name and extra field, with lengths of its own. */
async function dataOffset(path: string, entry: ZipEntry): Promise<number> {
  const file = await open(path, 'r');
  try {
    const header = await readExactly(file, path, entry.headerOffset, 30);
    if (header.readUInt32LE(0) !== localSignature)
      throw new ZipError(path, `entry ${JSON.stringify(entry.name)} has no header where its directory says`);
    const start = entry.headerOffset + 30 + header.readUInt16LE(26) + header.readUInt16LE(28);
    const { size } = await file.stat();
    if (start + entry.compressedBytes > size)
      throw new ZipError(
        path,
        `entry ${JSON.stringify(entry.name)} ends at ${start + entry.compressedBytes}, the file has ${size} bytes`,
      );
    return start;
  } finally {
    await file.close();
  }
}

async function readExactly(file: FileHandle, path: string, offset: number, count: number): Promise<Buffer> {
  const buffer = Buffer.alloc(count);
  const { bytesRead } = await file.read(buffer, 0, count, offset);
  if (bytesRead !== count) throw new ZipError(path, `it is cut off at byte ${offset + bytesRead}`);
  return buffer;
}
