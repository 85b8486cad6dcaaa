import { afterAll, describe, expect, it } from 'vitest';
import { rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { readZipEntries, readZipEntry, ZipError } from '../../../../kernels/model-file/zip-reader.ts';
import { scratchDirectory } from './gguf-writer.ts';
import { zipBytes, type ZipMember } from './zip-writer.ts';

const directory = scratchDirectory();
afterAll(() => rmSync(directory, { recursive: true, force: true }));
const content = Buffer.from(Array.from({ length: 700_000 }, (_, i) => (i * i) >> 5));

async function read(bytes: Buffer, name: string): Promise<Buffer> {
  const path = join(directory, 'test.zip');
  writeFileSync(path, bytes);
  const entry = (await readZipEntries(path)).find((one) => one.name === name);
  if (!entry) throw new Error(`no entry ${name}`);
  const parts: Buffer[] = [];
  for await (const part of readZipEntry(path, entry)) parts.push(part);
  return Buffer.concat(parts);
}
const one = (member: Partial<ZipMember>): Buffer => zipBytes([{ name: 'a', data: content, ...member }]);

describe('zip reader', () => {
  it('zip reader - reads deflated, stored and empty members', async () => {
    const bytes = zipBytes([
      { name: 'a/deflated', data: content },
      { name: 'stored', data: content.subarray(5), stored: true },
      { name: 'empty', data: Buffer.alloc(0), stored: true },
    ]);
    expect((await read(bytes, 'a/deflated')).equals(content)).toBe(true);
    expect((await read(bytes, 'stored')).equals(content.subarray(5))).toBe(true);
    expect(await read(bytes, 'empty')).toHaveLength(0);
  });

  it.each<[string, Buffer, string]>([
    ['what is no zip file', Buffer.from('hello'), 'its end record is missing'],
    ['a file that was cut off', one({}).subarray(0, 1000), 'its end record is missing'],
    ['a member that inflates to more than it says', one({ bytes: 1000 }), 'is longer than the 1000 bytes'],
    ['a member that inflates to less than it says', one({ bytes: 700_001 }), 'has 700000 bytes, its directory says 700001'],
    ['a wrong checksum', one({ crc: 1 }), 'its directory says 1'],
    ['a member that begins elsewhere', one({ headerOffset: 5 }), 'has no header where its directory says'],
    ['a member that begins past the end', one({ headerOffset: 0xffff_fff0 }), 'cut off'],
    ['another compression', one({ method: 12 }), 'uses compression method 12'],
    ['stored bytes that are said to be deflated', one({ stored: true, method: 8 }), 'cannot be inflated'],
  ])('zip reader - refuses %s', async (_, bytes, message) => {
    const error = await read(bytes, 'a').catch((thrown: unknown) => thrown);
    expect(error).toBeInstanceOf(ZipError);
    expect((error as ZipError).message).toContain(message);
  });
});
