/**
 * Certificates of a mesh: its authority signs itself and one certificate for each process. Ed25519, as nkeys are. RFC 5280 gives the layout, RFC 8410 the
 * algorithm's names; only what both ends of our own connections need is in them.
 */
import {
  createHash,
  createPrivateKey,
  generateKeyPairSync,
  randomBytes,
  sign,
  X509Certificate,
  type KeyObject,
} from 'node:crypto';
import { bits, boolean, explicit, implicit, integer, objectId, octets, sequence, set, time, utf8 } from './der.ts';

export interface CertifiedKey {
  /** PEM. */
  certificate: string;
  key: string;
}

export interface CertificateRequest {
  /** The only DNS name in it: who this is. Its first part is the subject's common name, which may have 64 characters at most. */
  name: string;
  publicKey: KeyObject;
  from: Date;
  days: number;
}

const ed25519 = sequence(objectId('1.3.101.112'));
const commonName = objectId('2.5.4.3');
const oid = {
  subjectKey: objectId('2.5.29.14'),
  keyUsage: objectId('2.5.29.15'),
  alternativeName: objectId('2.5.29.17'),
  basicConstraints: objectId('2.5.29.19'),
  authorityKey: objectId('2.5.29.35'),
  extendedUsage: objectId('2.5.29.37'),
  serverAuth: objectId('1.3.6.1.5.5.7.3.1'),
  clientAuth: objectId('1.3.6.1.5.5.7.3.2'),
};
/** Bits of a key usage, counted from the left: digital signature is 0, certificate signing 5. */
const usage = { digitalSignature: bits(Buffer.from([0x80]), 7), certificateSigning: bits(Buffer.from([0x04]), 2) };

const dayMs = 24 * 60 * 60 * 1000;
/** Clocks of hosts differ: a certificate is good from a little before it was made. */
const backdatedMs = 60 * 60 * 1000;
const serialBytes = 16;
export const authorityDays = 3_650;
export const processDays = 365;

export const newKeyPair = (): { publicKey: KeyObject; privateKey: KeyObject } => generateKeyPairSync('ed25519');
export const keyText = (key: KeyObject): string => key.export({ type: 'pkcs8', format: 'pem' }) as string;

/** A new authority, its name without dots: it may sign certificates of processes and no further authorities. */
export function createAuthority(name: string, from: Date): CertifiedKey {
  const { publicKey, privateKey } = newKeyPair();
  const request = { name, publicKey, from, days: authorityDays };
  const extensions = [
    extension(oid.basicConstraints, true, sequence(boolean(true), integer(Buffer.from([0])))),
    extension(oid.keyUsage, true, usage.certificateSigning),
    extension(oid.subjectKey, false, octets(keyId(publicKey))),
  ];
  return { certificate: build(request, { name, key: privateKey }, extensions), key: keyText(privateKey) };
}

/** A certificate of one process, good for both ends of a connection, and never for longer than its authority. */
export function issueCertificate(authority: CertifiedKey, request: CertificateRequest): string {
  const issuer = new X509Certificate(authority.certificate);
  const name = /^CN=(.+)$/m.exec(issuer.subject)?.[1] ?? '';
  const left = (Date.parse(issuer.validTo) - request.from.getTime()) / dayMs;
  const extensions = [
    extension(oid.basicConstraints, true, sequence()),
    extension(oid.keyUsage, true, usage.digitalSignature),
    extension(oid.extendedUsage, false, sequence(oid.serverAuth, oid.clientAuth)),
    // Tag 2 of a general name is a DNS name.
    extension(oid.alternativeName, false, sequence(implicit(2, Buffer.from(request.name, 'ascii')))),
    extension(oid.subjectKey, false, octets(keyId(request.publicKey))),
    extension(oid.authorityKey, false, sequence(implicit(0, keyId(issuer.publicKey)))),
  ];
  return build({ ...request, days: Math.min(request.days, left) }, { name, key: createPrivateKey(authority.key) }, extensions);
}

/** Certificate and key of a process of this host. */
export function issueKey(authority: CertifiedKey, name: string, from: Date): CertifiedKey {
  const { publicKey, privateKey } = newKeyPair();
  return { certificate: issueCertificate(authority, { name, publicKey, from, days: processDays }), key: keyText(privateKey) };
}

const extension = (id: Uint8Array, critical: boolean, content: Uint8Array): Uint8Array =>
  critical ? sequence(id, boolean(true), octets(content)) : sequence(id, octets(content));

const nameOf = (text: string): Uint8Array => sequence(set(sequence(commonName, utf8(text))));
const publicKeyBytes = (key: KeyObject): Buffer => key.export({ type: 'spki', format: 'der' });
const keyId = (key: KeyObject): Buffer => createHash('sha256').update(publicKeyBytes(key)).digest().subarray(0, 20);

function build(request: CertificateRequest, issuer: { name: string; key: KeyObject }, extensions: Uint8Array[]): string {
  const from = new Date(request.from.getTime() - backdatedMs);
  const to = new Date(request.from.getTime() + request.days * dayMs);
  const version3 = explicit(0, integer(Buffer.from([2])));
  const body = sequence(
    version3,
    integer(randomBytes(serialBytes)),
    ed25519,
    nameOf(issuer.name),
    sequence(time(from), time(to)),
    nameOf(request.name.split('.')[0] ?? ''),
    publicKeyBytes(request.publicKey),
    explicit(3, sequence(...extensions)),
  );
  const certificate = sequence(body, ed25519, bits(sign(null, body, issuer.key)));
  const lines =
    Buffer.from(certificate)
      .toString('base64')
      .match(/.{1,64}/g) ?? [];
  return `-----BEGIN CERTIFICATE-----\n${lines.join('\n')}\n-----END CERTIFICATE-----\n`;
}
