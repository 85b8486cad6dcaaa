import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { readCompose, readDockerfile, readUnit, repository } from './container-files.ts';
import { parseCommand } from './parse-command.ts';

describe('Dockerfile', () => {
  const instructions = readDockerfile();
  const stages: { name: string; text: string }[][] = [];
  for (const instruction of instructions) {
    if (instruction.name === 'FROM') stages.push([]);
    stages.at(-1)?.push(instruction);
  }
  const last = stages.at(-1) ?? [];

  test('Dockerfile - builds in one stage and runs in another, of the same base', () => {
    expect(stages.map(([from]) => from?.text)).toEqual(['node:20-bookworm-slim AS build', 'node:20-bookworm-slim']);
    expect(last.some(({ name, text }) => name === 'RUN' && /apt-get/.test(text))).toBe(false);
  });

  test('Dockerfile - runs as a user that is not root', () => {
    expect(last.filter(({ name }) => name === 'USER')).toEqual([{ name: 'USER', text: 'shardmesh' }]);
    const user = last.findIndex(({ name }) => name === 'USER');
    expect(last.slice(user + 1).map(({ name }) => name)).toEqual(['ENTRYPOINT', 'CMD']);
  });

  test('Dockerfile - copies what the repository has or the set-up makes', () => {
    const made = ['node_modules', 'dist', 'build/shardmesh.node', 'cache'];
    const copied = last.filter(({ name }) => name === 'COPY').map(({ text }) => (text.split(' ')[2] ?? '').replace('/app/', ''));
    expect(copied).toEqual(['package.json', 'node_modules', 'dist', 'build/shardmesh.node', 'deploy', 'cache']);
    for (const path of copied) if (!made.includes(path)) expect(existsSync(join(repository, path))).toBe(true);
  });

  test('Dockerfile - its entry point is the launcher, and its command parses', async () => {
    const list = (wanted: string): string[] => JSON.parse(last.find(({ name }) => name === wanted)?.text ?? '[]') as string[];
    expect(list('ENTRYPOINT')).toEqual(['node', 'deploy/shardmesh.mjs']);
    expect(existsSync(join(repository, 'deploy/shardmesh.mjs'))).toBe(true);
    expect((await parseCommand(list('CMD'))).name).toBe('serve');
  });

  test('Dockerfile - keeps build products of the host out of the image', () => {
    const ignored = readFileSync(join(repository, '.dockerignore'), 'utf8').split('\n');
    expect(ignored).toEqual(expect.arrayContaining(['.git', 'node_modules', 'dist', 'build']));
  });
});

describe('compose file', () => {
  const { services, volumes } = readCompose();

  test('compose file - is NATS, a coordinator, two workers, and the keys they need', () => {
    expect(Object.keys(services)).toEqual(['keys', 'nats', 'worker-1', 'worker-2', 'coordinator']);
    expect(Object.keys(volumes)).toEqual(['mesh']);
    for (const service of Object.values(services)) expect(service.volumes).toEqual(['mesh:/app/mesh']);
  });

  test('compose file - opens no port to the outside', () => {
    for (const service of Object.values(services)) expect(service.ports).toBeUndefined();
  });

  test('compose file - all share one loopback and one process namespace', () => {
    for (const name of ['worker-1', 'worker-2', 'coordinator'] as const)
      expect(services[name]).toMatchObject({ network_mode: 'service:nats', pid: 'service:nats' });
  });

  test('compose file - the coordinator ends first and has time to drain', () => {
    expect(services.coordinator.depends_on).toEqual(['nats', 'worker-1', 'worker-2']);
    expect(services.coordinator.stop_grace_period).toBe('20s');
  });

  test('compose file - every command parses, and they agree on broker, files and ranks', async () => {
    const parsed = async (name: keyof typeof services) => parseCommand(services[name].command);
    expect(await parsed('keys')).toMatchObject({ name: 'keys', options: { workers: 2, natsPort: 4222, out: '/app/mesh' } });
    for (const index of [1, 2] as const)
      expect(await parsed(`worker-${index}`)).toMatchObject({
        name: 'worker',
        options: { nats: 'nats://127.0.0.1:4222', credentials: `/app/mesh/worker-${index}.json`, cores: [index - 1] },
      });
    expect(await parsed('coordinator')).toMatchObject({
      name: 'serve',
      options: {
        nats: 'nats://127.0.0.1:4222',
        credentials: '/app/mesh/coordinator.json',
        tp: { count: 2, parts: null },
        port: 8080,
      },
    });
    expect(services.coordinator.healthcheck?.test.join(' ')).toContain('http://127.0.0.1:8080/readyz');
  });
});

describe('systemd unit', () => {
  const unit = readUnit();
  const service = unit['Service'] ?? {};

  test('systemd unit - starts the launcher with options that parse', async () => {
    const [node, launcher = '', ...args] = (service['ExecStart'] ?? '').split(' ');
    expect(node).toBe('/usr/bin/node');
    expect(existsSync(join(repository, launcher))).toBe(true);
    expect((await parseCommand(args)).name).toBe('serve');
  });

  test('systemd unit - lets the coordinator drain before anything is killed', () => {
    expect(service['KillMode']).toBe('mixed');
    expect(Number(service['TimeoutStopSec'])).toBeGreaterThan(10);
    expect(service['Restart']).toBe('on-failure');
  });

  test('systemd unit - runs as its own user, on loopback, with its cache where it may write', () => {
    expect(service).toMatchObject({ User: 'shardmesh', NoNewPrivileges: 'yes', ProtectSystem: 'strict', IPAddressDeny: 'any' });
    expect(service['IPAddressAllow']).toBe('localhost');
    expect(service['Environment']).toContain(`SHARDMESH_CACHE=/var/lib/${service['StateDirectory']}`);
    expect(unit['Install']).toEqual({ WantedBy: 'multi-user.target' });
  });
});
