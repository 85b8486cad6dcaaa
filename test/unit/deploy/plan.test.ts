import { describe, expect, test } from 'vitest';
import { noPlanForCards } from '../../../deploy/cli/plan.ts';

describe('plan', () => {
  const tensor = (bytes: number) => ({ name: 'w', type: 'Q4_0' as const, shape: [32], offset: 0, bytes });
  const facts = { tensors: [tensor(4e9), tensor(0.5e9)] };
  const card = {
    name: 'Some Card',
    sm: 90,
    memoryBytes: 8e10,
    multiprocessors: 132,
    bandwidthBytes: 3e12,
    powerWatts: 700,
    driver: '',
  };

  test('plan - predicts nothing for a card, and says what its memory alone allows', () => {
    expect(noPlanForCards({ card, absent: null }, facts)).toMatch(
      /no speed of our kernels on a card is known .*; Some Card reads 3000 GB\/s by its own facts, so no token of this model takes less than 1\.5 ms on it$/,
    );
    expect(noPlanForCards({ card: { ...card, bandwidthBytes: 0 }, absent: null }, facts)).toMatch(/MEASURED\.md\)$/);
    expect(noPlanForCards({ card: null, absent: 'no driver' }, facts)).toMatch(/here there is none anyway: no driver$/);
    expect(noPlanForCards(null, facts)).toMatch(/the native addon is not built$/);
  });
});
