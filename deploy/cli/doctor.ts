/** `shardmesh doctor`: looks at everything the mesh stands on, one line each, with the remedy. */
import { Command } from 'commander';
import { existsSync } from 'node:fs';
import { resolve } from 'node:path';
import { readCredentials } from '../../protocol/credentials.ts';
import { ShardmeshError } from '../../protocol/errors.ts';
import { defaultMeshFolder, defaultWorkerFile } from './config-directory.ts';
import { localChecks, type Check, type Finding } from './doctor-checks.ts';
import { authorityChecks, certificateChecks } from './doctor-hosts.ts';
import { meshChecks } from './doctor-mesh.ts';
import { addOptions, type OptionValues } from './options.ts';

type DoctorValues = Pick<OptionValues, 'model' | 'port' | 'nats' | 'credentials' | 'mesh' | 'json'>;

export function doctorCommand(): Command {
  const command = new Command('doctor').description(
    'Checks what the mesh stands on: one line each, with the remedy. Exit code 1 when something fails.',
  );
  return addOptions(command, ['model', 'port', 'nats', 'credentials', 'mesh', 'json'])
    .addHelpText(
      'after',
      `
Examples:
  shardmesh doctor
  shardmesh doctor --nats nats://127.0.0.1:4222 --credentials mesh/coordinator.json     also between the workers of that mesh
  shardmesh doctor --credentials worker.json     on another host: also its certificate, and its clock against the coordinator's
`,
    )
    .action(async (values: DoctorValues) => doctor(values));
}

export type NamedFinding = Finding & { what: string };

async function doctor({ model, port, nats, credentials: named, mesh: folder, json }: DoctorValues): Promise<void> {
  if (nats !== undefined && named === undefined)
    throw new ShardmeshError('config_invalid', '--nats needs --credentials FILE (made by `shardmesh keys`)');
  // A host that was enrolled has its credentials in a place of their own.
  const file = named ?? (existsSync(defaultWorkerFile()) ? defaultWorkerFile() : undefined);
  const credentials = file === undefined ? null : { ...readCredentials(file), ...(nats ? { url: nats } : {}) };
  const findings: NamedFinding[] = [];
  const look = async (checks: readonly Check[]): Promise<void> => {
    for (const check of checks) {
      const finding = { what: check.what, ...(await findingOf(check)) };
      findings.push(finding);
      if (!json) process.stdout.write(`${findingLine(finding)}\n`);
    }
  };
  await look(localChecks({ model, port }));
  await look([
    ...authorityChecks(resolve(folder ?? defaultMeshFolder())),
    ...(credentials ? certificateChecks(credentials) : []),
  ]);
  // Only a coordinator may listen to the workers.
  if (credentials?.role === 'coordinator') {
    try {
      const mesh = await meshChecks(credentials);
      try {
        await look(mesh.checks);
      } finally {
        await mesh.close();
      }
    } catch (error) {
      const remedy = 'is nats-server running with the configuration that `shardmesh keys` wrote?';
      await look([{ what: 'mesh', run: () => ({ status: 'fail', value: (error as Error).message, remedy }) }]);
    }
  }
  if (json) process.stdout.write(`${JSON.stringify({ findings }, null, 2)}\n`);
  process.exitCode = findings.some((finding) => finding.status === 'fail') ? 1 : 0;
}

/** A check that throws has found something too. */
export async function findingOf(check: Check): Promise<Finding> {
  try {
    return await check.run();
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error);
    return { status: 'fail', value: message.split('\n')[0] ?? message };
  }
}

export function findingLine({ status, what, value, remedy }: NamedFinding): string {
  const line = `${status.padEnd(4)}  ${what.padEnd(16)}  ${value}`;
  return remedy === undefined ? line : `${line}  -> ${remedy}`;
}
