/** Finds a nats-server binary: on PATH, else in the cache where the set-up put it. Installs nothing. */
import { execFile } from 'node:child_process';
import { accessSync, constants, readdirSync } from 'node:fs';
import { homedir } from 'node:os';
import { delimiter, isAbsolute, join } from 'node:path';
import { promisify } from 'node:util';
import { ShardmeshError } from '../../protocol/errors.ts';
import { compareVersions, natsServerFloor, parseVersion } from '../../protocol/nats-version.ts';

export interface NatsServer {
  path: string;
  version: string;
  source: 'PATH' | 'cache';
}

export interface SearchPlaces {
  /** As in the environment: folders, in order. */
  path: string;
  cacheDirectory: string;
}

/** Where to look, from environment variables. */
export const searchPlaces = (env: NodeJS.ProcessEnv): SearchPlaces => ({
  path: env['PATH'] ?? '',
  cacheDirectory:
    env['SHARDMESH_CACHE'] ??
    (env['XDG_CACHE_HOME'] ? join(env['XDG_CACHE_HOME'], 'shardmesh') : join(homedir(), '.cache', 'shardmesh')),
});

/**
 * The first server on PATH of at least 2.9.10, else the newest in the cache.
 * @throws {ShardmeshError} `broker_missing`, with what was found and why it would not do
 */
export async function findNatsServer(places: SearchPlaces = searchPlaces(process.env)): Promise<NatsServer> {
  const rejected: string[] = [];
  const best = async (paths: string[], source: NatsServer['source']): Promise<NatsServer | null> => {
    const found: NatsServer[] = [];
    for (const path of paths) {
      const version = await versionOf(path);
      if (version === null) rejected.push(`${path} does not run`);
      else if (compareVersions(version, natsServerFloor) < 0) rejected.push(`${path} is ${version}`);
      else if (source === 'PATH') return { path, version, source };
      else found.push({ path, version, source });
    }
    return found.sort((a, b) => compareVersions(b.version, a.version))[0] ?? null;
  };
  const server =
    (await best(onPath(places.path), 'PATH')) ?? (await best(cached(join(places.cacheDirectory, 'nats-server')), 'cache'));
  if (server) return server;
  const why = rejected.length > 0 ? ` (${rejected.join('; ')})` : '';
  throw new ShardmeshError(
    'broker_missing',
    `no nats-server of ${natsServerFloor} or later on PATH or in ${places.cacheDirectory}${why}; run the set-up (npm start) or install one: apt-get install nats-server`,
  );
}

const isExecutable = (path: string): boolean => {
  try {
    accessSync(path, constants.X_OK);
    return true;
  } catch {
    return false;
  }
};

const onPath = (path: string): string[] =>
  path
    .split(delimiter)
    .filter((folder) => isAbsolute(folder))
    .map((folder) => join(folder, 'nats-server'))
    .filter(isExecutable);

function cached(folder: string): string[] {
  try {
    return readdirSync(folder)
      .map((version) => join(folder, version, 'nats-server'))
      .filter(isExecutable);
  } catch {
    return [];
  }
}

async function versionOf(path: string): Promise<string | null> {
  try {
    const { stdout } = await promisify(execFile)(path, ['--version'], { timeout: 10_000 });
    return parseVersion(stdout)?.join('.') ?? null;
  } catch {
    return null;
  }
}
