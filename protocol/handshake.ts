/** Which protocol version two ends speak. */
import { ShardmeshError } from './errors.ts';
import { protocolVersionMax, protocolVersionMin } from './limits.ts';

export interface ProtocolRange {
  min: number;
  max: number;
}

export const ownProtocol: ProtocolRange = { min: protocolVersionMin, max: protocolVersionMax };

/**
 * The highest version both ends speak.
 * @param who  the other end, for the error: `worker abc…`
 * @throws {ShardmeshError} `protocol_mismatch`, naming both ranges
 */
export function commonProtocol(who: string, theirs: ProtocolRange, ours: ProtocolRange = ownProtocol): number {
  const version = Math.min(ours.max, theirs.max);
  if (theirs.min > theirs.max || version < Math.max(ours.min, theirs.min))
    throw new ShardmeshError(
      'protocol_mismatch',
      `${who} speaks protocol ${theirs.min} to ${theirs.max}, this build ${ours.min} to ${ours.max}; run builds that are at most one release apart`,
    );
  return version;
}
