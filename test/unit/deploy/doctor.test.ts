import { describe, expect, test } from 'vitest';
import {
  checkClock,
  checkCmake,
  checkCompiler,
  checkCpu,
  checkCuda,
  checkDisk,
  checkHugePages,
  checkLink,
  checkMemory,
  checkNode,
  checkPlatform,
} from '../../../deploy/cli/doctor-checks.ts';
import { probeFinding } from '../../../deploy/cli/doctor-mesh.ts';
import { findingLine, findingOf } from '../../../deploy/cli/doctor.ts';

const GiB = 1024 ** 3;
const gcc = (version: string): string => `c++ (Debian ${version}-14) ${version}\nCopyright (C) 2022`;

describe('doctor', () => {
  test('doctor - needs Node 20.15', () => {
    expect(checkNode('20.15.0')).toEqual({ status: 'ok', value: '20.15.0' });
    expect(checkNode('20.14.9')).toMatchObject({ status: 'fail', remedy: 'install Node 20 LTS or later' });
    expect(checkNode('18.20.0').status).toBe('fail');
  });

  test('doctor - does not claim more than Linux x86-64', () => {
    expect(checkPlatform('linux', 'x64').status).toBe('ok');
    expect(checkPlatform('darwin', 'arm64').status).toBe('warn');
  });

  test('doctor - a missing compiler fails only while the addon is not built', () => {
    expect(checkCompiler(null, false)).toMatchObject({
      status: 'fail',
      remedy: expect.stringContaining('apt-get install cmake g++') as string,
    });
    expect(checkCompiler(null, true).status).toBe('warn');
    expect(checkCompiler(gcc('12.2.0'), false)).toEqual({ status: 'ok', value: 'c++ (Debian 12.2.0-14) 12.2.0' });
    expect(checkCompiler(gcc('10.2.1'), false).status).toBe('fail');
    expect(checkCompiler('Debian clang version 14.0.6', false).status).toBe('ok');
    expect(checkCompiler('Debian clang version 13.0.1', false).status).toBe('fail');
  });

  test('doctor - needs CMake 3.20', () => {
    expect(checkCmake('cmake version 3.25.1\n', false)).toEqual({ status: 'ok', value: '3.25.1' });
    expect(checkCmake('cmake version 3.18.4\n', false).value).toBe('3.18.4, 3.20 or later is needed');
    expect(checkCmake(null, false)).toMatchObject({ status: 'fail', value: 'not found' });
  });

  test('doctor - warns of a CPU without vector instructions', () => {
    const features = { model: 'Some CPU', cores: [0, 1], hugePages: 'madvise' as const };
    expect(checkCpu({ ...features, isas: ['avx2', 'portable'] })).toEqual({
      status: 'ok',
      value: 'Some CPU, 2 cores, avx2, portable',
    });
    expect(checkCpu({ ...features, isas: ['portable'] }).status).toBe('warn');
  });

  test('doctor - names the card, or says why there is none', () => {
    const bare = {
      name: 'Some Card',
      sm: 90,
      memoryBytes: 80 * GiB,
      multiprocessors: 132,
      bandwidthBytes: 0,
      powerWatts: 0,
      driver: '',
    };
    const card = { ...bare, bandwidthBytes: 3.352e12, powerWatts: 700, driver: '580.95.05' };
    const value = (found: typeof card, tuned: string | null) => checkCuda({ card: found, absent: null }, tuned);
    const first = 'Some Card, sm_90, 132 multiprocessors, 80.0 GiB';
    expect(value(card, '2030-01-02')).toEqual({
      status: 'ok',
      value: `${first}, 3352 GB/s, 700 W, driver 580.95.05, tuned 2030-01-02`,
    });
    expect(value(bare, null)).toEqual({ status: 'ok', value: `${first}, not tuned (shardmesh tune)` });
    expect(checkCuda({ card: null, absent: 'no driver' }, null)).toEqual({ status: 'ok', value: 'none: no driver' });
  });

  test('doctor - huge pages are worth a line to switch them on', () => {
    expect(checkHugePages('madvise').status).toBe('ok');
    expect(checkHugePages('never')).toMatchObject({
      status: 'warn',
      remedy: expect.stringContaining('echo madvise >') as string,
    });
  });

  test('doctor - memory below the model fails, below 1 GiB warns', () => {
    expect(checkMemory(8 * GiB, 16 * GiB, GiB)).toEqual({ status: 'ok', value: '8.0 GiB of 16.0 GiB available' });
    expect(checkMemory(8 * GiB, 16 * GiB, 9 * GiB)).toMatchObject({
      status: 'fail',
      value: '8.0 GiB of 16.0 GiB available, the model and its KV cache need 9.0 GiB',
    });
    expect(checkMemory(GiB / 2, 16 * GiB, 0).status).toBe('warn');
  });

  test('doctor - disk of the cache', () => {
    expect(checkDisk(2 * GiB, '/cache')).toEqual({ status: 'ok', value: '2.0 GiB free in /cache' });
    expect(checkDisk(GiB / 2, '/cache').status).toBe('warn');
    expect(checkDisk(GiB / 8, '/cache')).toMatchObject({
      status: 'fail',
      remedy: expect.stringContaining('SHARDMESH_CACHE') as string,
    });
  });

  test('doctor - a clock that goes back fails', () => {
    expect(checkClock([1, 2, 2, 3], 0, 100, 'tsc')).toEqual({ status: 'ok', value: 'monotonic, tsc' });
    expect(checkClock([1, 3, 2.5], 0, 100, 'tsc')).toMatchObject({
      status: 'fail',
      value: 'the monotonic clock went back by 0.500 ms',
    });
    expect(checkClock([1, 2], 0, 100, 'acpi_pm').status).toBe('warn');
    expect(checkClock([1, 2], -40, 100, 'tsc').value).toBe('monotonic, tsc; the wall clock moved -40.0 ms against it in 100 ms');
  });

  test('doctor - a slow loopback is worth a warning', () => {
    const link = { roundTripUs: 120, roundTripUsP99: 400, bytesPerSecond: 500 * 1024 ** 2 };
    expect(checkLink(link, 500)).toEqual({ status: 'ok', value: 'round trip 120 us (p99 400), 500 MiB/s' });
    expect(checkLink({ ...link, roundTripUs: 900 }, 500).status).toBe('warn');
  });

  test('doctor - a worker that does not answer a probe fails with its reason', () => {
    expect(probeFinding({ roundTripUs: [300, 100, 200], error: null })).toEqual({
      status: 'ok',
      value: 'round trip 200 us (least 100) for 4 KiB',
    });
    expect(probeFinding({ roundTripUs: [], error: 'worker x over nats did not answer' })).toMatchObject({
      status: 'fail',
      value: 'worker x over nats did not answer',
    });
    expect(probeFinding(null).status).toBe('fail');
  });

  test('doctor - a check that throws has found something too', async () => {
    const finding = await findingOf({
      what: 'nats-server',
      run: () => {
        throw new Error('first line\nsecond line');
      },
    });
    expect(finding).toEqual({ status: 'fail', value: 'first line' });
  });

  test('doctor - prints one line a check', () => {
    expect(findingLine({ what: 'cmake', status: 'ok', value: '3.25.1' })).toBe('ok    cmake             3.25.1');
    expect(findingLine({ what: 'cmake', status: 'fail', value: 'not found', remedy: 'apt-get install cmake' })).toBe(
      'fail  cmake             not found  -> apt-get install cmake',
    );
  });
});
