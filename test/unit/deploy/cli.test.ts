import type { Command, Option } from 'commander';
import { describe, expect, test } from 'vitest';
import { shardmeshProgram } from '../../../deploy/cli/main.ts';
import { helpText, leaves, parseCommand, wordsOf } from './parse-command.ts';

const program = await shardmeshProgram();
const commands = program.commands;
const names = commands.map((command) => command.name());

const examplesOf = (command: Command): string[] =>
  helpText(command)
    .split('\n')
    .map((line) => line.trim())
    .filter((line) => line.startsWith('shardmesh '));

describe('command line', () => {
  test('command line - has the commands it should have', () => {
    expect(names).toEqual(['serve', 'worker', 'plan', 'models', 'trace', 'enroll', 'bench', 'keys', 'tune', 'doctor']);
    expect(leaves(program).map(({ path }) => path.join(' '))).toEqual([
      'serve',
      'worker',
      'plan',
      'models list',
      'models pull',
      'models inspect',
      'models verify',
      'trace',
      'enroll',
      'bench',
      'keys',
      'tune',
      'doctor',
    ]);
  });

  test.each(names)('command line - %s --help describes it and gives examples', (name) => {
    const command = commands.find((one) => one.name() === name) as Command;
    expect(command.description().length).toBeGreaterThan(20);
    expect(helpText(command)).toMatch(/^Usage: shardmesh /);
    expect(examplesOf(command).length).toBeGreaterThan(0);
  });

  test('command line - every example parses', async () => {
    const parsed = await Promise.all(
      commands.flatMap(examplesOf).map(async (line) => (await parseCommand(wordsOf(line).slice(1))).name),
    );
    expect(new Set(parsed)).toEqual(
      new Set([
        'serve',
        'worker',
        'plan',
        'models list',
        'models pull',
        'models inspect',
        'trace',
        'doctor',
        'keys',
        'enroll',
        'bench',
        'tune',
      ]),
    );
  });

  test('command line - a flag means the same in every command', () => {
    const meanings = new Map<string, Set<string>>();
    for (const { command } of leaves(program))
      for (const option of command.options as Option[]) {
        const meaning = JSON.stringify([
          option.flags,
          option.description,
          option.defaultValue ?? null,
          option.argChoices ?? null,
        ]);
        meanings.set(option.long ?? option.flags, (meanings.get(option.long ?? option.flags) ?? new Set()).add(meaning));
      }
    expect([...meanings].filter(([, set]) => set.size > 1)).toEqual([]);
  });

  test('command line - loads one command alone, and none by the name of something else', async () => {
    expect((await shardmeshProgram('worker')).commands.map((command) => command.name())).toEqual(['worker']);
    expect((await shardmeshProgram('constructor')).commands).toHaveLength(10);
  });

  test('command line - plan takes every option of serve', () => {
    const flags = (name: string): string[] =>
      (commands.find((one) => one.name() === name)?.options ?? []).map((one) => one.flags);
    expect(flags('plan')).toEqual([...flags('serve'), '--json']);
  });

  test('command line - serve has the options that are promised', () => {
    const long = (commands.find((one) => one.name() === 'serve')?.options ?? []).map((one) => one.long);
    expect(long).toEqual(
      expect.arrayContaining(
        '--model --served-model-name --tp --pp --executor --isa --link --port --host --nats --credentials --step-tokens-max --prefill-chunk-max --block-tokens --kv-cache-bytes --kv-type --context-tokens-max --cores --api-keys'.split(
          ' ',
        ),
      ),
    );
  });

  test('command line - turns text into checked values', async () => {
    const { options } = await parseCommand(
      'serve --tp 3:2:1 --pp 10:20 --kv-cache-bytes 1.5g --cores 0,2-3 --port 0 --no-prefix-cache'.split(' '),
    );
    expect(options).toMatchObject({
      tp: { count: 3, parts: [3, 2, 1] },
      pp: { count: 2, parts: [10, 20] },
      kvCacheBytes: 1_610_612_736,
      cores: [0, 2, 3],
      port: 0,
      prefixCache: false,
      model: 'smollm2-135m-instruct-q4_1',
      executor: 'auto',
      link: 'auto',
    });
    expect((await parseCommand(['serve', '--tp', '2'])).options['tp']).toEqual({ count: 2, parts: null });
  });

  test.each([
    ['serve --tp 0', '--tp is a count (2) or a list of shares (3:2:1)'],
    ['serve --tp 65', 'at most 64'],
    ['serve --tp 2:x', '--tp is a count'],
    ['serve --port 65536', 'a whole number from 0 to 65535'],
    ['serve --kv-cache-bytes 5', 'at least 1m'],
    ['serve --cores 3-1', 'no such range of cores: 3-1'],
    ['serve --link rdma', 'Allowed choices are auto, shm, tcp, grpc, nats'],
    ['serve --isa sse', 'Allowed choices are auto, amx, avx512, avx2, portable'],
    ['serve --executor tpu', 'Allowed choices are auto, cpu, cuda, reference'],
    ['worker --tp 2', "unknown option '--tp'"],
    ['keys --workers 257', 'a number from 1 to 256'],
    ['keys', "required option '--workers <n>' not specified"],
    ['models pull', "missing required argument 'name'"],
    ['plan --frobnicate', "unknown option '--frobnicate'"],
    ['benchmark', "unknown command 'benchmark'"],
  ])('command line - refuses "%s"', async (line, message) => {
    await expect(parseCommand(line.split(' '))).rejects.toThrow(message);
  });
});
