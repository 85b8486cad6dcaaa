/** Lets workers of other hosts in and out while the coordinator runs: the enrollment listener, and what `shardmesh enroll` asks for over the control socket. */
import type { Address } from '../../protocol/addresses.ts';
import type { WorkerId } from '../../protocol/ids.ts';
import type { Broker } from '../mesh/broker.ts';
import type { MeshService } from '../mesh/mesh-service.ts';
import type { WeightServer } from '../mesh/weight-server.ts';
import type { Logger } from '../observe/log.ts';
import { openControlSocket } from './control-socket.ts';
import { EnrollmentServer } from './enrollment-server.ts';
import type { EnrolledWorker, MeshAuthority } from './mesh-authority.ts';

export interface AdmitHostsOptions {
  authority: MeshAuthority;
  folder: string;
  /** Of the enrollment listener. */
  address: Address;
  broker: Broker;
  weights: WeightServer;
  service: MeshService;
  log: Logger;
}

const expiryEveryMs = 12 * 60 * 60 * 1000;

/** @returns stops it */
export async function admitHosts(options: AdmitHostsOptions): Promise<() => void> {
  const { authority, folder, address, broker, weights, service, log } = options;
  for (const worker of authority.revoked()) weights.refuseWorker(worker);
  const enrollment = await EnrollmentServer.listen({
    authority,
    address,
    onEnrolled: (worker, nkey) => broker.addEnrolled(worker, nkey),
    broker: () => ({ url: broker.advertisedUrl, serverName: broker.serverName }),
    event: (name, fields) => log.info(fields, name),
  });
  /** Its streams and its seat here, then its access to the broker, which cuts its connections. */
  const revoke = async (name: string): Promise<WorkerId> => {
    const { worker } = authority.revoke(name);
    log.warn({ worker }, 'worker_revoked');
    weights.refuseWorker(worker);
    service.revoke(worker);
    await broker.removeWorker(worker);
    return worker;
  };
  const stateOf = ({ worker, revokedAt }: EnrolledWorker): string => {
    if (revokedAt) return 'revoked';
    const member = service.mesh.members().find((one) => one.worker === worker);
    return member ? (member.seat ? `stage ${member.seat.stage} rank ${member.seat.rank}` : 'spare') : 'absent';
  };
  const closeSocket = await openControlSocket(folder, {
    token: ({ minutes }) => enrollment.issueToken(minutes),
    list: () => ({ workers: authority.workers.map((worker) => ({ ...worker, state: stateOf(worker) })) }),
    revoke: async ({ worker }) => ({ worker: await revoke(worker) }),
  });
  const warn = (): void => authority.expiring(Date.now()).forEach((message) => log.warn({ message }, 'certificate_expires'));
  warn();
  const timer = setInterval(warn, expiryEveryMs);
  timer.unref();
  return () => {
    clearInterval(timer);
    closeSocket();
    enrollment.close();
  };
}
