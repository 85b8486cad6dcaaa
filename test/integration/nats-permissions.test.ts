/** Every role × every subject of the table, on a real server: what is allowed arrives, what is not is refused. */
import { connect, nkeyAuthenticator, PermissionViolationError, type NatsConnection } from 'nats';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { Credentials } from '../../protocol/credentials.ts';
import { newMeshId, newPlacementId, type WorkerId } from '../../protocol/ids.ts';
import { connectNats, type NatsTransport } from '../../protocol/nats-transport.ts';
import { accountDisconnectSubject, inboxPrefix } from '../../protocol/subjects.ts';
import { startTestBroker, type TestBroker } from './helpers/nats.ts';

type Role = 'coordinator' | 'worker' | 'system';
type Operation = 'publish' | 'subscribe';

let nats: TestBroker;
/** Raw connections: the library's own, without the checks of our transport. */
const connections = new Map<Role, NatsConnection>();
let own: WorkerId;
let other: WorkerId;

const raw = (credentials: Credentials, inbox: string): Promise<NatsConnection> =>
  connect({
    servers: credentials.url,
    authenticator: nkeyAuthenticator(new TextEncoder().encode(credentials.seed)),
    inboxPrefix: inbox,
    reconnect: false,
  });

beforeAll(async () => {
  nats = await startTestBroker({ workers: 2 });
  [own, other] = nats.workers as [WorkerId, WorkerId];
  connections.set('coordinator', await raw(nats.broker.coordinatorCredentials(), inboxPrefix('coordinator')));
  connections.set('worker', await raw(nats.broker.credentialsOf(own), inboxPrefix(own)));
  connections.set('system', await raw(nats.broker.systemCredentials(), inboxPrefix('system')));
});
afterAll(async () => {
  for (const connection of connections.values()) await connection.close();
  await nats.stop();
});

/** Whether the server allows it: the refusal comes before the answer to the ping that follows. */
async function allowed(role: Role, operation: Operation, subject: string): Promise<boolean> {
  const connection = connections.get(role) as NatsConnection;
  let refused = false;
  if (operation === 'subscribe') {
    const subscription = connection.subscribe(subject, {
      callback: (error) => {
        if (error instanceof PermissionViolationError) refused = true;
      },
    });
    await connection.flush();
    if (!refused) subscription.unsubscribe();
    return !refused;
  }
  const watch = watchErrors(connection, (error) => (refused ||= error.subject === subject));
  connection.publish(subject, 'x');
  await connection.flush();
  await new Promise((resolve) => setImmediate(resolve));
  watch.end();
  return !refused;
}

/** Each connection has one reader of its status for the whole file; tests take turns listening. */
const readers = new Map<NatsConnection, Set<(error: PermissionViolationError) => void>>();
function watchErrors(connection: NatsConnection, listener: (error: PermissionViolationError) => void): { end: () => void } {
  let listeners = readers.get(connection);
  if (!listeners) {
    const all = new Set<(error: PermissionViolationError) => void>();
    listeners = all;
    readers.set(connection, all);
    void (async () => {
      for await (const status of connection.status())
        if (status.type === 'error' && status.error instanceof PermissionViolationError) for (const one of all) one(status.error);
    })();
  }
  listeners.add(listener);
  return { end: () => void listeners.delete(listener) };
}

/** Subjects by name; made when the ids are known. */
const subjectsOf = (): Record<string, string> => {
  const { subjects, placement } = nats;
  const foreign = newMeshId();
  return {
    'hb own': subjects.heartbeat(own),
    'hb other': subjects.heartbeat(other),
    'hb *': subjects.heartbeats(),
    'out own': subjects.result(own),
    'out other': subjects.result(other),
    'out >': `mesh.${nats.mesh}.out.>`,
    'reg own': subjects.register(own),
    'reg other': subjects.register(other),
    'reg *': subjects.registers(),
    'in own': subjects.control(own),
    'in other': subjects.control(other),
    'in >': `mesh.${nats.mesh}.in.>`,
    'plan placement': subjects.plan(placement),
    'plan other placement': subjects.plan(newPlacementId()),
    'plan *': `mesh.${nats.mesh}.plan.*`,
    'act own from other': subjects.activation(own, other),
    'act other from own': subjects.activation(other, own),
    'act own from *': subjects.activationsTo(own),
    'act other from *': subjects.activationsTo(other),
    'act > all': `mesh.${nats.mesh}.act.>`,
    epoch: subjects.epoch(),
    lead: subjects.lead(),
    'inbox own': `${inboxPrefix(own)}.1`,
    'inbox other': `${inboxPrefix(other)}.1`,
    'inbox coordinator': `${inboxPrefix('coordinator')}.1`,
    'another mesh': `mesh.${foreign}.epoch`,
    everything: '>',
    'every mesh': 'mesh.>',
    'system disconnects': accountDisconnectSubject,
    'system requests': '$SYS.REQ.SERVER.PING',
    'system all': '$SYS.>',
    'jetstream api': '$JS.API.INFO',
    'key value': '$KV.mesh.x',
  };
};

