/**
 * A private NATS server for one mesh: found, configured, started, restarted when it dies, and gone when its owner is gone.
 *
 * Everything it needs lies in one private folder (0700): configuration, its ports file, one credential file for each worker (0600). The server runs under
 * a guard, a shell that waits on a pipe from this process. When this process ends in whatever way, SIGKILL included, the pipe closes, and the guard kills
 * the server and removes the folder.
 *
 *   this process ──pipe──► guard (sh, read)          line: the server has ended, just go      end of file: kill it, remove the folder
 *        └── spawns ─────► nats-server (the shell that started the guard, replaced by exec, so its pid is the child's)
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { chmodSync, mkdtempSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { createConnection } from 'node:net';
import { connect as connectTls } from 'node:tls';
import { availableParallelism, tmpdir } from 'node:os';
import type { Writable } from 'node:stream';
import { join } from 'node:path';
import { addressText, listenHost, type Address } from '../../protocol/addresses.ts';
import type { Credentials } from '../../protocol/credentials.ts';
import { writeCredentials } from '../../protocol/credentials.ts';
import { ShardmeshError } from '../../protocol/errors.ts';
import { newWorkerId, type MeshId, type PlacementId, type WorkerId } from '../../protocol/ids.ts';
import { meshSubjects, systemPermissions } from '../../protocol/subjects.ts';
import { serverAdvice } from '../../protocol/nats-version.ts';
import { brokerName, coordinatorName, secureContextOf, workerName, type TlsIdentity } from '../../protocol/tls.ts';
import { brokerConfigText, newUser, type BrokerTls, type User } from './broker-config.ts';
import type { NatsServer } from './nats-server.ts';

export type BrokerEvent =
  | { type: 'warning'; message: string }
  /** It died by itself; a restart is under way. `output`: its last lines. */
  | { type: 'exited'; cause: string; output: string }
  /** It runs but answers nobody; it is killed, and `exited` and `restarted` follow. */
  | { type: 'frozen'; message: string }
  | { type: 'restarted'; attempt: number; downMs: number }
  | { type: 'restart_failed'; attempt: number; error: Error };

export interface BrokerOptions {
  server: NatsServer;
  mesh: MeshId;
  /** Workers that get a user at once; more by `addWorker`. */
  workers: WorkerId[];
  /** Placements whose plans the workers may read; more by `addPlacement`. */
  placements: PlacementId[];
  onEvent: (event: BrokerEvent) => void;
  /** For workers on other hosts; absent: a free port of loopback, in plaintext. */
  listener?: BrokerListener;
  /** Of the mesh, where it outlives the broker; absent: a new one. */
  secret?: string;
  /** Workers of other hosts and their public nkeys; more by `addEnrolled`. */
  enrolled?: { worker: WorkerId; nkey: string }[];
  /** Where the private folder is made. */
  temporaryDirectory?: string;
  backoffBaseMs?: number;
  backoffMaxMs?: number;
  startTimeoutMs?: number;
}

export interface BrokerListener {
  /** As workers on other hosts reach it. */
  host: string;
  port: number;
  /** Certificate and key for a process of this host, by its name in the mesh. */
  identityOf(name: string): TlsIdentity;
}

const pollMs = 15;
const outputCharactersMax = 8_192;
const stopGraceMs = 3_000;
/** Up to so many cores are busy computing: a broker that looks for work on several of them at each message takes half as much time again from them. */
const fewCores = 4;
/** Of a server that clients have lost, before it is taken for frozen. */
const frozenMs = 500;
const greetingsMax = 2;
/** A server that ran this long ends a row of failures. */
const stableMs = 10_000;

// $1 = folder, the rest = the command. The guard waits on the pipe (descriptor 3); a line means the server has ended by itself.
const guardScript = `
folder=$1; shift
( trap '' INT TERM HUP; if ! read -r line <&3; then kill -9 $$; rm -rf "$folder"; fi ) >/dev/null 2>&1 </dev/null &
exec 3<&-
exec "$@"
`;

/**
 * Starts a broker and waits until it answers.
 * @throws {ShardmeshError} `broker_failed` with the server's last lines
 */
