import { describe, expect, test } from 'vitest';
import { measureMessage, measureWake, serviceCost } from '../../../../coordinator/planner/measure-host.ts';

describe('measure host', () => {
  test('measure host - a sleeping thread runs within a microsecond to ten milliseconds', async () => {
    const seconds = await measureWake();
    expect(seconds).toBeGreaterThan(0.5e-6);
    expect(seconds).toBeLessThan(10e-3);
  });

  test('measure host - a message costs a microsecond to a millisecond of CPU', async () => {
    const seconds = await measureMessage();
    expect(seconds).toBeGreaterThan(1e-6);
    expect(seconds).toBeLessThan(1e-3);
  });

  test('measure host - more workers and sequences cost more, and less than a step each', () => {
    const { stepSeconds, workerSeconds, sequenceSeconds } = serviceCost(20e-6);
    expect(stepSeconds).toBeGreaterThan(workerSeconds);
    expect(workerSeconds).toBeGreaterThan(0);
    expect(sequenceSeconds).toBeGreaterThan(0);
  });
});
