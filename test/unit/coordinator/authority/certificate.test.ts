import { execFileSync } from 'node:child_process';
import { createPrivateKey, X509Certificate } from 'node:crypto';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { connect, createServer } from 'node:tls';
import { describe, expect, test } from 'vitest';
import {
  createAuthority,
  issueCertificate,
  issueKey,
  newKeyPair,
  type CertifiedKey,
} from '../../../../coordinator/authority/certificate.ts';
import { bits, integer, objectId, sequence, time, utf8 } from '../../../../coordinator/authority/der.ts';

const now = new Date('2026-03-01T12:00:00Z');
const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex');

describe('der', () => {
  test('der - writes integers in as few bytes as they need, and never as negative ones', () => {
    expect(hex(integer(Buffer.from([0])))).toBe('020100');
    expect(hex(integer(Buffer.from([0, 0, 0x7f])))).toBe('02017f');
    expect(hex(integer(Buffer.from([0x80])))).toBe('02020080');
  });

  test('der - writes lengths below 128 in one byte, others behind their number of bytes', () => {
    expect(hex(utf8('a'.repeat(127))).slice(0, 4)).toBe('0c7f');
    expect(hex(utf8('a'.repeat(128))).slice(0, 6)).toBe('0c8180');
    expect(hex(utf8('a'.repeat(300))).slice(0, 8)).toBe('0c82012c');
  });

  test('der - writes the object ids, bit strings and sequences of the standard', () => {
    expect(hex(objectId('1.3.101.112'))).toBe('06032b6570');
    expect(hex(objectId('1.2.840.113549'))).toBe('06062a864886f70d');
    expect(hex(bits(Buffer.from([0x04]), 2))).toBe('03020204');
    expect(hex(sequence())).toBe('3000');
  });

  test('der - writes years up to 2049 with two digits, later ones with four', () => {
    expect(hex(time(new Date('2049-12-31T23:59:59.9Z')))).toBe(`170d${Buffer.from('491231235959Z').toString('hex')}`);
    expect(hex(time(new Date('2050-01-01T00:00:00Z')))).toBe(`180f${Buffer.from('20500101000000Z').toString('hex')}`);
  });
});

describe('certificates', () => {
  const authority = createAuthority('mesh-a', now);
  const worker = issueKey(authority, 'w1.worker.a.shardmesh', now);

  test('certificates - carry their name, key and days, and are signed by their authority and no other', () => {
    const certificate = new X509Certificate(worker.certificate);
    expect(certificate.subjectAltName).toBe('DNS:w1.worker.a.shardmesh');
    expect(certificate.subject).toBe('CN=w1');
    expect(certificate.issuer).toBe('CN=mesh-a');
    expect(certificate.checkPrivateKey(createPrivateKey(worker.key))).toBe(true);
    expect([certificate.validFrom, certificate.validTo]).toEqual(['Mar  1 11:00:00 2026 GMT', 'Mar  1 12:00:00 2027 GMT']);
    expect(certificate.ca).toBe(false);
    expect(certificate.checkIssued(new X509Certificate(authority.certificate))).toBe(true);
    expect(certificate.verify(new X509Certificate(authority.certificate).publicKey)).toBe(true);
    const other = new X509Certificate(createAuthority('mesh-a', now).certificate);
    expect(certificate.verify(other.publicKey)).toBe(false);
    expect(new X509Certificate(authority.certificate).ca).toBe(true);
  });

  test('certificates - never outlive their authority', () => {
    const late = new Date(Date.parse(new X509Certificate(authority.certificate).validTo) - 3 * 24 * 3_600_000);
    const certificate = issueCertificate(authority, { name: 'w2', publicKey: newKeyPair().publicKey, from: late, days: 365 });
    expect(new X509Certificate(certificate).validTo).toBe(new X509Certificate(authority.certificate).validTo);
  });

  test('certificates - pass the strict check of openssl, and those of another authority do not', ({ skip }) => {
    const folder = mkdtempSync(join(tmpdir(), 'shardmesh-test-'));
    const write = (name: string, text: string): string => {
      writeFileSync(join(folder, name), text);
      return join(folder, name);
    };
    const verify = (root: CertifiedKey): string =>
      execFileSync(
        'openssl',
        [
          'verify',
          '-x509_strict',
          '-attime',
          String(now.getTime() / 1000),
          '-purpose',
          'sslserver',
          '-CAfile',
          write('ca.pem', root.certificate),
          write('w.pem', worker.certificate),
        ],
        { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] },
      );
    try {
      try {
        execFileSync('openssl', ['version']);
      } catch {
        skip('no openssl on PATH');
      }
      expect(verify(authority)).toMatch(/: OK$/m);
      expect(() => verify(createAuthority('mesh-a', now))).toThrow();
    } finally {
      rmSync(folder, { recursive: true });
    }
  });

  test('certificates - let the two ends of one mesh talk TLS 1.3, and turn away one of another authority', async () => {
    const root = createAuthority('mesh-b', new Date());
    const identity = (name: string, from = root): { ca: string; cert: string; key: string } => {
      const { certificate, key } = issueKey(from, name, new Date());
      return { ca: root.certificate, cert: certificate, key };
    };
    const server = createServer(
      { ...identity('server.b'), requestCert: true, rejectUnauthorized: true, minVersion: 'TLSv1.3' },
      (socket) => socket.end(socket.getPeerCertificate().subjectaltname ?? 'nobody'),
    );
    server.on('tlsClientError', () => undefined);
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    const { port } = server.address() as { port: number };
    const hears = (options: object): Promise<string> =>
      new Promise((resolve, reject) => {
        const socket = connect({ host: '127.0.0.1', port, minVersion: 'TLSv1.3', ...options });
        socket
          .on('error', reject)
          .on('data', (data: Buffer) => resolve(data.toString()))
          .on('close', () => reject(new Error('closed')));
      });
    try {
      expect(await hears({ ...identity('client.b'), servername: 'server.b' })).toBe('DNS:client.b');
      await expect(hears({ ...identity('client.b'), servername: 'other.b' })).rejects.toThrow(/altnames/);
      await expect(
        hears({ ...identity('client.b', createAuthority('mesh-b', new Date())), servername: 'server.b' }),
      ).rejects.toThrow();
      await expect(hears({ ca: root.certificate, servername: 'server.b' })).rejects.toThrow(/certificate required/);
    } finally {
      server.close();
    }
  });
});
