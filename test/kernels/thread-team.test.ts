/** Runs thread_team_test.cpp: how the compute threads of an executor share a piece of work. Each of its cases is a test here. */
import { beforeAll, describe, expect, it } from 'vitest';
import { buildKernelTarget } from './build-target.ts';
import { linesOf } from './test-program.ts';

describe.skipIf(process.platform !== 'linux')('thread team', () => {
  let lines: string[] = [];
  beforeAll(async () => {
    lines = await linesOf(await buildKernelTarget('thread_team_test'), [], 60_000);
  }, 240_000);

  it.each([
    'thread team - 2 threads that spin do every item once',
    'thread team - 2 threads that sleep do every item once',
    'thread team - 5 threads on few cores do every item once',
    'thread team - 1 thread does every item once',
    'thread team - what a slow thread has not begun is done by the others',
    'thread team - chunks are as large as asked for, but for the end of a share',
  ])('%s', (name) => {
    expect(lines.find((line) => line === `ok ${name}` || line.startsWith(`FAIL ${name}:`))).toBe(`ok ${name}`);
  });
});
