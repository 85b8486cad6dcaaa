/**
 * How frames of a step reach workers that shared memory does not reach: over gRPC (`grpc-link.ts`) or over the broker (`nats-link.ts`). A link knows
 * workers, not stages and ranks, and outlives epochs; what a frame belongs to stands in its header and is checked by `worker-links.ts`.
 */
import type { Frame, FrameHeader } from '../../protocol/frame-codec.ts';
import type { WorkerId } from '../../protocol/ids.ts';
import type { LinkDriver } from '../../protocol/placement.ts';

export interface LinkPeer {
  worker: WorkerId;
  /** host:port of the peer's gRPC server. */
  grpcAddress: string;
}

export interface FrameLinkCounters {
  framesOut: number;
  bytesOut: number;
  framesIn: number;
  bytesIn: number;
  /** Frames that were not sent: unknown destination, no room, or their connection broke. Whoever waits for one meets its deadline. */
  unsentFrames: number;
  /** Not a frame, wrong checksum, contradicting chunks. */
  corruptFrames: number;
  /** Of another mesh, or of a worker that is no peer. */
  staleFrames: number;
  /** Streams of callers without the mesh's secret, or that are no peers. */
  refusedStreams: number;
  reconnects: number;
}

/** A frame that arrived whole. The payload is a view, valid during the call. `source` is who the transport says it is, not the header. */
export type FrameListener = (source: WorkerId, frame: Frame) => void;

export interface FrameLink {
  readonly driver: Exclude<LinkDriver, 'shm' | 'peer' | 'card' | 'tcp'>;
  readonly counters: Readonly<FrameLinkCounters>;
  /** Frames go to and come from these workers only, from now on. Connections to the others are closed and what waits for them is forgotten. */
  setPeers(peers: readonly LinkPeer[]): void;
  /**
   * Resolves when every peer has answered.
   * @throws {ShardmeshError} `worker_lost` naming those that did not within `timeoutMs`
   */
  ready(timeoutMs: number): Promise<void>;
  /**
   * Sends once, in order for each destination, and forgets. The payload is copied before this returns, unless there is a gap.
   * @param gap  as `encodeFrame` takes it: such a payload belongs to the link from now on
   * @returns false when the frame was not taken (counted in `unsentFrames`)
   */
  send(destination: WorkerId, header: FrameHeader, payload: Uint8Array, gap?: number): boolean;
  /**
   * Round trips of `bytes` to a worker that need not be a peer, one after the other.
   * @returns microseconds of each round
   * @throws {ShardmeshError} `worker_lost`: no answer within `timeoutMs`, all rounds together
   */
  probe(peer: LinkPeer, bytes: number, rounds: number, timeoutMs: number): Promise<number[]>;
  close(): Promise<void>;
}

export const newCounters = (): FrameLinkCounters => ({
  framesOut: 0,
  bytesOut: 0,
  framesIn: 0,
  bytesIn: 0,
  unsentFrames: 0,
  corruptFrames: 0,
  staleFrames: 0,
  refusedStreams: 0,
  reconnects: 0,
});
