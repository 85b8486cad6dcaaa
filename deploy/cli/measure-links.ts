/** Round trips and bandwidth over loopback, for `plan` and `doctor`: two ends of a link in this process, over gRPC, or over a NATS server. */
import type { Credentials } from '../../protocol/credentials.ts';
import { newMeshId, newWorkerId } from '../../protocol/ids.ts';
import { connectNats } from '../../protocol/nats-transport.ts';
import { randomBytes } from 'node:crypto';
import type { FrameLink, LinkPeer } from '../../shard-worker/links/frame-link.ts';
import { GrpcLink } from '../../shard-worker/links/grpc-link.ts';
import { NatsLink } from '../../shard-worker/links/nats-link.ts';

export interface LinkMeasurement {
  /** Median and 99th percentile of a round trip of 4 KiB each way, microseconds. */
  roundTripUs: number;
  roundTripUsP99: number;
  /** From round trips of 1 MiB, each way. */
  bytesPerSecond: number;
}

const smallBytes = 4 * 1024;
const largeBytes = 1024 ** 2;
const timeoutMs = 5_000;

export async function measureGrpc(): Promise<LinkMeasurement> {
  const shared = { mesh: newMeshId(), secret: randomBytes(32).toString('base64url'), onFrame: () => undefined };
  const peer = newWorkerId();
  const answering = await GrpcLink.listen({ ...shared, worker: peer });
  const asking = await GrpcLink.listen({ ...shared, worker: newWorkerId() });
  try {
    return await measureLink(asking, { worker: peer, grpcAddress: answering.address });
  } finally {
    await Promise.all([asking.close(), answering.close()]);
  }
}

/** @param workers  credentials of two workers of one mesh */
export async function measureNats(workers: readonly [Credentials, Credentials]): Promise<LinkMeasurement> {
  const transports = await Promise.all(
    workers.map((credentials) => connectNats({ credentials, name: `measure-${credentials.worker}` })),
  );
  const [asker, answerer] = workers;
  const [from, to] = transports;
  if (asker.worker === null || answerer.worker === null || !from || !to)
    throw new RangeError('credentials of two workers are needed');
  const onFrame = (): void => undefined;
  const links: FrameLink[] = [];
  try {
    const answering = await NatsLink.subscribe({ mesh: answerer.mesh, worker: answerer.worker, transport: to, onFrame });
    links.push(answering);
    const asking = await NatsLink.subscribe({ mesh: asker.mesh, worker: asker.worker, transport: from, onFrame });
    links.push(asking);
    return await measureLink(asking, { worker: answerer.worker, grpcAddress: '' });
  } finally {
    await Promise.all(links.map((link) => link.close()));
    await Promise.all(transports.map((transport) => transport.close()));
  }
}

async function measureLink(link: FrameLink, peer: LinkPeer): Promise<LinkMeasurement> {
  // The first rounds open the stream and warm the code up.
  await link.probe(peer, smallBytes, 20, timeoutMs);
  const small = (await link.probe(peer, smallBytes, 200, timeoutMs)).sort((a, b) => a - b);
  const large = (await link.probe(peer, largeBytes, 10, timeoutMs)).sort((a, b) => a - b);
  const roundTripUs = percentile(small, 0.5);
  const largeUs = Math.max(percentile(large, 0.5) - roundTripUs, 1);
  return {
    roundTripUs,
    roundTripUsP99: percentile(small, 0.99),
    bytesPerSecond: (2 * (largeBytes - smallBytes)) / (largeUs / 1e6),
  };
}

const percentile = (sorted: readonly number[], share: number): number =>
  sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] ?? Number.NaN;
