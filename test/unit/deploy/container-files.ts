/** The files under `deploy/container` and `deploy/systemd` as plain values. */
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { parse } from 'yaml';

export const repository = fileURLToPath(new URL('../../../', import.meta.url));

export interface ComposeService {
  image: string;
  volumes: string[];
  depends_on?: string[];
  network_mode?: string;
  pid?: string;
  entrypoint?: string[];
  command: string[];
  ports?: string[];
  healthcheck?: { test: string[] };
  stop_grace_period?: string;
}

export interface Compose {
  services: Record<'keys' | 'nats' | 'worker-1' | 'worker-2' | 'coordinator', ComposeService>;
  volumes: Record<string, unknown>;
}

export const readCompose = (): Compose =>
  parse(readFileSync(`${repository}deploy/container/compose.yaml`, 'utf8'), { merge: true }) as Compose;

export interface Instruction {
  name: string;
  text: string;
}

/** Instructions of the Dockerfile in order, comments left out, continued lines joined. */
export function readDockerfile(): Instruction[] {
  return readFileSync(`${repository}deploy/container/Dockerfile`, 'utf8')
    .replaceAll('\\\n', ' ')
    .split('\n')
    .filter((line) => line.trim() !== '' && !line.startsWith('#'))
    .map((line) => {
      const [name = '', ...rest] = line.split(' ');
      return { name, text: rest.join(' ') };
    });
}

/** Sections of the unit file; a key that stands twice keeps the last value. */
export function readUnit(): Record<string, Record<string, string>> {
  const sections: Record<string, Record<string, string>> = {};
  let section: Record<string, string> = {};
  for (const line of readFileSync(`${repository}deploy/systemd/shardmesh.service`, 'utf8').split('\n')) {
    const header = /^\[(\w+)\]$/.exec(line)?.[1];
    if (header !== undefined) sections[header] = section = {};
    else if (/^\w+=/.test(line)) section[line.slice(0, line.indexOf('='))] = line.slice(line.indexOf('=') + 1);
    else if (line !== '' && !line.startsWith('#')) throw new Error(`not a line of a unit file: ${line}`);
  }
  return sections;
}