export async function startBroker(options: BrokerOptions): Promise<Broker> {
  const directory = mkdtempSync(join(options.temporaryDirectory ?? tmpdir(), 'shardmesh-broker-'));
  chmodSync(directory, 0o700);
  const broker = new Broker(options, directory);
  try {
    await broker.start();
  } catch (error) {
    await broker.stop();
    throw error;
  }
  return broker;
}

export class Broker {
  readonly directory: string;
  readonly serverName: string;
  /** 256 bits, for gRPC links between the processes of this mesh. */
  readonly secret: string;
  readonly #options: BrokerOptions;
  readonly #placements: PlacementId[];
  readonly #coordinator = newUser();
  readonly #system = newUser();
  readonly #workers = new Map<WorkerId, User>();
  /** Their seeds are on their own hosts. */
  readonly #enrolled = new Map<WorkerId, string>();
  readonly #listener: BrokerListener | null;
  readonly #identity: TlsIdentity | null;
  #child: ChildProcess | null = null;
  #port = -1;
  /** Port in the configuration of the running server: a reload must not change it. */
  #configuredPort = -1;
  #output = '';
  #startedAt = 0;
  #failures = 0;
  #restarting: Promise<void> | null = null;
  #replacing: Promise<void> | null = null;
  #reloading: Promise<void> = Promise.resolve();
  #stopping: Promise<void> | null = null;
  readonly #abort = new AbortController();

  /** Prepares, starts nothing. Use `startBroker`. */
  constructor(options: BrokerOptions, directory: string) {
    this.#options = options;
    this.#placements = [...options.placements];
    this.directory = directory;
    this.serverName = `shardmesh-${options.mesh}`;
    this.secret = options.secret ?? randomBytes(32).toString('base64url');
    for (const worker of options.workers) this.#workers.set(worker, newUser());
    for (const { worker, nkey } of options.enrolled ?? []) this.#enrolled.set(worker, nkey);
    this.#listener = options.listener ?? null;
    this.#identity = this.#listener?.identityOf(brokerName(options.mesh)) ?? null;
    this.#port = this.#listener?.port ?? -1;
  }

  get port(): number {
    return this.#port;
  }

  /** For processes of this host. */
  get url(): string {
    return `${this.#identity ? 'tls' : 'nats'}://${addressText({ host: this.#localHost, port: this.#port })}`;
  }

  /** For workers of other hosts. */
  get advertisedUrl(): string {
    return this.#listener ? `tls://${addressText({ host: this.#listener.host, port: this.#port })}` : this.url;
  }

  get #listenHost(): string {
    return listenHost(this.#listener?.host ?? '127.0.0.1');
  }

