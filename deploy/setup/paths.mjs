import { homedir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

/** The checkout. */
export const root = join(dirname(fileURLToPath(import.meta.url)), '..', '..');

/** Downloads that outlive a clone: models, nats-server, weight slices. Same rule as kernels/model-file. */
export function cacheDirectory() {
  if (process.env.SHARDMESH_CACHE) return process.env.SHARDMESH_CACHE;
  if (process.env.XDG_CACHE_HOME) return join(process.env.XDG_CACHE_HOME, 'shardmesh');
  return join(homedir(), '.cache', 'shardmesh');
}
