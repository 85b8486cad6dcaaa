import { describe, expect, test } from 'vitest';
import { compareVersions, parseVersion, serverAdvice } from '../../../protocol/nats-version.ts';

describe('nats version', () => {
  test('nats version - is read from what servers print', () => {
    expect(parseVersion('nats-server: v2.15.1')).toEqual([2, 15, 1]);
    expect(parseVersion('2.9.10')).toEqual([2, 9, 10]);
    expect(parseVersion('unknown')).toBeNull();
  });

  test('nats version - compares numbers, not texts', () => {
    expect(compareVersions('2.9.10', '2.15.1')).toBeLessThan(0);
    expect(compareVersions('2.10.0', '2.9.10')).toBeGreaterThan(0);
    expect(compareVersions('v2.12.12', '2.12.12')).toBe(0);
  });

  test.each([
    ['2.9.10', true],
    ['2.12.11', true],
    ['2.12.12', false],
    ['2.13.9', true],
    ['2.14.2', true],
    ['2.14.3', false],
    ['2.15.1', false],
  ])('nats version - %s has known holes: %s', (version, holes) => {
    expect(serverAdvice(version) !== null).toBe(holes);
  });
});
