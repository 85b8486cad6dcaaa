import { homedir } from 'node:os';
import { join } from 'node:path';

/** Where downloads that outlive a checkout are kept: SHARDMESH_CACHE, else XDG_CACHE_HOME/shardmesh, else ~/.cache/shardmesh. */
export function defaultCacheDirectory(environment: NodeJS.ProcessEnv = process.env): string {
  if (environment['SHARDMESH_CACHE']) return environment['SHARDMESH_CACHE'];
  if (environment['XDG_CACHE_HOME']) return join(environment['XDG_CACHE_HOME'], 'shardmesh');
  return join(homedir(), '.cache', 'shardmesh');
}
