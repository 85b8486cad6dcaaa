import { chmodSync, mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { readCredentials, writeCredentials, type Credentials } from '../../../protocol/credentials.ts';
import type { MeshId, PlacementId, WorkerId } from '../../../protocol/ids.ts';

const credentials: Credentials = {
  version: 1,
  role: 'worker',
  url: 'nats://127.0.0.1:4222',
  serverName: 'shardmesh-x',
  nkey: `U${'A'.repeat(55)}`,
  seed: `SU${'A'.repeat(56)}`,
  mesh: 'mmmmmmmmmmmmmmmmmmmmmmmmmm' as MeshId,
  secret: 's'.repeat(43),
  worker: 'aaaaaaaaaaaaaaaaaaaaaaaaaa' as WorkerId,
  placements: ['ccccccccccccccccccccccccci' as PlacementId],
  tls: null,
};

let directory: string;
let file: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'shardmesh-test-'));
  file = join(directory, 'worker.json');
});
afterEach(() => rmSync(directory, { recursive: true }));

describe('credentials', () => {
  test('credentials - are written for the owner only and read back', () => {
    writeFileSync(file, 'old', { mode: 0o644 });
    writeCredentials(file, credentials);
    expect(statSync(file).mode & 0o777).toBe(0o600);
    expect(readCredentials(file)).toEqual(credentials);
  });

  test('credentials - that others may read are refused with the remedy', () => {
    writeCredentials(file, credentials);
    chmodSync(file, 0o640);
    expect(() => readCredentials(file)).toThrow(/other users may read it \(mode 640\); chmod 600 it/);
  });

  test.each<[string, Partial<Record<keyof Credentials | 'extra', unknown>>, string]>([
    ['an unknown key', { extra: 1 }, 'unknown key "extra"'],
    ['another version', { version: 2 }, 'version must be 1'],
    ['an address that is no URL', { url: 'localhost' }, 'url must be'],
    ['a URL with a password', { url: 'nats://a:b@host:1' }, 'url must be'],
    ['a short secret', { secret: 'abc' }, 'secret must be'],
    ['a worker without an id', { worker: null }, 'worker must be'],
    ['placements that are no ids', { placements: ['*'] }, 'placements must be'],
    ['a certificate that is none', { tls: { authority: 'a', certificate: 'b', key: 'c' } }, 'tls must be'],
  ])('credentials - with %s are refused', (_, change, message) => {
    writeFileSync(file, JSON.stringify({ ...credentials, ...change }), { mode: 0o600 });
    expect(() => readCredentials(file)).toThrow(message);
  });

  test('credentials - never put a secret into an error', () => {
    writeFileSync(file, JSON.stringify({ ...credentials, seed: 'SUSECRET' }), { mode: 0o600 });
    expect(() => readCredentials(file)).toThrow(/seed must be/);
    expect(() => readCredentials(file)).not.toThrow(/SUSECRET/);
    writeFileSync(file, '{"seed": SUSECRET', { mode: 0o600 });
    expect(() => readCredentials(file)).not.toThrow(/SUSECRET/);
  });
});
