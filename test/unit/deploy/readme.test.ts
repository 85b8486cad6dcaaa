import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import type { ShardmeshEngine } from '../../../coordinator/engine/engine.ts';
import type { MeshService } from '../../../coordinator/mesh/mesh-service.ts';
import { meshMetrics } from '../../../coordinator/observe/mesh-metrics.ts';
import { Metrics } from '../../../coordinator/observe/metrics.ts';
import { repository } from './container-files.ts';
import { parseCommand, wordsOf } from './parse-command.ts';

const readme = readFileSync(join(repository, 'deploy/README.md'), 'utf8');
const lines = [...readme.matchAll(/```sh\n([\s\S]*?)```/g)].flatMap(([, block = '']) => block.split('\n'));

/** Anything that is asked for is 0, or an object of which the same is true. */
const zeros = (): never =>
  new Proxy(() => undefined, {
    get: (_, name) => (name === Symbol.toPrimitive ? () => 0 : zeros()),
    apply: () => zeros(),
  }) as never;

describe('deploy/README.md', () => {
  const commands = lines
    .filter((line) => /^(shardmesh|npm start) ?/.test(line))
    .map((line) => wordsOf(line.replace(/^npm start( --)?/, 'shardmesh serve')).slice(1));

  test('deploy/README.md - shows every command that a user starts', async () => {
    const names = await Promise.all(commands.map(async (args) => (await parseCommand(args)).name));
    expect(new Set(names)).toEqual(new Set(['serve', 'plan', 'doctor', 'enroll', 'keys', 'worker']));
  });

  test('deploy/README.md - names files of the repository that are there', () => {
    for (const path of [
      'deploy/container/Dockerfile',
      'deploy/container/compose.yaml',
      'deploy/systemd/shardmesh.service',
      'deploy/setup/setup.mjs',
    ]) {
      expect(readme).toContain(path);
      expect(() => readFileSync(join(repository, path))).not.toThrow();
    }
  });

  test('deploy/README.md - lists every metric', async () => {
    const engine = zeros() as ShardmeshEngine;
    const service = zeros() as MeshService;
    const sources = meshMetrics(engine, service, zeros());
    const own = [
      ...Object.keys(sources.gauges()),
      ...Object.keys(sources.counters()).map((name) => `${name}_total`),
      ...(await new Metrics({ gauges: () => ({}), counters: () => ({}), workers: () => [] }).text())
        .split('\n')
        .filter((line) => line.startsWith('# TYPE shardmesh_'))
        .map((line) => (line.split(' ')[2] ?? '').replace('shardmesh_', '')),
    ];
    expect(own.length).toBeGreaterThan(30);
    expect(own.filter((name) => !new RegExp(`\`${name}[\`{]`).test(readme))).toEqual([]);
  });
});
