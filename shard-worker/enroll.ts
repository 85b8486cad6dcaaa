/**
 * Turns a one-time token into credentials of this host. Both private keys are made here and stay here. The coordinator is known by the sha256 of its authority
 * that the token carries; nothing is sent before the connection is one that this authority vouches for.
 */
import { createUser } from '@nats-io/nkeys';
import { createHash, generateKeyPairSync, X509Certificate } from 'node:crypto';
import { request as httpsRequest } from 'node:https';
import { hostname } from 'node:os';
import { connect, type DetailedPeerCertificate } from 'node:tls';
import { addressText } from '../protocol/addresses.ts';
import type { Credentials } from '../protocol/credentials.ts';
import {
  enrollmentPath,
  parseEnrollmentReply,
  parseToken,
  type EnrollmentReply,
  type EnrollmentRequest,
  type EnrollmentToken,
} from '../protocol/enrollment.ts';
import { ShardmeshError } from '../protocol/errors.ts';
import { enrollmentLimits } from '../protocol/limits.ts';
import { coordinatorName, tlsVersionMin, workerName } from '../protocol/tls.ts';

const { timeoutMs } = enrollmentLimits;
/** Certificates are good for a year from an hour before they were made; clocks further apart than this are worth a word. */
const clockSkewMs = 30_000;

/**
 * @returns credentials to keep, and by how much the coordinator's clock is ahead of ours where that matters (else null)
 * @throws {ShardmeshError} `config_invalid`: not a token; `broker_lost`: nobody answers there; `broker_refused`: who answers is not the coordinator of the token, or
 *   it refuses the token
 */
export async function enroll(tokenText: string): Promise<{ credentials: Credentials; clockAheadMs: number | null }> {
  const token = parseToken(tokenText);
  if (!token)
    throw new ShardmeshError(
      'config_invalid',
      "--enroll needs a whole token, as `shardmesh enroll` prints it on the coordinator's host",
    );
  const authority = await authorityOf(token);
  const user = createUser();
  const { publicKey, privateKey } = generateKeyPairSync('ed25519', {
    publicKeyEncoding: { type: 'spki', format: 'pem' },
    privateKeyEncoding: { type: 'pkcs8', format: 'pem' },
  });
  const nkey = user.getPublicKey();
  const host =
    hostname()
      .replaceAll(/[^A-Za-z0-9._-]/g, '-')
      .slice(0, 64) || 'host';
  const { reply, clockAheadMs } = await post(token, authority, { id: token.id, secret: token.secret, nkey, publicKey, host });
  checkCertificate(reply, authority, publicKey);
  const credentials: Credentials = {
    version: 1,
    role: 'worker',
    url: reply.url,
    serverName: reply.serverName,
    nkey,
    seed: new TextDecoder().decode(user.getSeed()),
    mesh: reply.mesh,
    secret: reply.secret,
    worker: reply.worker,
    placements: [reply.placement],
    tls: { authority, certificate: reply.certificate, key: privateKey },
  };
  return { credentials, clockAheadMs: Math.abs(clockAheadMs) > clockSkewMs ? clockAheadMs : null };
}

/** The certificate (PEM) behind the token's sha256, from a connection that is trusted with nothing else. */
function authorityOf({ address, authoritySha256 }: EnrollmentToken): Promise<string> {
  return new Promise((resolve, reject) => {
    const socket = connect({ ...address, rejectUnauthorized: false, minVersion: tlsVersionMin }, () => {
      const found = chainOf(socket.getPeerCertificate(true)).find(({ raw }) => sha256(raw).equals(authoritySha256));
      socket.destroy();
      if (found) resolve(new X509Certificate(found.raw).toString());
      else
        reject(
          new ShardmeshError(
            'broker_refused',
            `who answers at ${addressText(address)} is not the coordinator that made this token (another authority); nothing was sent`,
          ),
        );
    });
    socket.setTimeout(timeoutMs, () => socket.destroy(new Error(`no answer within ${timeoutMs} ms`)));
    socket.on('error', (error: Error) => reject(unreachable(address, error)));
  });
}

function chainOf(leaf: DetailedPeerCertificate): DetailedPeerCertificate[] {
  const chain: DetailedPeerCertificate[] = [];
  // The last one names itself as its issuer.
  for (
    let one: DetailedPeerCertificate | undefined = leaf;
    one?.raw && !chain.includes(one) && chain.length < 4;
    one = one.issuerCertificate
  )
    chain.push(one);
  return chain;
}

function post(
  token: EnrollmentToken,
  authority: string,
  body: EnrollmentRequest,
): Promise<{ reply: EnrollmentReply; clockAheadMs: number }> {
  const { address, mesh } = token;
  return new Promise((resolve, reject) => {
    const options = {
      method: 'POST',
      path: enrollmentPath,
      ca: authority,
      servername: coordinatorName(mesh),
      minVersion: tlsVersionMin,
      agent: false,
      timeout: timeoutMs,
    } as const;
    const request = httpsRequest({ ...address, ...options, headers: { 'content-type': 'application/json' } }, (response) => {
      let text = '';
      response.setEncoding('utf8').on('data', (part: string) => {
        text += part;
        if (text.length > 65_536) request.destroy(new Error('an answer that long is none'));
      });
      response.on('end', () => {
        const reply = response.statusCode === 200 ? parseEnrollmentReply(text) : null;
        if (reply) resolve({ reply, clockAheadMs: Date.parse(response.headers.date ?? '') - Date.now() || 0 });
        else
          reject(
            new ShardmeshError(
              'broker_refused',
              `the coordinator at ${addressText(address)} refused the enrollment: ${reasonIn(text)}`,
            ),
          );
      });
    });
    request.on('timeout', () => request.destroy(new Error(`no answer within ${timeoutMs} ms`)));
    request.on('error', (error) => reject(unreachable(address, error)));
    request.end(JSON.stringify(body));
  });
}

function checkCertificate({ certificate, mesh, worker }: EnrollmentReply, authority: string, publicKey: string): void {
  const own = new X509Certificate(certificate);
  const forUs =
    own.publicKey.export({ type: 'spki', format: 'pem' }) === publicKey && own.checkHost(workerName(mesh, worker)) !== undefined;
  if (!forUs || !own.verify(new X509Certificate(authority).publicKey))
    throw new ShardmeshError('broker_refused', 'the coordinator sent a certificate that is not for this worker');
}

function reasonIn(text: string): string {
  try {
    const { error } = JSON.parse(text) as { error?: unknown };
    return typeof error === 'string' ? error.slice(0, 300) : 'no reason given';
  } catch {
    return 'no reason given';
  }
}

const sha256 = (bytes: Buffer): Buffer => createHash('sha256').update(bytes).digest();

const unreachable = (address: EnrollmentToken['address'], cause: Error): ShardmeshError =>
  new ShardmeshError(
    'broker_lost',
    `no coordinator takes enrollments at ${addressText(address)}: ${cause.message}. Does shardmesh serve --advertise run there, and does the network let that port through?`,
    { cause },
  );
