/** `shardmesh keys`: configuration of a NATS server and one credential file a process, for workers that are started by hand. */
import { Command, Option, InvalidArgumentError } from 'commander';
import { randomBytes } from 'node:crypto';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { brokerConfigText, newUser } from '../../coordinator/mesh/broker-config.ts';
import { writeCredentials, type Credentials } from '../../protocol/credentials.ts';
import { newMeshId, newPlacementId, newWorkerId, type WorkerId } from '../../protocol/ids.ts';
import { meshSubjects, systemPermissions } from '../../protocol/subjects.ts';

interface Values {
  workers: number;
  natsPort: number;
  out: string;
}

const count = (text: string): number => {
  if (!/^\d+$/.test(text) || Number(text) < 1 || Number(text) > 256)
    throw new InvalidArgumentError('a number from 1 to 256 is needed.');
  return Number(text);
};
const port = (text: string): number => {
  if (!/^\d+$/.test(text) || Number(text) < 1 || Number(text) > 65535)
    throw new InvalidArgumentError('a port from 1 to 65535 is needed.');
  return Number(text);
};

export function keysCommand(): Command {
  return new Command('keys')
    .description(
      'Makes the credentials of a mesh: a NATS configuration, one file for the coordinator, one for each worker (all 0600).',
    )
    .addOption(new Option('--workers <n>', 'workers that get credentials').makeOptionMandatory().argParser(count))
    .addOption(new Option('--nats-port <n>', 'port of the NATS server, on loopback').default(4222).argParser(port))
    .addOption(new Option('--out <folder>', 'folder to write into').default('mesh'))
    .addHelpText(
      'after',
      `
Example:
  shardmesh keys --workers 2 --out mesh
  nats-server -c mesh/nats-server.conf &
  shardmesh worker --credentials mesh/worker-1.json --cores 0 &
  shardmesh worker --credentials mesh/worker-2.json --cores 1 &
  shardmesh serve --nats nats://127.0.0.1:4222 --credentials mesh/coordinator.json --tp 2
`,
    )
    .action((values: Values) => makeKeys(values));
}

export function makeKeys({ workers, natsPort, out }: Values): void {
  const folder = resolve(out);
  mkdirSync(folder, { recursive: true, mode: 0o700 });
  const mesh = newMeshId();
  const placement = newPlacementId();
  const subjects = meshSubjects(mesh);
  const secret = randomBytes(32).toString('base64url');
  const serverName = `shardmesh-${mesh}`;
  const write = (file: string, role: Credentials['role'], worker: WorkerId | null) => {
    const user = newUser();
    writeCredentials(join(folder, file), {
      version: 1,
      role,
      url: `nats://127.0.0.1:${natsPort}`,
      serverName,
      ...user,
      mesh,
      secret,
      worker,
      placements: [placement],
      tls: null,
    });
    return user.nkey;
  };
  const meshUsers = [{ nkey: write('coordinator.json', 'coordinator', null), permissions: subjects.coordinatorPermissions() }];
  for (let index = 1; index <= workers; index++) {
    const worker = newWorkerId();
    meshUsers.push({
      nkey: write(`worker-${index}.json`, 'worker', worker),
      permissions: subjects.workerPermissions(worker, [placement]),
    });
  }
  const systemUsers = [{ nkey: write('system.json', 'system', null), permissions: systemPermissions() }];
  writeFileSync(
    join(folder, 'nats-server.conf'),
    brokerConfigText({
      serverName,
      host: '127.0.0.1',
      tls: null,
      port: natsPort,
      portsDirectory: folder,
      meshUsers,
      systemUsers,
    }),
    {
      mode: 0o600,
    },
  );
  process.stdout.write(`credentials of mesh ${mesh} are in ${folder}\n`);
}
