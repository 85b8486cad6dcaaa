import { crc32, deflateRawSync } from 'node:zlib';

export interface ZipMember {
  name: string;
  data: Buffer;
  stored?: boolean;
  /** Forged fields. */
  bytes?: number;
  crc?: number;
  headerOffset?: number;
  method?: number;
}

/** A zip file of these members. */
export function zipBytes(members: ZipMember[]): Buffer {
  const bodies: Buffer[] = [];
  const directory: Buffer[] = [];
  let offset = 0;
  for (const { name, data, stored = false, ...forged } of members) {
    const content = stored ? data : deflateRawSync(data);
    const head = Buffer.alloc(30);
    head.writeUInt32LE(0x04034b50, 0);
    head.writeUInt16LE(stored ? 0 : 8, 8);
    head.writeUInt16LE(name.length, 26);
    // An extra field of its own, which the central directory does not have.
    head.writeUInt16LE(4, 28);
    const body = Buffer.concat([head, Buffer.from(name), Buffer.alloc(4, 7), content]);
    const entry = Buffer.alloc(46);
    entry.writeUInt32LE(0x02014b50, 0);
    entry.writeUInt16LE(forged.method ?? (stored ? 0 : 8), 10);
    entry.writeUInt32LE(forged.crc ?? crc32(data), 16);
    entry.writeUInt32LE(content.length, 20);
    entry.writeUInt32LE(forged.bytes ?? data.length, 24);
    entry.writeUInt16LE(name.length, 28);
    entry.writeUInt32LE(forged.headerOffset ?? offset, 42);
    bodies.push(body);
    directory.push(Buffer.concat([entry, Buffer.from(name)]));
    offset += body.length;
  }
  const central = Buffer.concat(directory);
  const end = Buffer.alloc(22);
  end.writeUInt32LE(0x06054b50, 0);
  end.writeUInt16LE(members.length, 8);
  end.writeUInt16LE(members.length, 10);
  end.writeUInt32LE(central.length, 12);
  end.writeUInt32LE(offset, 16);
  return Buffer.concat([...bodies, central, end]);
}
