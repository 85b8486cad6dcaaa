/**
 * Ids: 128 random bits in base32 (RFC 4648 alphabet, lower case, no padding), 26 characters. Safe in NATS subjects, file names and headers, and 16
 * bytes in a frame header. Only the canonical spelling is an id, so equal bytes are equal strings.
 */
import { randomBytes } from 'node:crypto';
import { ProtocolError } from './errors.ts';

declare const brand: unique symbol;
type Branded<Name extends string> = string & { readonly [brand]: Name };

export type MeshId = Branded<'MeshId'>;
export type WorkerId = Branded<'WorkerId'>;
export type PlacementId = Branded<'PlacementId'>;
export type RequestId = Branded<'RequestId'>;
/** Any of the ids that may stand in a subject or a frame header. */
export type Id = Branded<'Id'> | MeshId | WorkerId | PlacementId;

const alphabet = 'abcdefghijklmnopqrstuvwxyz234567';
const idBytes = 16;
export const idCharacters = 26;

// The last character carries 3 bits, so only every fourth letter of the alphabet is canonical there.
const idPattern = /^[a-z2-7]{25}[aeimquy4]$/;
const requestIdPattern = /^req_[a-z2-7]{25}[aeimquy4]$/;

const valueOf = new Int8Array(128).fill(-1);
for (let i = 0; i < alphabet.length; i++) valueOf[alphabet.charCodeAt(i)] = i;

const newId = (): string => idFromBytes(randomBytes(idBytes));
export const newMeshId = (): MeshId => newId() as MeshId;
export const newWorkerId = (): WorkerId => newId() as WorkerId;
export const newPlacementId = (): PlacementId => newId() as PlacementId;
export const newRequestId = (): RequestId => `req_${newId()}` as RequestId;

export const isId = (value: unknown): value is Id =>
  typeof value === 'string' && value.length === idCharacters && idPattern.test(value);
export const isRequestId = (value: unknown): value is RequestId => typeof value === 'string' && requestIdPattern.test(value);

/** @throws {ProtocolError} naming `what` when `value` is not an id. */
export function checkId<T extends Id = Id>(what: string, value: unknown): T {
  if (!isId(value))
    throw new ProtocolError(what, `${what} must be an id (26 characters of lower-case base32), got ${describeShort(value)}`);
  return value as T;
}

/** Base32 of 16 bytes. @throws {RangeError} other lengths */
export function idFromBytes(bytes: Uint8Array): string {
  if (bytes.length !== idBytes) throw new RangeError(`an id has ${idBytes} bytes, got ${bytes.length}`);
  let text = '';
  let bits = 0;
  let held = 0;
  for (const byte of bytes) {
    held = (held << 8) | byte;
    bits += 8;
    while (bits >= 5) {
      bits -= 5;
      text += alphabet[(held >>> bits) & 31];
    }
    held &= (1 << bits) - 1;
  }
  return text + alphabet[(held << (5 - bits)) & 31];
}

/** The 16 bytes of an id, written to `target` from `offset`. The caller has checked the id. */
export function writeIdBytes(id: string, target: Uint8Array, offset: number): void {
  let bits = 0;
  let held = 0;
  let at = offset;
  for (let i = 0; i < idCharacters; i++) {
    held = ((held << 5) | (valueOf[id.charCodeAt(i)] ?? 0)) & 0xfff;
    bits += 5;
    if (bits >= 8) {
      bits -= 8;
      target[at++] = (held >>> bits) & 255;
    }
  }
}

function describeShort(value: unknown): string {
  return typeof value === 'string' ? JSON.stringify(value.slice(0, 40)) : typeof value;
}
