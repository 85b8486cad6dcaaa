import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { delimiter, join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { findNatsServer, searchPlaces } from '../../../../coordinator/mesh/nats-server.ts';

let root: string;
beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), 'shardmesh-test-'));
});
afterEach(() => rmSync(root, { recursive: true }));

/** A program called nats-server that prints a version. */
function fakeServer(folder: string, output: string, mode = 0o755): string {
  mkdirSync(join(root, folder), { recursive: true });
  const path = join(root, folder, 'nats-server');
  writeFileSync(path, `#!/bin/sh\necho '${output}'\n`, { mode });
  return path;
}

describe('nats server search', () => {
  test('nats server search - takes the first on PATH that is new enough', async () => {
    fakeServer('old', 'nats-server: v2.9.9');
    fakeServer('plain', 'nats-server: v2.14.3', 0o644);
    const path = fakeServer('new', 'nats-server: v2.9.10');
    fakeServer('newest', 'nats-server: v2.15.1');
    fakeServer('cache/nats-server/2.15.1', 'nats-server: v2.15.1');
    const places = {
      path: ['relative', ...['missing', 'old', 'plain', 'new', 'newest'].map((folder) => join(root, folder))].join(delimiter),
      cacheDirectory: join(root, 'cache'),
    };
    expect(await findNatsServer(places)).toEqual({ path, version: '2.9.10', source: 'PATH' });
  });

  test('nats server search - takes the newest of the cache, by number', async () => {
    fakeServer('cache/nats-server/2.9.10', 'nats-server: v2.9.10');
    const path = fakeServer('cache/nats-server/2.15.1', 'nats-server: v2.15.1');
    fakeServer('cache/nats-server/broken', 'no version');
    expect(await findNatsServer({ path: '', cacheDirectory: join(root, 'cache') })).toEqual({
      path,
      version: '2.15.1',
      source: 'cache',
    });
  });

  test('nats server search - says what it found, why it will not do, and the remedy', async () => {
    const path = fakeServer('old', 'nats-server: v2.9.9');
    const search = findNatsServer({ path: join(root, 'old'), cacheDirectory: join(root, 'cache') });
    await expect(search).rejects.toMatchObject({ code: 'broker_missing' });
    await expect(search).rejects.toThrow(`${path} is 2.9.9`);
    await expect(search).rejects.toThrow('apt-get install nats-server');
  });

  test('nats server search - looks where the environment says', () => {
    expect(searchPlaces({ PATH: '/bin', SHARDMESH_CACHE: '/c', XDG_CACHE_HOME: '/x' })).toEqual({
      path: '/bin',
      cacheDirectory: '/c',
    });
    expect(searchPlaces({ XDG_CACHE_HOME: '/x' })).toEqual({ path: '', cacheDirectory: '/x/shardmesh' });
  });
});
