import { homedir } from 'node:os';
import { join } from 'node:path';

/** Where a host keeps who it is in a mesh: XDG_CONFIG_HOME/shardmesh, else ~/.config/shardmesh. */
const configDirectory = (environment: NodeJS.ProcessEnv = process.env): string =>
  join(environment['XDG_CONFIG_HOME'] || join(homedir(), '.config'), 'shardmesh');

/** Of the coordinator's host. */
export const defaultMeshFolder = (): string => join(configDirectory(), 'mesh');
/** Of a worker's host. */
export const defaultWorkerFile = (): string => join(configDirectory(), 'worker.json');
