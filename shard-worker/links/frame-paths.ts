/** Between which ranks frames travel. Same rules as kernels/links/segment.cpp. */
import type { PeerAddress } from '../../kernels/binding-types.ts';

/**
 * True when a frame of some kind travels between the two ranks, one way or the other: ranks of one stage exchange; rank r of a stage gets its hidden states
 * from rank r mod tp of the one before; rank 0 of the last stage sends sampled ids to the ranks of stage 0.
 */
export function framesTravel(a: PeerAddress, b: PeerAddress, ranksPerStage: readonly number[]): boolean {
  if (a.stage === b.stage) return a.rank !== b.rank;
  return sendsTo(a, b, ranksPerStage) || sendsTo(b, a, ranksPerStage);
}

function sendsTo(from: PeerAddress, to: PeerAddress, ranksPerStage: readonly number[]): boolean {
  if (from.stage === ranksPerStage.length - 1 && from.rank === 0 && to.stage === 0) return true;
  const ranks = ranksPerStage[from.stage];
  return to.stage === from.stage + 1 && ranks !== undefined && ranks > 0 && to.rank % ranks === from.rank;
}
