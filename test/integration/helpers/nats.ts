/** A private broker for a test: own port, own mesh, own credentials. `await using`, or `stop()` at the end. */
import { startBroker, type Broker, type BrokerEvent } from '../../../coordinator/mesh/broker.ts';
import { findNatsServer } from '../../../coordinator/mesh/nats-server.ts';
import { newMeshId, newPlacementId, newWorkerId, type MeshId, type PlacementId, type WorkerId } from '../../../protocol/ids.ts';
import { connectNats, type NatsTransport } from '../../../protocol/nats-transport.ts';
import { meshSubjects, type MeshSubjects } from '../../../protocol/subjects.ts';

export interface TestBroker {
  broker: Broker;
  mesh: MeshId;
  placement: PlacementId;
  workers: WorkerId[];
  subjects: MeshSubjects;
  events: BrokerEvent[];
  connectCoordinator(): Promise<NatsTransport>;
  /** Worker by index. */
  connectWorker(index: number): Promise<NatsTransport>;
  /** Closes every transport it handed out, then the broker. */
  stop(): Promise<void>;
  [Symbol.asyncDispose](): Promise<void>;
}

export async function startTestBroker(options: { workers?: number } = {}): Promise<TestBroker> {
  const server = await findNatsServer();
  const mesh = newMeshId();
  const placement = newPlacementId();
  const workers = Array.from({ length: options.workers ?? 2 }, newWorkerId);
  const events: BrokerEvent[] = [];
  const broker = await startBroker({ server, mesh, workers, placements: [placement], onEvent: (event) => events.push(event) });
  const transports: NatsTransport[] = [];
  const keep = async (opening: Promise<NatsTransport>): Promise<NatsTransport> => {
    const transport = await opening;
    transports.push(transport);
    return transport;
  };
  const stop = async (): Promise<void> => {
    await Promise.all(transports.map((transport) => transport.close()));
    await broker.stop();
  };
  return {
    broker,
    mesh,
    placement,
    workers,
    subjects: meshSubjects(mesh),
    events,
    connectCoordinator: () => keep(connectNats({ credentials: broker.coordinatorCredentials(), name: 'coordinator' })),
    connectWorker: (index) => {
      const worker = workers[index];
      if (worker === undefined) throw new RangeError(`the test broker has ${workers.length} workers, no worker ${index}`);
      return keep(connectNats({ credentials: broker.credentialsOf(worker), name: worker }));
    },
    stop,
    [Symbol.asyncDispose]: stop,
  };
}
