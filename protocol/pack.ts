/** MessagePack without records, extensions or shared state. */
import { Packr, Unpackr } from 'msgpackr';
import { ProtocolError } from './errors.ts';
import { scanPacked } from './pack-scan.ts';

const packr = new Packr({ useRecords: false, moreTypes: false, structuredClone: false, variableMapSize: true });
const unpackr = new Unpackr({ useRecords: false, mapsAsObjects: true, int64AsType: 'bigint', structuredClone: false });

export const pack = (value: unknown): Uint8Array => packr.pack(value);

/** @throws {ProtocolError} and nothing else, whatever the bytes */
export function unpack(bytes: Uint8Array): unknown {
  scanPacked(bytes);
  try {
    return unpackr.unpack(bytes);
  } catch (error) {
    throw new ProtocolError('message', `not a message: ${(error as Error).message}`, { cause: error });
  }
}
