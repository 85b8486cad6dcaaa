/** `shardmesh enroll`: lets workers of other hosts in, shows them, and throws them out. Talks to the `shardmesh serve --advertise` that runs on this host. */
import { Command, InvalidArgumentError, Option } from 'commander';
import { resolve } from 'node:path';
import { askCoordinator, type ControlReplies } from '../../coordinator/authority/control-socket.ts';
import { ShardmeshError } from '../../protocol/errors.ts';
import { enrollmentLimits } from '../../protocol/limits.ts';
import { defaultMeshFolder } from './config-directory.ts';
import { addOptions } from './options.ts';
import { table } from './table.ts';

interface Values {
  minutes: number;
  list?: boolean;
  revoke?: string;
  mesh?: string;
  json?: boolean;
}

const minutes = (text: string): number => {
  if (!/^\d+$/.test(text) || Number(text) < 1 || Number(text) > enrollmentLimits.minutesMax)
    throw new InvalidArgumentError(`a whole number from 1 to ${enrollmentLimits.minutesMax} is needed.`);
  return Number(text);
};

export function enrollCommand(): Command {
  const command = new Command('enroll')
    .description(
      'Prints a one-time command that makes another host a worker of the mesh that serves here with --advertise; lists and revokes such workers.',
    )
    .addOption(
      new Option('--minutes <n>', 'how long the command is good').default(enrollmentLimits.minutesMax).argParser(minutes),
    )
    .addOption(new Option('--list', 'show the workers that were enrolled'))
    .addOption(new Option('--revoke <worker>', 'cut a worker off, for good; its id or how it begins').conflicts('list'));
  return addOptions(command, ['mesh', 'json'])
    .addHelpText(
      'after',
      `
Examples:
  shardmesh serve --advertise 192.0.2.1 --local-workers 1 --pp 2      on the coordinator's host, first
  shardmesh enroll                                                    there as well: prints what to run on the other host
  shardmesh enroll --list
  shardmesh enroll --revoke k3v7
`,
    )
    .action(async (values: Values) => enroll(values));
}

async function enroll(values: Values): Promise<void> {
  const folder = resolve(values.mesh ?? defaultMeshFolder());
  const print = (reply: object, text: string): void =>
    void process.stdout.write(values.json ? `${JSON.stringify(reply, null, 2)}\n` : `${text}\n`);
  if (values.list) {
    const reply = await askCoordinator(folder, { command: 'list' });
    return print(reply, workerTable(reply));
  }
  if (values.revoke !== undefined) {
    if (values.revoke.length < 4)
      throw new ShardmeshError('config_invalid', `--revoke ${values.revoke}: at least 4 characters of the id are needed`);
    const reply = await askCoordinator(folder, { command: 'revoke', worker: values.revoke });
    return print(reply, `worker ${reply.worker} is revoked`);
  }
  const reply = await askCoordinator(folder, { command: 'token', minutes: values.minutes });
  if (!values.json) process.stderr.write(`On the other host, once, before ${reply.expiresAt}:\n`);
  print(reply, `shardmesh worker --enroll ${reply.token}`);
}

function workerTable({ workers }: ControlReplies['list']): string {
  if (workers.length === 0) return 'no worker was enrolled yet';
  return table(
    ['worker', 'host', 'address', 'enrolled', 'certificate until', 'state'],
    workers.map(({ worker, host, address, enrolledAt, certificateEndsAt, state }) => [
      worker,
      host,
      address,
      enrolledAt.slice(0, 16),
      certificateEndsAt.slice(0, 10),
      state,
    ]),
  ).join('\n');
}
