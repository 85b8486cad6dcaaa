import { execFileSync, spawn, type ChildProcess } from 'node:child_process';
import { existsSync, readFileSync, readdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { createUser } from '@nats-io/nkeys';
import { connect } from 'nats';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { watchDisconnects, type WorkerDisconnect } from '../../coordinator/mesh/broker-watch.ts';
import { readCredentials } from '../../protocol/credentials.ts';
import { newPlacementId, newWorkerId } from '../../protocol/ids.ts';
import { connectNats } from '../../protocol/nats-transport.ts';
import { startTestBroker, type TestBroker } from './helpers/nats.ts';

const until = async (condition: () => boolean, limitMs: number): Promise<number> => {
  const start = performance.now();
  while (!condition()) {
    if (performance.now() - start > limitMs) throw new Error(`not within ${limitMs} ms`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
  return performance.now() - start;
};

const isAlive = (pid: number): boolean => {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
};

let nats: TestBroker;
beforeEach(async () => {
  nats = await startTestBroker();
});
afterEach(async () => {
  await nats.stop();
});

describe('nats broker', () => {
  test('nats broker - refuses a client without credentials', async () => {
    await expect(connect({ servers: nats.broker.url, reconnect: false, timeout: 2_000 })).rejects.toThrow(/authorization/i);
    await expect(
      connect({ servers: nats.broker.url, user: 'worker', pass: 'guess', reconnect: false, timeout: 2_000 }),
    ).rejects.toThrow(/authorization/i);
  });

  test('nats broker - refuses credentials of another mesh and says so', async () => {
    await using other = await startTestBroker();
    const credentials = { ...other.broker.coordinatorCredentials(), url: nats.broker.url, serverName: null };
    await expect(connectNats({ credentials, name: 'stranger' })).rejects.toMatchObject({ code: 'broker_refused' });
  });

  test('nats broker - is refused by a client that expected another server on this port', async () => {
    const credentials = { ...nats.broker.coordinatorCredentials(), serverName: 'shardmesh-other' };
    await expect(connectNats({ credentials, name: 'coordinator' })).rejects.toThrow(
      /calls itself "shardmesh-.*another program took its port/,
    );
  });

  test('nats broker - listens on loopback only, without monitoring, its folder and files closed to others', () => {
    const { directory, pid, port } = nats.broker;
    const listening = execFileSync('sh', ['-c', `cat /proc/${pid}/net/tcp /proc/${pid}/net/tcp6; ls -l /proc/${pid}/fd`], {
      encoding: 'utf8',
    });
    const sockets = new Set([...listening.matchAll(/socket:\[(\d+)\]/g)].map((match) => match[1]));
    const own = listening
      .split('\n')
      .map((line) => line.trim().split(/\s+/))
      .filter((columns) => columns[3] === '0A' && sockets.has(columns[9]))
      .map((columns) => columns[1]);
    expect(own).toEqual([`0100007F:${port.toString(16).toUpperCase().padStart(4, '0')}`]);
    expect(statSync(directory).mode & 0o777).toBe(0o700);
    const closed = readdirSync(directory).filter((name) => /\.(conf|json)$/.test(name));
    expect(closed).toHaveLength(3);
    for (const name of closed) expect(statSync(join(directory, name)).mode & 0o777).toBe(0o600);
  });

  test('nats broker - writes worker credentials that connect that worker', async () => {
    const worker = nats.workers[1] ?? newWorkerId();
    const credentials = readCredentials(nats.broker.credentialsFile(worker));
    expect(credentials).toEqual(nats.broker.credentialsOf(worker));
    const transport = await connectNats({ credentials, name: worker });
    expect(transport.server.name).toBe(nats.broker.serverName);
    await transport.close();
  });

  test('nats broker - killed, is back on the same port and clients reconnect within 2 s', async () => {
    const coordinator = await nats.connectCoordinator();
    const worker = await nats.connectWorker(0);
    const received: string[] = [];
    await worker.subscribe(nats.subjects.epoch(), (bytes) => received.push(new TextDecoder().decode(bytes)));
    const { port, pid } = nats.broker;
    process.kill(pid ?? 0, 'SIGKILL');
    await until(() => !coordinator.connected && !worker.connected, 1_000);
    expect(coordinator.publish(nats.subjects.epoch(), Buffer.from('lost'))).toBe(false);
    expect(coordinator.counters.publishWhileDown).toBe(1);
    const downMs = await until(() => coordinator.connected && worker.connected, 2_000);
    expect(downMs).toBeLessThan(2_000);
    expect(nats.broker.port).toBe(port);
    expect(nats.broker.pid).not.toBe(pid);
    // The worker's connection stands, its subscription too.
    await worker.flush();
    expect(coordinator.publish(nats.subjects.epoch(), Buffer.from('after'))).toBe(true);
    await until(() => received.length > 0, 1_000);
    expect(received).toEqual(['after']);
    // An old server is warned about at its start.
    const events = nats.events.filter((event) => event.type !== 'warning');
    expect(events.map((event) => event.type)).toEqual(['exited', 'restarted']);
    expect(events[0]).toMatchObject({ cause: 'killed by SIGKILL' });
  });

  test('nats broker - frozen, is noticed by its clients within 3.5 s', async () => {
    const worker = await nats.connectWorker(0);
    const { pid } = nats.broker;
    process.kill(pid ?? 0, 'SIGSTOP');
    const noticedMs = await until(() => !worker.connected, 4_500);
    process.kill(pid ?? 0, 'SIGCONT');
    expect(noticedMs).toBeLessThan(3_600);
    await until(() => worker.connected, 3_000);
  });

  test('nats broker - adds and removes workers while it runs, and leaves others connected', async () => {
    const coordinator = await nats.connectCoordinator();
    const events: string[] = [];
    coordinator.onEvent((event) => events.push(event.type));
    const credentials = await nats.broker.addWorker();
    const spare = await connectNats({ credentials, name: 'spare' });
    expect(spare.publish(nats.subjects.heartbeat(credentials.worker ?? newWorkerId()), Buffer.from('x'))).toBe(true);
    await spare.flush();
    let closed: Error | null | undefined;
    spare.onEvent((event) => {
      if (event.type === 'closed') closed = event.error;
    });
    await nats.broker.removeWorker(credentials.worker ?? newWorkerId());
    await until(() => closed !== undefined, 3_000);
    expect(closed).not.toBeNull();
    await coordinator.flush();
    expect(events).toEqual([]);
  });

  test('nats broker - takes a patient worker whose user it gets to know a moment later, and refuses an impatient one', async () => {
    const keys = createUser();
    const worker = newWorkerId();
    const seed = new TextDecoder().decode(keys.getSeed());
    const credentials = { ...nats.broker.credentialsOf(nats.workers[0] ?? newWorkerId()), worker, seed };
    await expect(connectNats({ credentials, name: 'impatient' })).rejects.toThrow('refused the credentials of this worker');
    const connecting = connectNats({ credentials, name: 'patient', patienceMs: 10_000 });
    await nats.broker.addEnrolled(worker, keys.getPublicKey());
    const transport = await connecting;
    expect(transport.connected).toBe(true);
    await transport.close();
  });

  test('nats broker - lets workers read the plans of a placement once it is added', async () => {
    const worker = await nats.connectWorker(0);
    const placement = newPlacementId();
    await expect(worker.subscribe(nats.subjects.plan(placement), () => undefined)).rejects.toMatchObject({
      code: 'permission_denied',
    });
    await nats.broker.addPlacement(placement);
    await worker.subscribe(nats.subjects.plan(placement), () => undefined);
    expect(readCredentials(nats.broker.credentialsFile(nats.workers[0] ?? newWorkerId())).placements).toEqual([
      nats.placement,
      placement,
    ]);
  });

  test('nats broker - tells the coordinator at once when a worker is gone', async () => {
    const gone: WorkerDisconnect[] = [];
    const stopWatch = await watchDisconnects(
      nats.broker.systemCredentials(),
      (nkey) => nats.broker.workerOf(nkey),
      (disconnect) => gone.push(disconnect),
    );
    const worker = await nats.connectWorker(1);
    await worker.close();
    await until(() => gone.length > 0, 500);
    expect(gone).toEqual([{ worker: nats.workers[1], reason: 'Client Closed' }]);
    await stopWatch();
  });

  test('nats broker - stopped, leaves no process and no file', async () => {
    const { pid, directory } = nats.broker;
    await nats.broker.stop();
    expect(isAlive(pid ?? 0)).toBe(false);
    expect(existsSync(directory)).toBe(false);
    await until(() => guardsOf(directory).length === 0, 1_000);
  });

  test('nats broker - does not outlive an owner that is killed, nor leave its files', async () => {
    const { pid, directory, owner } = await ownedBroker();
    expect(isAlive(pid)).toBe(true);
    owner.kill('SIGKILL');
    await until(() => !isAlive(pid) && !existsSync(directory) && guardsOf(directory).length === 0, 2_000);
  });

  test('nats broker - stopped by its owner, ends though its guard was killed before', async () => {
    const { directory, pid } = nats.broker;
    const guards = guardsOf(directory);
    expect(guards).toHaveLength(1);
    for (const guard of guards) process.kill(guard, 'SIGKILL');
    await nats.broker.stop();
    expect(isAlive(pid ?? 0)).toBe(false);
    expect(existsSync(directory)).toBe(false);
  });
});

/** Guard shells whose command line names this folder. */
function guardsOf(directory: string): number[] {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .filter((pid) => {
      try {
        const line = readFileSync(`/proc/${pid}/cmdline`, 'utf8');
        return line.includes('shardmesh-broker\0') && line.includes(directory);
      } catch {
        return false;
      }
    })
    .map(Number);
}

/** A broker owned by another process, as the coordinator owns it. */
async function ownedBroker(): Promise<{ owner: ChildProcess; pid: number; directory: string }> {
  const helper = (name: string): string => fileURLToPath(new URL(`helpers/${name}`, import.meta.url));
  const owner = spawn(process.execPath, ['--import', helper('typescript-loader.mjs'), helper('broker-owner.ts')], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const line = await new Promise<string>((resolve) => {
    owner.stdout.setEncoding('utf8').once('data', resolve);
  });
  return { owner, ...(JSON.parse(line) as { pid: number; directory: string }) };
}
