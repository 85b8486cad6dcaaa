import { describe, expect, test } from 'vitest';
import { checkDays, checkSkew } from '../../../deploy/cli/doctor-hosts.ts';
import { coordinatorConfig } from '../../../deploy/cli/serve.ts';
import type { OptionValues } from '../../../deploy/cli/options.ts';
import { parseCommand } from './parse-command.ts';

const config = async (line: string): Promise<Awaited<ReturnType<typeof coordinatorConfig>>> =>
  coordinatorConfig((await parseCommand(['serve', ...line.split(' ')])).options as unknown as OptionValues);

describe('serve beyond loopback', () => {
  test.each([
    ['--host 0.0.0.0', /--host 0\.0\.0\.0 is beyond loopback, which needs API keys/],
    ['--tp 2 --local-workers 1', /--local-workers 1: --tp and --pp need 2/],
    ['--tp 2 --one-process', /--one-process is for workers that serve starts on a card: it needs --executor cuda/],
    ['--mesh folder', /--mesh is for workers of other hosts and needs --advertise/],
    ['--advertise 192.0.2.1 --credentials c.json', /--credentials is for a NATS server that runs already/],
  ])('serve - refuses %s', async (line, message) => {
    await expect(config(line)).rejects.toMatchObject({
      code: 'config_invalid',
      message: expect.stringMatching(message) as string,
    });
  });

  test.each(['0.0.0.0', '::', '192.0.2.1:65534', 'a b'])('serve - refuses --advertise %s', async (address) => {
    await expect(parseCommand(['serve', '--advertise', address])).rejects.toThrow(
      /an address that other hosts can reach is needed/,
    );
  });

  test('serve - advertises port 7422 unless another one is given', async () => {
    expect((await parseCommand(['serve', '--advertise', '192.0.2.1'])).options['advertise']).toEqual({
      host: '192.0.2.1',
      port: null,
    });
    expect((await parseCommand(['serve', '--advertise', '[2001:db8::1]:90'])).options['advertise']).toEqual({
      host: '2001:db8::1',
      port: 90,
    });
    expect((await parseCommand(['serve', '--advertise', '2001:db8::1'])).options['advertise']).toEqual({
      host: '2001:db8::1',
      port: null,
    });
  });
});

describe('doctor of several hosts', () => {
  test('doctor - warns of a certificate two weeks before it ends', () => {
    expect([13, 14, -1].map((days) => checkDays(days).status)).toEqual(['warn', 'ok', 'fail']);
  });

  test('doctor - warns of clocks that differ by seconds, fails when certificates would', () => {
    expect([900, -6_000, 3_600_000].map((ms) => checkSkew(ms).status)).toEqual(['ok', 'warn', 'fail']);
    expect(checkSkew(-6_000).value).toBe("the coordinator's clock is 6 s behind");
  });
});