/** What the table grants; everything else is denied. */
const granted: Record<Role, Record<Operation, string[]>> = {
  worker: {
    publish: ['hb own', 'out own', 'reg own', 'act other from own'],
    subscribe: ['in own', 'plan placement', 'act own from other', 'act own from *', 'epoch', 'inbox own'],
  },
  coordinator: {
    publish: ['in own', 'in other', 'plan placement', 'plan other placement', 'epoch', 'lead'],
    subscribe: [
      'hb own',
      'hb other',
      'hb *',
      'out own',
      'out other',
      'out >',
      'reg own',
      'reg other',
      'reg *',
      'lead',
      'inbox coordinator',
    ],
  },
  system: { publish: [], subscribe: ['system disconnects'] },
};

/** Wildcards are for subscribing; as a literal subject a server may refuse or drop them, which says nothing about permissions. */
const isWildcard = (subject: string): boolean => /[*>]/.test(subject);

describe.each(['worker', 'coordinator', 'system'] as const)('nats permissions of the %s', (role) => {
  test.each(['publish', 'subscribe'] as const)('nats permissions - may %s exactly what the table grants', async (operation) => {
    const result: string[] = [];
    const names = Object.entries(subjectsOf()).filter(([, subject]) => operation === 'subscribe' || !isWildcard(subject));
    for (const [name, subject] of names) if (await allowed(role, operation, subject)) result.push(name);
    expect(result.sort()).toEqual(granted[role][operation].toSorted());
  });
});

describe('nats transport', () => {
  const open: NatsTransport[] = [];
  afterAll(async () => {
    await Promise.all(open.map((transport) => transport.close()));
  });
  const worker = async (): Promise<NatsTransport> => {
    const transport = await connectNats({ credentials: nats.broker.credentialsOf(own), name: own });
    open.push(transport);
    return transport;
  };

  test('nats transport - makes a refused subscription an error that names the subject', async () => {
    const transport = await worker();
    const plan = nats.subjects.plan(newPlacementId());
    await expect(transport.subscribe(plan, () => undefined)).rejects.toMatchObject({ code: 'permission_denied' });
    await expect(transport.subscribe(plan, () => undefined)).rejects.toThrow(plan);
  });

  test('nats transport - reports a refused publish as an event', async () => {
    const transport = await worker();
    const events: unknown[] = [];
    transport.onEvent((event) => events.push(event));
    transport.publish(nats.subjects.heartbeat(other), Buffer.from('forged'));
    await transport.flush();
    await new Promise((resolve) => setTimeout(resolve, 20));
    expect(events).toEqual([{ type: 'permission_denied', operation: 'publish', subject: nats.subjects.heartbeat(other) }]);
  });

  test('nats transport - refuses a payload over the limit before it reaches the socket', async () => {
    const transport = await worker();
    expect(transport.payloadBytesMax).toBe(1_048_576);
    expect(() => transport.publish(nats.subjects.result(own), new Uint8Array(1_048_577))).toThrow(
      /1048577 bytes .* over the server's limit of 1048576; nothing was sent/,
    );
    expect(transport.counters).toMatchObject({ oversize: 1, published: 0, bytesOut: 0 });
    // A payload of exactly the limit passes, and the connection still stands.
    expect(transport.publish(nats.subjects.result(own), new Uint8Array(1_048_576))).toBe(true);
    await transport.flush();
    expect(transport.connected).toBe(true);
  });

  test('nats transport - carries bytes unchanged and in order', async () => {
    const from = await worker();
    const coordinator = await nats.connectCoordinator();
    const received: [number, string][] = [];
    await coordinator.subscribe(nats.subjects.results(), (bytes, subject) => received.push([bytes[0] ?? -1, subject]));
    for (let i = 0; i < 200; i++) from.publish(nats.subjects.result(own), Uint8Array.of(i, 0xff, 0x00));
    await from.flush();
    await coordinator.flush();
    expect(received.map(([value]) => value)).toEqual(Array.from({ length: 200 }, (_, i) => i));
    expect(new Set(received.map(([, subject]) => subject))).toEqual(new Set([nats.subjects.result(own)]));
  });

  test('nats transport - closed, publishes nothing and says so', async () => {
    const transport = await connectNats({ credentials: nats.broker.credentialsOf(own), name: own });
    const events: unknown[] = [];
    transport.onEvent((event) => events.push(event));
    await transport.close();
    await transport.close();
    expect(transport.publish(nats.subjects.heartbeat(own), Uint8Array.of(1))).toBe(false);
    await expect(transport.subscribe(nats.subjects.epoch(), () => undefined)).rejects.toMatchObject({ code: 'broker_lost' });
    expect(events).toContainEqual({ type: 'closed', error: null });
  });
});
