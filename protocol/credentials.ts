/**
 * Credential files: who a process is on the broker and, where a mesh has more than one host, its certificate; and the secret of its mesh for gRPC links.
 * Written 0600, and a file that others can read is refused.
 * `shardmesh worker --credentials FILE` and `shardmesh serve --nats URL --credentials FILE` read them.
 */
import { createPrivateKey, X509Certificate } from 'node:crypto';
import { closeSync, constants, fstatSync, openSync, readFileSync, unlinkSync, writeSync } from 'node:fs';
import { ShardmeshError } from './errors.ts';
import type { TlsIdentity } from './tls.ts';
import { isId, type MeshId, type PlacementId, type WorkerId } from './ids.ts';

export interface Credentials {
  version: 1;
  role: 'coordinator' | 'worker' | 'system';
  /** nats://host:port, or tls://host:port */
  url: string;
  /** `server_name` that the broker must have; null = any. Tells a stranger's server on the same port from ours. */
  serverName: string | null;
  /** Public nkey, and the seed that signs the broker's challenge. */
  nkey: string;
  seed: string;
  mesh: MeshId;
  /** 256 bits, base64url. Proves to other processes of the mesh that a gRPC call comes from one of them. */
  secret: string;
  /** Own id; null for other roles. */
  worker: WorkerId | null;
  /** The placements whose plans the broker lets workers read: a coordinator picks one of these, so that permissions need no change. */
  placements: PlacementId[];
  /** Certificate of the mesh's authority, own certificate, own key; null: this mesh stays on one host, in plaintext on loopback. */
  tls: TlsIdentity | null;
}

const fileBytesMax = 64 * 1024;

/** @throws {ShardmeshError} `config_invalid` naming the file, and what is wrong with it */
export function readCredentials(path: string): Credentials {
  let text: string;
  let fd: number | null = null;
  try {
    fd = openSync(path, constants.O_RDONLY);
    const facts = fstatSync(fd);
    if (!facts.isFile()) throw new Error('it is not a file');
    if (facts.size > fileBytesMax) throw new Error(`it has ${facts.size} bytes, the limit is ${fileBytesMax}`);
    if ((facts.mode & 0o077) !== 0)
      throw new Error(`other users may read it (mode ${(facts.mode & 0o777).toString(8)}); chmod 600 it`);
    text = readFileSync(fd, 'utf8');
  } catch (error) {
    throw new ShardmeshError('config_invalid', `credentials file ${path}: ${(error as Error).message}`, { cause: error });
  } finally {
    if (fd !== null) closeSync(fd);
  }
  return checkCredentials(path, text);
}

/** Writes a new file of mode 0600; an older one at the path is replaced, never written into. */
export function writeCredentials(path: string, credentials: Credentials): void {
  try {
    unlinkSync(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
  }
  const fd = openSync(path, 'wx', 0o600);
  try {
    writeSync(fd, `${JSON.stringify(credentials, null, 2)}\n`);
  } finally {
    closeSync(fd);
  }
}

function checkCredentials(path: string, text: string): Credentials {
  const fail = (what: string): never => {
    // The value itself stays out of the message: it may be a secret.
    throw new ShardmeshError('config_invalid', `credentials file ${path}: ${what}`);
  };
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    return fail('it is not valid JSON');
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) return fail('it does not hold an object');
  const fields = value as Record<string, unknown>;
  const known = ['version', 'role', 'url', 'serverName', 'nkey', 'seed', 'mesh', 'secret', 'worker', 'placements', 'tls'];
  for (const name of Object.keys(fields)) if (!known.includes(name)) fail(`unknown key ${JSON.stringify(name.slice(0, 40))}`);
  const { version, role, url, serverName, nkey, seed, mesh, secret, worker, placements, tls = null } = fields;
  if (version !== 1) return fail('version must be 1');
  if (role !== 'coordinator' && role !== 'worker' && role !== 'system') return fail('role must be coordinator, worker or system');
  if (typeof url !== 'string' || !/^(nats|tls):\/\/[^\s/@]{1,260}$/.test(url)) return fail('url must be nats://host:port');
  if (serverName !== null && (typeof serverName !== 'string' || serverName.length > 256))
    return fail('serverName must be a name or null');
  if (typeof nkey !== 'string' || !/^U[A-Z2-7]{55}$/.test(nkey)) return fail('nkey must be a public user nkey');
  if (typeof seed !== 'string' || !/^SU[A-Z2-7]{56}$/.test(seed)) return fail('seed must be the seed of a user nkey');
  if (!isId(mesh)) return fail('mesh must be an id');
  if (typeof secret !== 'string' || !/^[A-Za-z0-9_-]{43}$/.test(secret)) return fail('secret must be 43 characters of base64url');
  if (role === 'worker' ? !isId(worker) : worker !== null) return fail('worker must be an id for a worker, else null');
  if (!Array.isArray(placements) || placements.length > 1_024 || !placements.every(isId))
    return fail('placements must be a list of ids');
  if (tls !== null && !isTlsIdentity(tls))
    return fail(
      'tls must be null, or the PEM texts authority, certificate and key, the certificate by that authority and for that key',
    );
  return {
    version,
    role,
    url,
    serverName,
    nkey,
    seed,
    mesh: mesh as string as MeshId,
    secret,
    worker: worker as WorkerId | null,
    placements: placements as PlacementId[],
    tls,
  };
}

/** Three texts that fit each other. Whether they are still valid is for whoever uses them to say. */
function isTlsIdentity(value: unknown): value is TlsIdentity {
  const { authority, certificate, key, ...others } = value as Record<string, unknown>;
  if (typeof authority !== 'string' || typeof certificate !== 'string' || typeof key !== 'string') return false;
  if (Object.keys(others).length > 0) return false;
  try {
    const own = new X509Certificate(certificate);
    return own.verify(new X509Certificate(authority).publicKey) && own.checkPrivateKey(createPrivateKey(key));
  } catch {
    return false;
  }
}
