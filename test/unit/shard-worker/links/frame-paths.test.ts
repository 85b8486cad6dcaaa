import { describe, expect, it } from 'vitest';
import { framesTravel } from '../../../../shard-worker/links/frame-paths.ts';

/** Peers of one rank in a mesh of 2, 3 and 1 ranks. */
const peersOf = (stage: number, rank: number, ranksPerStage = [2, 3, 1]): string[] =>
  ranksPerStage.flatMap((ranks, peerStage) =>
    Array.from({ length: ranks }, (_, peerRank) => peerRank)
      .filter((peerRank) => framesTravel({ stage, rank }, { stage: peerStage, rank: peerRank }, ranksPerStage))
      .map((peerRank) => `${peerStage}.${peerRank}`),
  );

describe('frame paths', () => {
  it('frame paths - a rank exchanges with its stage, serves r mod tp of the next, and hears the last stage', () => {
    expect(peersOf(0, 0)).toEqual(['0.1', '1.0', '1.2', '2.0']);
    expect(peersOf(0, 1)).toEqual(['0.0', '1.1', '2.0']);
    expect(peersOf(1, 0)).toEqual(['0.0', '1.1', '1.2', '2.0']);
    expect(peersOf(1, 1)).toEqual(['0.1', '1.0', '1.2']);
    expect(peersOf(2, 0)).toEqual(['0.0', '0.1', '1.0']);
  });

  it('frame paths - a single worker has no peers, and no rank is its own peer', () => {
    expect(peersOf(0, 0, [1])).toEqual([]);
    expect(peersOf(0, 1, [3])).toEqual(['0.0', '0.2']);
  });
});
