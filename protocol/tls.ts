/**
 * What mutual TLS between the processes of a mesh stands on: one authority a mesh, one certificate a process, and names in them that say who it is. A peer is
 * checked by that name and not by its address: addresses change, and what has to be known is which worker this is. TLS 1.3 only.
 */
import { createSecureContext, type SecureContext } from 'node:tls';
import { X509Certificate } from 'node:crypto';
import { checkId, type MeshId, type WorkerId } from './ids.ts';

/** PEM texts. The private key never leaves the host it was made on. */
export interface TlsIdentity {
  /** Certificate of the mesh's authority, the only one that is trusted. */
  authority: string;
  certificate: string;
  key: string;
}

export const tlsVersionMin = 'TLSv1.3';

/** DNS names in certificates; nobody resolves them. */
export const coordinatorName = (mesh: MeshId): string => `coordinator.${checkId('mesh', mesh)}.shardmesh`;
export const brokerName = (mesh: MeshId): string => `broker.${checkId('mesh', mesh)}.shardmesh`;
export const workerName = (mesh: MeshId, worker: WorkerId): string =>
  `${checkId('worker', worker)}.worker.${checkId('mesh', mesh)}.shardmesh`;

export function secureContextOf({ authority, certificate, key }: TlsIdentity): SecureContext {
  return createSecureContext({ ca: authority, cert: certificate, key, minVersion: tlsVersionMin });
}

/** A certificate close to its end is warned about this long before. */
export const expiryWarningDays = 14;
const dayMs = 24 * 60 * 60 * 1000;

/** Whole days until a certificate expires, rounded down; negative once it has. */
export const daysLeft = (certificate: string, nowMs: number): number =>
  Math.floor((Date.parse(new X509Certificate(certificate).validTo) - nowMs) / dayMs);
