/** A process that owns a broker, says where it is, and stays until it is killed. */
import { startBroker } from '../../../coordinator/mesh/broker.ts';
import { findNatsServer } from '../../../coordinator/mesh/nats-server.ts';
import { newMeshId, newPlacementId, newWorkerId } from '../../../protocol/ids.ts';

const broker = await startBroker({
  server: await findNatsServer(),
  mesh: newMeshId(),
  workers: [newWorkerId()],
  placements: [newPlacementId()],
  onEvent: (event) => console.error(event),
});
process.stdout.write(`${JSON.stringify({ pid: broker.pid, directory: broker.directory })}\n`);
setInterval(() => undefined, 1_000);