  get #localHost(): string {
    const host = this.#listenHost;
    return host === '0.0.0.0' ? '127.0.0.1' : host === '::' ? '::1' : host;
  }

  /** Of the server, not of its guard; null while it is down. */
  get pid(): number | null {
    return this.#child?.pid ?? null;
  }

  get version(): string {
    return this.#options.server.version;
  }

  async start(): Promise<void> {
    const advice = serverAdvice(this.version);
    if (advice && this.#listener) throw new ShardmeshError('config_invalid', `--advertise lets other hosts in, and ${advice}`);
    if (advice) this.#options.onEvent({ type: 'warning', message: advice });
    await this.#launch();
    for (const worker of this.#workers.keys()) writeCredentials(this.credentialsFile(worker), this.credentialsOf(worker));
  }

  coordinatorCredentials(): Credentials {
    return this.#credentials('coordinator', this.#coordinator, null, this.#placements);
  }

  /** For the watch of connects and disconnects. */
  systemCredentials(): Credentials {
    return this.#credentials('system', this.#system, null, []);
  }

  /** @throws {ShardmeshError} `config_invalid`: no such worker */
  credentialsOf(worker: WorkerId): Credentials {
    const user = this.#workers.get(worker);
    if (!user) throw new ShardmeshError('config_invalid', `the broker has no user for worker ${worker}`);
    return this.#credentials('worker', user, worker, this.#placements);
  }

  /** Path of the worker's credential file, for `shardmesh worker --credentials`. It lives as long as the broker. */
  credentialsFile(worker: WorkerId): string {
    return join(this.directory, `worker-${worker}.json`);
  }

  /** The worker whose public key this is, as the broker's own events name their client; null = the coordinator, or nobody known. */
  workerOf(nkey: string): WorkerId | null {
    for (const [worker, user] of this.#workers) if (user.nkey === nkey) return worker;
    for (const [worker, own] of this.#enrolled) if (own === nkey) return worker;
    return null;
  }

  /** Lets a worker of another host in, by its public nkey. */
  async addEnrolled(worker: WorkerId, nkey: string): Promise<void> {
    this.#enrolled.set(worker, nkey);
    await this.#reload();
  }

  /** Adds a user for one more worker while the server runs. Connections of others are not disturbed. */
  async addWorker(worker: WorkerId = newWorkerId()): Promise<Credentials> {
    if (!this.#workers.has(worker)) {
      this.#workers.set(worker, newUser());
      await this.#reload();
    }
    const credentials = this.credentialsOf(worker);
    writeCredentials(this.credentialsFile(worker), credentials);
    return credentials;
  }

  /** Takes a worker's access away; the server cuts its connection. */
  async removeWorker(worker: WorkerId): Promise<void> {
    if (!this.#workers.delete(worker) && !this.#enrolled.delete(worker)) return;
    rmSync(this.credentialsFile(worker), { force: true });
    await this.#reload();
  }

  /** Lets all workers read the plans of one more placement. */
  async addPlacement(placement: PlacementId): Promise<void> {
    if (this.#placements.includes(placement)) return;
    this.#placements.push(placement);
    await this.#reload();
    for (const worker of this.#workers.keys()) writeCredentials(this.credentialsFile(worker), this.credentialsOf(worker));
  }

  /**
   * Whoever has lost the connection to the server, or waits for an answer of it, asks for this: a server that runs but does not even greet (stopped, or stuck)
   * is killed, and started again on its port with its users. One that is merely slow to others has greeted within a few milliseconds.
   */
  replaceIfFrozen(): Promise<void> {
    this.#replacing ??= this.#replaceIfFrozen().finally(() => (this.#replacing = null));
    return this.#replacing;
  }

  async #replaceIfFrozen(): Promise<void> {
    const child = this.#child;
    if (!child || !isRunning(child) || this.#stopping || this.#restarting || this.#startedAt === 0) return;
    for (let attempt = 0; attempt < greetingsMax; attempt++) if ((await this.#greeting(this.#port, frozenMs)) !== null) return;
    if (this.#child !== child || !isRunning(child) || this.#stopping) return;
    const message = `nats-server (process ${child.pid}) runs but has not greeted within ${greetingsMax} times ${frozenMs} ms`;
    this.#options.onEvent({ type: 'frozen', message });
    child.kill('SIGKILL');
  }

  /** Ends the server and removes its folder. Safe to call twice. */
  stop(): Promise<void> {
    this.#stopping ??= this.#end();
    return this.#stopping;
  }

  async #end(): Promise<void> {
    this.#abort.abort();
    await this.#restarting?.catch(() => undefined);
    const child = this.#child;
    if (child && isRunning(child)) {
      const ended = new Promise<void>((resolve) => child.once('exit', () => resolve()));
      child.kill('SIGTERM');
      const timer = setTimeout(() => child.kill('SIGKILL'), stopGraceMs);
      await ended;
      clearTimeout(timer);
    }
    rmSync(this.directory, { recursive: true, force: true });
  }

  #credentials(role: Credentials['role'], user: User, worker: WorkerId | null, placements: PlacementId[]): Credentials {
    const { mesh } = this.#options;
    return {
      version: 1,
      role,
      url: this.url,
      serverName: this.serverName,
      ...user,
      mesh,
      secret: this.secret,
      worker,
      placements: [...placements],
      tls: this.#listener?.identityOf(worker ? workerName(mesh, worker) : coordinatorName(mesh)) ?? null,
    };
  }

  get #configFile(): string {
    return join(this.directory, 'nats-server.conf');
  }

  #writeConfig(): void {
    const subjects = meshSubjects(this.#options.mesh);
    const text = brokerConfigText({
      serverName: this.serverName,
      host: this.#listenHost,
      tls: this.#identity ? this.#writeIdentity(this.#identity) : null,
      port: this.#configuredPort,
      portsDirectory: this.directory,
      meshUsers: [
        { nkey: this.#coordinator.nkey, permissions: subjects.coordinatorPermissions() },
        ...[...this.#workers].map(([worker, { nkey }]) => ({
          nkey,
          permissions: subjects.workerPermissions(worker, this.#placements),
        })),
        ...[...this.#enrolled].map(([worker, nkey]) => ({
          nkey,
          permissions: subjects.workerPermissions(worker, this.#placements),
        })),
      ],
      systemUsers: [{ nkey: this.#system.nkey, permissions: systemPermissions() }],
    });
    const partial = `${this.#configFile}.partial`;
    writeFileSync(partial, text, { mode: 0o600 });
    renameSync(partial, this.#configFile);
  }

  #writeIdentity({ authority, certificate, key }: TlsIdentity): BrokerTls {
    const write = (name: string, text: string): string => {
      const path = join(this.directory, name);
      writeFileSync(path, text, { mode: 0o600 });
      return path;
    };
    return {
      authorityFile: write('authority.pem', authority),
      certificateFile: write('broker.pem', certificate),
      keyFile: write('broker.key', key),
    };
  }

  /** One attempt: spawns the server, and resolves when it answers with its name. */
  async #launch(): Promise<void> {
    // After the first start the port stays, so that clients find the server again.
    this.#configuredPort = this.#port;
    this.#writeConfig();
    this.#output = '';
    const { path } = this.#options.server;
    const child = spawn('/bin/sh', ['-c', guardScript, 'shardmesh-broker', this.directory, path, '-c', this.#configFile], {
      // The guard's pipe is not stdin: Node destroys that of its own accord when the child has ended.
      stdio: ['ignore', 'ignore', 'pipe', 'pipe'],
      // Its own session: a Ctrl-C on the terminal is for the owner, who drains first.
      detached: true,
      env: availableParallelism() > fewCores ? process.env : { GOMAXPROCS: '1', ...process.env },
    });
    this.#child = child;
    child.stdio[3]?.on('error', () => undefined);
    child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      this.#output = (this.#output + text).slice(-outputCharactersMax);
    });
    child.on('error', (error) => (this.#output += error.message));
    child.once('exit', (code, signal) => this.#onExit(child, code, signal));
    try {
      await this.#waitUntilReady(child);
    } catch (error) {
      if (isRunning(child)) child.kill('SIGKILL');
      throw error;
    }
    this.#startedAt = performance.now();
  }

  async #waitUntilReady(child: ChildProcess): Promise<void> {
    const timeoutMs = this.#options.startTimeoutMs ?? 10_000;
    const until = performance.now() + timeoutMs;
    for (;;) {
      if (this.#abort.signal.aborted) throw new ShardmeshError('broker_failed', 'the broker was stopped while it started');
      if (!isRunning(child) && this.#listener && /address already in use/.test(this.#output))
        throw new ShardmeshError(
          'config_invalid',
          `port ${this.#port} is in use; --advertise ${this.#listener.host}:PORT takes another one and the two after it`,
        );
      if (!isRunning(child))
        throw new ShardmeshError('broker_failed', `nats-server ended while it started: ${lastLines(this.#output)}`);
      const port = this.#portOf(child.pid);
      // It may have died after its greeting; then the next round says so.
      if (port !== null && (await this.#greeting(port)) === this.serverName && isRunning(child)) {
        this.#port = port;
        return;
      }
      if (performance.now() > until)
        throw new ShardmeshError('broker_failed', `nats-server was not ready within ${timeoutMs} ms: ${lastLines(this.#output)}`);
      await sleep(pollMs);
    }
  }

  #greeting(port: number, timeoutMs = 2_000): Promise<string | null> {
    const { mesh } = this.#options;
    return greeting({ host: this.#localHost, port }, this.#identity, brokerName(mesh), timeoutMs);
  }

  /** The port the server wrote into its ports file; null until then. */
  #portOf(pid: number | undefined): number | null {
    try {
      const text = readFileSync(join(this.directory, `nats-server_${pid}.ports`), 'utf8');
      const ports = JSON.parse(text) as { nats?: string[] };
      const match = /:(\d+)$/.exec(ports.nats?.[0] ?? '');
      return match ? Number(match[1]) : null;
    } catch {
      return null;
    }
  }

  #onExit(child: ChildProcess, code: number | null, signal: NodeJS.Signals | null): void {
    // Tells the guard to go without killing a pid that may be another process by now.
    (child.stdio[3] as Writable | null)?.end('ended\n');
    rmSync(join(this.directory, `nats-server_${child.pid}.ports`), { force: true });
    if (this.#child !== child) return;
    this.#child = null;
    const wasReady = this.#startedAt > 0;
    if (this.#stopping || this.#restarting || !wasReady) return;
    if (performance.now() - this.#startedAt > stableMs) this.#failures = 0;
    this.#options.onEvent({
      type: 'exited',
      cause: signal ? `killed by ${signal}` : `exit code ${code}`,
      output: lastLines(this.#output),
    });
    this.#restarting = this.#restart().finally(() => (this.#restarting = null));
  }

  async #restart(): Promise<void> {
    const downSince = performance.now();
    const { backoffBaseMs = 50, backoffMaxMs = 5_000, onEvent } = this.#options;
    while (!this.#abort.signal.aborted) {
      const attempt = ++this.#failures;
      await sleep(Math.min(backoffMaxMs, backoffBaseMs * 2 ** (attempt - 1)), this.#abort.signal);
      if (this.#abort.signal.aborted) return;
      try {
        await this.#launch();
        onEvent({ type: 'restarted', attempt, downMs: performance.now() - downSince });
        return;
      } catch (error) {
        if (!this.#abort.signal.aborted) onEvent({ type: 'restart_failed', attempt, error: error as Error });
      }
    }
  }

  /** Makes the running server read its users again. One at a time. */
  #reload(): Promise<void> {
    this.#reloading = this.#reloading.catch(() => undefined).then(() => this.#reloadNow());
    return this.#reloading;
  }

  async #reloadNow(): Promise<void> {
    this.#writeConfig();
    const child = this.#child;
    // A server that is down reads the new file when it starts.
    if (!child || !isRunning(child)) return;
    this.#output = '';
    child.kill('SIGHUP');
    const until = performance.now() + (this.#options.startTimeoutMs ?? 10_000);
    while (isRunning(child)) {
      if (/Reloaded server configuration|Reloaded: accounts/.test(this.#output)) return;
      if (/Failed to reload/.test(this.#output) || performance.now() > until)
        throw new ShardmeshError('broker_failed', `nats-server did not reload its configuration: ${lastLines(this.#output)}`);
      await sleep(pollMs);
    }
  }
}

const isRunning = (child: ChildProcess): boolean =>
  child.pid !== undefined && child.exitCode === null && child.signalCode === null;

/** The name in a server's first line (INFO); null when nothing there speaks NATS. */
function greeting(address: Address, identity: TlsIdentity | null, name: string, timeoutMs: number): Promise<string | null> {
  return new Promise((resolve) => {
    const socket = identity
      ? connectTls({ ...address, secureContext: secureContextOf(identity), servername: name })
      : createConnection(address);
    let text = '';
    const done = (name: string | null): void => {
      socket.destroy();
      resolve(name);
    };
    socket.setTimeout(timeoutMs, () => done(null));
    socket.on('error', () => done(null));
    socket.on('close', () => done(null));
    socket.setEncoding('utf8').on('data', (part: string) => {
      text += part;
      if (text.length > 65_536) return done(null);
      const end = text.indexOf('\r\n');
      if (end < 0) return;
      try {
        const info = JSON.parse(text.slice(text.indexOf('{'), end)) as { server_name?: string };
        done(info.server_name ?? null);
      } catch {
        done(null);
      }
    });
  });
}

const sleep = (ms: number, signal?: AbortSignal): Promise<void> =>
  new Promise((resolve) => {
    if (signal?.aborted) return resolve();
    const end = (): void => {
      clearTimeout(timer);
      signal?.removeEventListener('abort', end);
      resolve();
    };
    const timer = setTimeout(end, ms);
    signal?.addEventListener('abort', end, { once: true });
  });

/** The last lines of a server's log, on one line. */
function lastLines(output: string): string {
  const lines = output.trim().split('\n').slice(-3).join(' | ');
  return lines || 'it said nothing';
}
