/** Round trips between the workers of a running mesh, for `doctor --credentials`: each is asked to measure each other one. */
import type { Credentials } from '../../protocol/credentials.ts';
import type { WorkerId } from '../../protocol/ids.ts';
import { encodeMessage, decodeWorkerMessage } from '../../protocol/message-codec.ts';
import type { CoordinatorMessage, Heartbeat, ProbeResult, WorkerMessage } from '../../protocol/messages.ts';
import { connectNats, type NatsTransport } from '../../protocol/nats-transport.ts';
import { meshSubjects, sourceOf } from '../../protocol/subjects.ts';
import { meshTimers } from '../../protocol/limits.ts';
import type { Check, Finding } from './doctor-checks.ts';

/** Two heartbeats and some more: who has not been heard of by then is not there. */
const listenMs = 2 * meshTimers.heartbeatMs + 250;
const probeTimeoutMs = 10_000;
const rounds = 50;
const smallBytes = 4 * 1024;

interface Seen {
  state: Heartbeat['state'];
  grpcAddress: string | null;
}

/** Connects, listens who is there, and makes one check a pair and driver. `close` ends the connection. */
export async function meshChecks(credentials: Credentials): Promise<{ checks: Check[]; close(): Promise<void> }> {
  const transport = await connectNats({ credentials, name: 'doctor' });
  const subjects = meshSubjects(credentials.mesh);
  const seen = new Map<WorkerId, Seen>();
  const waiting = new Map<number, (result: ProbeResult) => void>();
  const receive = (bytes: Uint8Array, subject: string): void => {
    const worker = sourceOf(subject);
    const message = decoded(bytes);
    if (worker === null || message === null) return;
    const known = seen.get(worker);
    if (message.type === 'heartbeat') seen.set(worker, { grpcAddress: known?.grpcAddress ?? null, state: message.state });
    else if (message.type === 'join')
      seen.set(worker, { state: known?.state ?? 'idle', grpcAddress: message.facts.grpcAddress || null });
    else if (message.type === 'probe_result') waiting.get(message.id)?.(message);
  };
  for (const subject of [subjects.heartbeats(), subjects.registers(), subjects.events()])
    await transport.subscribe(subject, receive);
  const send = (worker: WorkerId, message: CoordinatorMessage): boolean =>
    transport.publish(subjects.control(worker), encodeMessage(message));
  await wait(listenMs);
  // Only a worker without an assignment is asked who it is: to the others a coordinator is talking.
  for (const [worker, { state }] of seen) if (state === 'idle') send(worker, { type: 'rejoin' });
  await wait(100);

  // Another process may be measuring as well: ids are told apart by where they begin.
  let id = Math.floor(Math.random() * 2 ** 30);
  const probe = async (from: WorkerId, to: WorkerId, driver: 'grpc' | 'nats', grpcAddress: string): Promise<Finding> => {
    const own = ++id;
    const result = await new Promise<ProbeResult | null>((resolve) => {
      const timer = setTimeout(() => resolve(null), probeTimeoutMs);
      waiting.set(own, (answer) => (clearTimeout(timer), resolve(answer)));
      send(from, { type: 'probe', id: own, peer: to, grpcAddress, driver, bytes: smallBytes, rounds });
    });
    waiting.delete(own);
    return probeFinding(result);
  };
  const workers = [...seen.keys()].sort();
  const checks: Check[] = [
    {
      what: 'mesh workers',
      run: () =>
        workers.length > 0
          ? { status: 'ok', value: workers.map((worker) => `${short(worker)} ${seen.get(worker)?.state}`).join(', ') }
          : {
              status: 'fail',
              value: `none sent a heartbeat within ${listenMs} ms`,
              remedy: 'start them: shardmesh worker --credentials worker-1.json',
            },
    },
  ];
  for (const from of workers)
    for (const to of workers) {
      if (from >= to) continue;
      const name = (driver: string): string => `${driver} ${short(from)}-${short(to)}`;
      const grpcAddress = seen.get(to)?.grpcAddress;
      if (grpcAddress) checks.push({ what: name('grpc'), run: () => probe(from, to, 'grpc', grpcAddress) });
      checks.push({ what: name('nats'), run: () => probe(from, to, 'nats', '') });
    }
  return { checks, close: () => closeQuietly(transport) };
}

export function probeFinding(result: Pick<ProbeResult, 'roundTripUs' | 'error'> | null): Finding {
  const remedy = 'is the other worker alive, and of the same mesh? its log says more';
  if (result === null) return { status: 'fail', value: `no answer within ${probeTimeoutMs} ms`, remedy };
  if (result.error !== null) return { status: 'fail', value: result.error, remedy };
  const sorted = [...result.roundTripUs].sort((a, b) => a - b);
  const [least, median] = [sorted[0] ?? 0, sorted[Math.floor(sorted.length / 2)] ?? 0];
  return { status: 'ok', value: `round trip ${median.toFixed(0)} us (least ${least.toFixed(0)}) for ${smallBytes / 1024} KiB` };
}

function decoded(bytes: Uint8Array): WorkerMessage | null {
  try {
    return decodeWorkerMessage(bytes);
  } catch {
    return null;
  }
}

const short = (worker: WorkerId): string => worker.slice(0, 6);
const wait = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));
const closeQuietly = (transport: NatsTransport): Promise<void> => transport.close().catch(() => undefined);
