/**
 * Every NATS subject of a mesh, and who may use it. Subjects are built here and nowhere else, from checked ids only, so that no text of a user can
 * reach one. A worker is addressed by its own id, never by stage and rank: permissions stay the same when placements change, and the source token of
 * everything a worker publishes is fixed by its permissions, so it cannot be forged.
 *
 *   mesh.<mesh>.hb.<worker>                      heartbeat                   worker -> coordinator
 *   mesh.<mesh>.reg.<worker>                     join                        worker -> coordinator
 *   mesh.<mesh>.out.<worker>.result | event      step results; all the rest  worker -> coordinator
 *   mesh.<mesh>.in.<worker>.control              assign, connect, release..  coordinator -> worker
 *   mesh.<mesh>.plan.<placement>                 step plans                  coordinator -> all workers of the placement
 *   mesh.<mesh>.epoch                            release of old epochs       coordinator -> all workers
 *   mesh.<mesh>.act.<destination>.<source>       frames                      worker -> worker
 */
import { checkId, type MeshId, type PlacementId, type WorkerId } from './ids.ts';

/** Account names on the broker. */
export const meshAccount = 'MESH';
export const systemAccount = 'SYS';

/** Connects and disconnects of the mesh account, published by the broker itself to its system account. */
export const accountConnectSubject = `$SYS.ACCOUNT.${meshAccount}.CONNECT`;
export const accountDisconnectSubject = `$SYS.ACCOUNT.${meshAccount}.DISCONNECT`;

export interface Permissions {
  publish: string[];
  subscribe: string[];
}

export interface MeshSubjects {
  heartbeat(worker: WorkerId): string;
  register(worker: WorkerId): string;
  result(worker: WorkerId): string;
  event(worker: WorkerId): string;
  control(worker: WorkerId): string;
  plan(placement: PlacementId): string;
  epoch(): string;
  /** Who leads the mesh; coordinators only. */
  lead(): string;
  activation(destination: WorkerId, source: WorkerId): string;

  /** What the coordinator subscribes to. */
  heartbeats(): string;
  registers(): string;
  results(): string;
  events(): string;
  /** What a worker subscribes to, besides its plans and epochs. */
  controls(worker: WorkerId): string;
  activationsTo(worker: WorkerId): string;

  coordinatorPermissions(): Permissions;
  workerPermissions(worker: WorkerId, placements: readonly PlacementId[]): Permissions;
}

/** @throws {ProtocolError} `mesh`, or an id given to one of the functions, is not an id */
export function meshSubjects(mesh: MeshId): MeshSubjects {
  const root = `mesh.${checkId('mesh', mesh)}`;
  const worker = (id: WorkerId): string => checkId('worker', id);
  const placement = (id: PlacementId): string => checkId('placement', id);
  const subjects: MeshSubjects = {
    heartbeat: (id) => `${root}.hb.${worker(id)}`,
    register: (id) => `${root}.reg.${worker(id)}`,
    result: (id) => `${root}.out.${worker(id)}.result`,
    event: (id) => `${root}.out.${worker(id)}.event`,
    control: (id) => `${root}.in.${worker(id)}.control`,
    plan: (id) => `${root}.plan.${placement(id)}`,
    epoch: () => `${root}.epoch`,
    lead: () => `${root}.lead`,
    activation: (destination, source) => `${root}.act.${worker(destination)}.${worker(source)}`,

    heartbeats: () => `${root}.hb.*`,
    registers: () => `${root}.reg.*`,
    results: () => `${root}.out.*.result`,
    events: () => `${root}.out.*.event`,
    controls: (id) => `${root}.in.${worker(id)}.>`,
    activationsTo: (id) => `${root}.act.${worker(id)}.*`,

    coordinatorPermissions: () => ({
      publish: [`${root}.in.>`, `${root}.plan.>`, `${root}.epoch`, `${root}.lead`],
      subscribe: [`${root}.hb.*`, `${root}.out.>`, `${root}.reg.*`, `${root}.lead`, `${inboxPrefix('coordinator')}.>`],
    }),
    workerPermissions: (id, placements) => ({
      publish: [
        `${root}.hb.${worker(id)}`,
        `${root}.out.${worker(id)}.>`,
        `${root}.reg.${worker(id)}`,
        `${root}.act.*.${worker(id)}`,
      ],
      subscribe: [
        `${root}.in.${worker(id)}.>`,
        ...placements.map((one) => `${root}.plan.${placement(one)}`),
        `${root}.act.${worker(id)}.*`,
        `${inboxPrefix(id)}.>`,
        `${root}.epoch`,
      ],
    }),
  };
  return subjects;
}

/**
 * The coordinator's read-only watch of the broker's own events. The one subject it may publish to is its own inbox, where nobody listens: an empty
 * allow-list would allow everything.
 */
export const systemPermissions = (): Permissions => ({
  publish: [`${inboxPrefix('system')}.none`],
  subscribe: [accountConnectSubject, accountDisconnectSubject, `${inboxPrefix('system')}.>`],
});

/** Own inbox of a role or worker: no other user may subscribe to it. */
export function inboxPrefix(owner: WorkerId | 'coordinator' | 'system'): string {
  return `_INBOX_${owner === 'coordinator' || owner === 'system' ? owner : checkId('worker', owner)}`;
}

/**
 * The worker named by a subject this worker publishes to, which the broker's permissions guarantee to be the sender; null when the subject is none of
 * those. A receiver compares it with the `worker` field of the message.
 */
export function sourceOf(subject: string): WorkerId | null {
  const parts = subject.split('.');
  if (parts[0] !== 'mesh') return null;
  const kind = parts[2];
  if ((kind === 'hb' || kind === 'reg') && parts.length === 4) return parts[3] as WorkerId;
  if (kind === 'out' && parts.length >= 5) return parts[3] as WorkerId;
  if (kind === 'act' && parts.length === 5) return parts[4] as WorkerId;
  return null;
}
