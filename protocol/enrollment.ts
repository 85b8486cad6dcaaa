/**
 * What a coordinator and a worker of another host say to each other before they know each other. The token carries the address, what authenticates the
 * coordinator (the sha256 of its authority's certificate) and what authenticates the worker (a secret, good once and for minutes).
 *
 *   worker                                              coordinator (HTTPS, TLS 1.3, certificate of the mesh's authority)
 *     ── connects, takes the authority's certificate ──►  it must have the token's sha256; the connection is dropped
 *     ── connects again, trusting that authority only ─►  POST /enroll {token id, secret, nkey, publicKey, host}
 *     ◄── {worker, mesh, certificate, addresses, …} ────  the token is used up before anything else happens
 */
import { isId, type MeshId, type PlacementId, type WorkerId } from './ids.ts';
import { addressText, parseAddress, type Address } from './addresses.ts';

export interface EnrollmentToken {
  /** Of the coordinator's enrollment listener. */
  address: Address;
  /** sha256 of the authority's certificate (DER). */
  authoritySha256: Buffer;
  mesh: MeshId;
  /** Names the token in logs; not secret. */
  id: string;
  secret: string;
}

export interface EnrollmentRequest {
  id: string;
  secret: string;
  /** Public user nkey; its seed stays where it was made. */
  nkey: string;
  /** Ed25519, PEM; its private key stays where it was made. */
  publicKey: string;
  /** The worker's name for its host, for people. */
  host: string;
}

export interface EnrollmentReply {
  worker: WorkerId;
  mesh: MeshId;
  placement: PlacementId;
  secret: string;
  serverName: string;
  /** Of the NATS server. */
  url: string;
  /** PEM. */
  certificate: string;
}

export const enrollmentPath = '/enroll';

const prefix = 'shardmesh-enroll-1.';
const sha256Bytes = 32;
const idBytes = 9;
const secretBytes = 32;
export const tokenBytes = { id: idBytes, secret: secretBytes } as const;

export function tokenText({ address, authoritySha256, mesh, id, secret }: EnrollmentToken): string {
  const fixed = [authoritySha256, Buffer.from(id, 'base64url'), Buffer.from(secret, 'base64url')];
  return prefix + Buffer.concat([...fixed, Buffer.from(`${mesh}@${addressText(address)}`)]).toString('base64url');
}

/** null: not a token, or not a whole one. */
export function parseToken(text: string): EnrollmentToken | null {
  if (!text.startsWith(prefix) || text.length > 1_024) return null;
  const bytes = Buffer.from(text.slice(prefix.length), 'base64url');
  const part = (from: number, length: number): Buffer => bytes.subarray(from, from + length);
  const [mesh, where = ''] = part(sha256Bytes + idBytes + secretBytes, 400)
    .toString('utf8')
    .split('@');
  const address = parseAddress(where);
  if (address === null || !isId(mesh)) return null;
  return {
    address,
    authoritySha256: part(0, sha256Bytes),
    mesh: mesh as string as MeshId,
    id: part(sha256Bytes, idBytes).toString('base64url'),
    secret: part(sha256Bytes + idBytes, secretBytes).toString('base64url'),
  };
}

/** null: not a request. */
export function parseEnrollmentRequest(text: string): EnrollmentRequest | null {
  const { id, secret, nkey, publicKey, host } = objectOf(text);
  if (typeof id !== 'string' || typeof secret !== 'string' || id.length > 64 || secret.length > 64) return null;
  if (typeof nkey !== 'string' || !/^U[A-Z2-7]{55}$/.test(nkey)) return null;
  if (typeof publicKey !== 'string' || publicKey.length > 1_024) return null;
  if (typeof host !== 'string' || !/^[A-Za-z0-9._-]{1,64}$/.test(host)) return null;
  return { id, secret, nkey, publicKey, host };
}

/** null: not a reply. The certificate is checked where it is used. */
export function parseEnrollmentReply(text: string): EnrollmentReply | null {
  const { worker, mesh, placement, secret, serverName, url, certificate } = objectOf(text);
  if (!isId(worker) || !isId(mesh) || !isId(placement)) return null;
  const texts = [secret, serverName, url, certificate];
  if (!texts.every((one) => typeof one === 'string' && one.length <= 8_192)) return null;
  return { worker, mesh, placement, secret, serverName, url, certificate } as EnrollmentReply;
}

function objectOf(text: string): Record<string, unknown> {
  try {
    const value: unknown = JSON.parse(text);
    return typeof value === 'object' && value !== null ? (value as Record<string, unknown>) : {};
  } catch {
    return {};
  }
}
