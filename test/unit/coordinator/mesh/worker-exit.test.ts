import { describe, expect, it } from 'vitest';
import { exitReason, workerExit } from '../../../../coordinator/mesh/worker-exit.ts';

describe('worker exit', () => {
  it('worker exit - codes of their own say why, others say nothing', () => {
    expect(Object.values(workerExit)).toEqual([70, 71, 72]);
    for (const code of Object.values(workerExit)) expect(exitReason(code)).toMatch(/^ \(.+\)$/);
    expect(exitReason(workerExit.cardLost)).toContain('its card answered no more');
    for (const code of [0, 1, 2, null]) expect(exitReason(code)).toBe('');
  });
});
