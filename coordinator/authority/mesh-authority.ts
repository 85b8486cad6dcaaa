/**
 * What a mesh of several hosts remembers between runs of its coordinator, in one file (0600) of one folder (0700): its ids, its secret, its authority, and which
 * workers were enrolled and revoked. Everything else (nkeys and certificates of the coordinator, the broker and local workers) is made anew at each start.
 */
import { createHash, createPublicKey, randomBytes, X509Certificate } from 'node:crypto';
import { chmodSync, mkdirSync, readFileSync, renameSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { ShardmeshError } from '../../protocol/errors.ts';
import {
  isId,
  newMeshId,
  newPlacementId,
  newWorkerId,
  type MeshId,
  type PlacementId,
  type WorkerId,
} from '../../protocol/ids.ts';
import { meshLimits } from '../../protocol/limits.ts';
import { daysLeft, expiryWarningDays, workerName, type TlsIdentity } from '../../protocol/tls.ts';
import { AuditLog } from './audit-log.ts';
import { createAuthority, issueCertificate, issueKey, processDays, type CertifiedKey } from './certificate.ts';

export interface EnrolledWorker {
  worker: WorkerId;
  nkey: string;
  /** Its own name for its host, and the address it enrolled from. */
  host: string;
  address: string;
  enrolledAt: string;
  certificateEndsAt: string;
  revokedAt: string | null;
}

interface MeshFile {
  version: 1;
  mesh: MeshId;
  placement: PlacementId;
  secret: string;
  authority: CertifiedKey;
  workers: EnrolledWorker[];
}

export class MeshAuthority {
  readonly folder: string;
  readonly audit: AuditLog;
  readonly #file: MeshFile;

  private constructor(folder: string, file: MeshFile) {
    this.folder = folder;
    this.#file = file;
    this.audit = new AuditLog(join(folder, 'audit.log'));
  }

  /** Opens the folder's mesh, or makes a new one there. @throws {ShardmeshError} `config_invalid` naming the file, and what is wrong with it */
  static open(folder: string): MeshAuthority {
    mkdirSync(folder, { recursive: true, mode: 0o700 });
    chmodSync(folder, 0o700);
    const known = MeshAuthority.read(folder);
    if (known) return known;
    const mesh = newMeshId();
    const made = new MeshAuthority(folder, {
      version: 1,
      mesh,
      placement: newPlacementId(),
      secret: randomBytes(32).toString('base64url'),
      authority: createAuthority(`shardmesh ${mesh}`, new Date()),
      workers: [],
    });
    made.#save();
    made.audit.write('mesh_created', { mesh });
    return made;
  }

  /** The mesh of a folder; null when there is none. @throws {ShardmeshError} `config_invalid` */
  static read(folder: string): MeshAuthority | null {
    const path = join(folder, meshFileName);
    try {
      if ((statSync(path).mode & 0o077) !== 0) throw new Error('other users may read it; chmod 600 it');
      return new MeshAuthority(folder, checkMeshFile(readFileSync(path, 'utf8')));
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return null;
      throw new ShardmeshError('config_invalid', `mesh file ${path}: ${(error as Error).message}`, { cause: error });
    }
  }

  get mesh(): MeshId {
    return this.#file.mesh;
  }
  get placement(): PlacementId {
    return this.#file.placement;
  }
  get secret(): string {
    return this.#file.secret;
  }
  /** PEM. */
  get certificate(): string {
    return this.#file.authority.certificate;
  }
  get workers(): readonly EnrolledWorker[] {
    return this.#file.workers;
  }

  /** What tokens carry, so that a worker knows this authority when it sees it. */
  sha256(): Buffer {
    return createHash('sha256').update(new X509Certificate(this.certificate).raw).digest();
  }

  /** For a process of this host. */
  identityOf(name: string): TlsIdentity {
    return { authority: this.certificate, ...issueKey(this.#file.authority, name, new Date()) };
  }

  /**
   * Takes a worker of another host in: an id of its own, and a certificate for the key that it keeps.
   * @throws {ShardmeshError} `invalid_message`: not an Ed25519 public key, or an nkey that is enrolled already
   */
  enroll(request: { nkey: string; publicKey: string; host: string; address: string }): { worker: WorkerId; certificate: string } {
    const { nkey, publicKey, host, address } = request;
    if (this.#file.workers.some((one) => one.nkey === nkey))
      throw new ShardmeshError('invalid_message', 'this nkey is enrolled already');
    const worker = newWorkerId();
    const name = workerName(this.mesh, worker);
    const certificate = issueCertificate(this.#file.authority, {
      name,
      publicKey: ed25519Of(publicKey),
      from: new Date(),
      days: processDays,
    });
    this.#file.workers.push({
      worker,
      nkey,
      host,
      address,
      enrolledAt: new Date().toISOString(),
      certificateEndsAt: new Date(new X509Certificate(certificate).validTo).toISOString(),
      revokedAt: null,
    });
    this.#save();
    this.audit.write('worker_enrolled', { worker, nkey, host, address });
    return { worker, certificate };
  }

  /** Its id, or the only one that begins like this. @throws {ShardmeshError} `config_invalid`: none or several, or revoked already */
  revoke(name: string): EnrolledWorker {
    const found = this.#file.workers.filter(({ worker }) => worker.startsWith(name));
    const [only] = found;
    if (!only || found.length > 1)
      throw new ShardmeshError(
        'config_invalid',
        `${found.length === 0 ? 'no enrolled worker has' : `${found.length} enrolled workers have`} an id that begins with ${name}; see \`shardmesh enroll --list\``,
      );
    if (only.revokedAt)
      throw new ShardmeshError('config_invalid', `worker ${only.worker} was revoked at ${only.revokedAt} already`);
    only.revokedAt = new Date().toISOString();
    this.#save();
    this.audit.write('worker_revoked', { worker: only.worker, host: only.host });
    return only;
  }

  /** Revoked workers whose certificates are not over yet. */
  revoked(): WorkerId[] {
    const now = new Date().toISOString();
    return this.#file.workers
      .flatMap(({ worker, revokedAt, certificateEndsAt }) => (revokedAt && certificateEndsAt > now ? [worker] : []))
      .slice(-meshLimits.revokedMax);
  }

  /** One line for each certificate that is over, or will be soon. */
  expiring(nowMs: number): string[] {
    const lines: string[] = [];
    const own = daysLeft(this.certificate, nowMs);
    if (own < expiryWarningDays)
      lines.push(
        `the authority of this mesh ${own < 0 ? 'has expired' : `expires in ${own} days`}: make a new mesh folder and enroll every worker again`,
      );
    for (const { worker, host, certificateEndsAt, revokedAt } of this.workers) {
      const days = Math.floor((Date.parse(certificateEndsAt) - nowMs) / 86_400_000);
      if (!revokedAt && days < expiryWarningDays)
        lines.push(
          `the certificate of worker ${worker} on ${host} ${days < 0 ? 'has expired' : `expires in ${days} days`}: enroll it again, then revoke this id`,
        );
    }
    return lines;
  }

  #save(): void {
    const path = join(this.folder, meshFileName);
    writeFileSync(`${path}.partial`, `${JSON.stringify(this.#file, null, 2)}\n`, { mode: 0o600 });
    renameSync(`${path}.partial`, path);
  }
}

const meshFileName = 'mesh.json';

function ed25519Of(pem: string): ReturnType<typeof createPublicKey> {
  try {
    const key = createPublicKey(pem);
    if (key.asymmetricKeyType === 'ed25519' && pem.includes('BEGIN PUBLIC KEY')) return key;
  } catch {
    // Said below.
  }
  throw new ShardmeshError('invalid_message', 'the public key is not an Ed25519 key in PEM');
}

function checkMeshFile(text: string): MeshFile {
  const file = JSON.parse(text) as Partial<MeshFile>;
  if (file.version !== 1) throw new Error('version must be 1');
  if (!isId(file.mesh) || !isId(file.placement)) throw new Error('mesh and placement must be ids');
  if (typeof file.secret !== 'string' || !/^[A-Za-z0-9_-]{43}$/.test(file.secret))
    throw new Error('secret must be 43 characters of base64url');
  if (!file.authority || !new X509Certificate(file.authority.certificate).ca)
    throw new Error('authority must be a certificate that may sign others, and its key');
  if (!Array.isArray(file.workers) || !file.workers.every(({ worker }) => isId(worker)))
    throw new Error('workers must be a list');
  return file as MeshFile;
}
