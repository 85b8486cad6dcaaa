/**
 * The transport over NATS. Two things it does not leave to the client library's defaults: while the connection is down nothing is published (the library
 * would take it and lose it), and a refused subscription is an error at once (the server says so later, in another place).
 */
import {
  AuthorizationError,
  connect,
  nkeyAuthenticator,
  PermissionViolationError,
  type ConnectionOptions,
  type NatsConnection,
  type Status,
  type Subscription,
} from 'nats';
import { isLoopback, parseAddress } from './addresses.ts';
import type { Credentials } from './credentials.ts';
import type { MeshId } from './ids.ts';
import { brokerName, tlsVersionMin, type TlsIdentity } from './tls.ts';
import { ShardmeshError } from './errors.ts';
import { messageLimits, meshTimers } from './limits.ts';
import { inboxPrefix } from './subjects.ts';
import { serverAdvice } from './nats-version.ts';
import type { MessageHandler, Transport, TransportCounters, TransportEvent, TransportSubscription } from './transport.ts';

/** Connections that a server may refuse to somebody patient. */
const refusalsMax = 5;

export interface NatsTransportOptions {
  credentials: Pick<Credentials, 'url' | 'serverName' | 'seed' | 'role' | 'worker' | 'mesh' | 'tls'>;
  /** In the server's logs; must tell processes apart. */
  name: string;
  /** Keep trying to reach the server for this long at the start, also where it refuses a few times; 0 = one try. */
  patienceMs?: number;
}

/**
 * Connects, checks that the server is the one meant, and stays connected from then on: endless reconnects, 100 to 250 ms apart.
 *
 * @throws {ShardmeshError} `broker_lost`: not reachable within `patienceMs`; `broker_refused`: it does not know these credentials, or it is another server;
 *   `config_invalid`: plaintext beyond loopback
 */
export async function connectNats(options: NatsTransportOptions): Promise<NatsTransport> {
  const { credentials, name, patienceMs = 0 } = options;
  checkEncrypted(credentials);
  const until = performance.now() + patienceMs;
  let refusals = 0;
  for (;;) {
    try {
      return new NatsTransport(await dial(credentials, name), credentials.serverName);
    } catch (error) {
      if (error instanceof ShardmeshError) throw error;
      // A server that takes in a user at this moment drops whoever has not introduced himself yet, with the same error.
      if (error instanceof AuthorizationError && patienceMs > 0 && ++refusals < refusalsMax) {
        await new Promise((resolve) => setTimeout(resolve, reconnectDelayMs()));
        continue;
      }
      if (error instanceof AuthorizationError)
        throw new ShardmeshError(
          'broker_refused',
          `the NATS server at ${credentials.url} refused the credentials of this ${credentials.role}; are they of another mesh, or revoked?`,
          { cause: error },
        );
      const tlsTrouble = tlsTroubleOf(error);
      if (tlsTrouble)
        throw new ShardmeshError(
          'broker_refused',
          `the NATS server at ${credentials.url} and this ${credentials.role} do not trust each other: ${tlsTrouble}`,
          { cause: error },
        );
      if (performance.now() >= until)
        throw new ShardmeshError('broker_lost', `no NATS server answers at ${credentials.url}: ${(error as Error).message}`, {
          cause: error,
        });
      await new Promise((resolve) => setTimeout(resolve, reconnectDelayMs()));
    }
  }
}

/** Prompts and activations are data of users: they leave this host encrypted, or not at all. */
function checkEncrypted({ url, tls, role }: NatsTransportOptions['credentials']): void {
  const address = parseAddress(url);
  if (!address)
    throw new ShardmeshError('config_invalid', `${url} is not the address of a NATS server; nats://host:port is needed`);
  if (tls === null && !isLoopback(address.host))
    throw new ShardmeshError(
      'config_invalid',
      `${url} is beyond loopback and the credentials of this ${role} hold no certificate: plaintext is refused there. Enroll this host: run \`shardmesh enroll\` where the coordinator runs`,
    );
}

/** What is wrong between two ends that reached each other but do not agree on TLS; null for any other trouble. */
function tlsTroubleOf(error: unknown): string | null {
  for (let one: unknown = error; one instanceof Error; one = one.cause) {
    const { code = '' } = one as NodeJS.ErrnoException;
    if (/^(ERR_TLS|ERR_SSL|CERT_|UNABLE_TO_|SELF_SIGNED|DEPTH_ZERO|INVALID_|EPROTO)/.test(code))
      return `${one.message} (${code})`;
  }
  return null;
}

const dial = (credentials: NatsTransportOptions['credentials'], name: string): Promise<NatsConnection> =>
  connect({
    servers: credentials.url,
    name,
    authenticator: nkeyAuthenticator(new TextEncoder().encode(credentials.seed)),
    inboxPrefix: inboxPrefix(credentials.worker ?? (credentials.role === 'system' ? 'system' : 'coordinator')),
    timeout: meshTimers.connectTimeoutMs,
    pingInterval: meshTimers.pingIntervalMs,
    maxPingOut: meshTimers.pingOutMax,
    reconnect: true,
    maxReconnectAttempts: -1,
    reconnectDelayHandler: reconnectDelayMs,
    ignoreClusterUpdates: true,
    noAsyncTraces: true,
    resolve: false,
    ...(credentials.tls && { tls: tlsOptions(credentials.tls, credentials.mesh) }),
  });

/** The handshake comes before the server's first word (`handshake_first`), so that nothing of it can be forged. The library hands all of this to Node. */
const tlsOptions = ({ authority, certificate, key }: TlsIdentity, mesh: MeshId): ConnectionTls => ({
  handshakeFirst: true,
  ca: authority,
  cert: certificate,
  key,
  servername: brokerName(mesh),
  minVersion: tlsVersionMin,
});

type ConnectionTls = NonNullable<ConnectionOptions['tls']> & { servername: string; minVersion: string };

function reconnectDelayMs(): number {
  const { reconnectMinMs, reconnectMaxMs } = meshTimers;
  return reconnectMinMs + Math.random() * (reconnectMaxMs - reconnectMinMs);
}

export class NatsTransport implements Transport {
  readonly #connection: NatsConnection;
  readonly #expectedServer: string | null;
  readonly #listeners = new Set<(event: TransportEvent) => void>();
  readonly #counters: TransportCounters = {
    published: 0,
    received: 0,
    bytesOut: 0,
    bytesIn: 0,
    publishWhileDown: 0,
    oversize: 0,
    reconnects: 0,
  };
  #connected = true;
  /** Why this side ended the connection by itself. */
  #fatal: Error | null = null;
  #closing: Promise<void> | null = null;
  #serverName: string;
  #serverVersion: string;
  #payloadBytesMax: number;

  /** Takes over a connection that stands. Use `connectNats`. */
  constructor(connection: NatsConnection, expectedServer: string | null) {
    this.#connection = connection;
    this.#expectedServer = expectedServer;
    const info = connection.info;
    this.#serverName = info?.server_name ?? '';
    this.#serverVersion = info?.version ?? '0.0.0';
    this.#payloadBytesMax = Math.min(info?.max_payload ?? messageLimits.payloadBytesMax, messageLimits.payloadBytesMax);
    const stranger = this.#stranger();
    if (stranger) {
      void connection.close();
      throw stranger;
    }
    void this.#follow();
  }

  get connected(): boolean {
    return this.#connected;
  }

  get payloadBytesMax(): number {
    return this.#payloadBytesMax;
  }

  get counters(): Readonly<TransportCounters> {
    return this.#counters;
  }

  /** As the server says; `advice` is a warning about known holes of this version, else null. */
  get server(): { name: string; version: string; url: string; advice: string | null } {
    return {
      name: this.#serverName,
      version: this.#serverVersion,
      url: this.#connection.getServer(),
      advice: serverAdvice(this.#serverVersion),
    };
  }

  publish(subject: string, bytes: Uint8Array): boolean {
    if (bytes.length > this.#payloadBytesMax) {
      this.#counters.oversize++;
      throw new ShardmeshError(
        'invalid_message',
        `message of ${bytes.length} bytes on ${subject} is over the server's limit of ${this.#payloadBytesMax}; nothing was sent`,
      );
    }
    if (!this.#connected || this.#closing || this.#connection.isClosed()) {
      this.#counters.publishWhileDown++;
      return false;
    }
    this.#connection.publish(subject, bytes);
    this.#counters.published++;
    this.#counters.bytesOut += bytes.length;
    return true;
  }

  async subscribe(subject: string, handler: MessageHandler): Promise<TransportSubscription> {
    this.#checkOpen();
    let refused: Error | null = null;
    let confirmed = false;
    const subscription: Subscription = this.#connection.subscribe(subject, {
      callback: (error, message) => {
        if (error) {
          refused = error;
          // After a reload of the server's permissions this comes late.
          if (confirmed) this.#emit({ type: 'permission_denied', operation: 'subscribe', subject });
          return;
        }
        this.#counters.received++;
        this.#counters.bytesIn += message.data.length;
        try {
          handler(message.data, message.subject);
        } catch (bug) {
          // The library swallows what its callbacks throw, and its reader with it. A handler that throws is a bug and must be seen.
          process.nextTick(() => {
            throw bug;
          });
        }
      },
    });
    await this.flush();
    if (refused)
      throw new ShardmeshError(
        'permission_denied',
        `the NATS server does not let these credentials subscribe to ${subject}; check the permissions of this user`,
        { cause: refused },
      );
    confirmed = true;
    return { unsubscribe: () => subscription.unsubscribe() };
  }

  async flush(): Promise<void> {
    this.#checkOpen();
    try {
      await this.#connection.flush();
    } catch (error) {
      throw new ShardmeshError('broker_lost', `the connection to the NATS server was lost: ${(error as Error).message}`, {
        cause: error,
      });
    }
  }

  onEvent(listener: (event: TransportEvent) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  close(): Promise<void> {
    this.#closing ??= this.#leave();
    return this.#closing;
  }

  async #leave(): Promise<void> {
    if (this.#connection.isClosed()) return;
    if (this.#connected) {
      let timer: NodeJS.Timeout | undefined;
      const cap = new Promise<void>((resolve) => (timer = setTimeout(resolve, meshTimers.transportCloseMs)));
      // A drain that fails (the connection broke meanwhile) leaves nothing to drain.
      await Promise.race([this.#connection.drain().catch(() => undefined), cap]);
      clearTimeout(timer);
    }
    await this.#connection.close();
  }

  async #follow(): Promise<void> {
    void this.#connection.closed().then((error) => {
      this.#connected = false;
      const reason = error instanceof Error && !this.#closing ? error : null;
      this.#emit({ type: 'closed', error: this.#fatal ?? reason });
    });
    for await (const status of this.#connection.status()) this.#onStatus(status);
  }

  #onStatus(status: Status): void {
    switch (status.type) {
      case 'disconnect':
        if (!this.#connected) return;
        this.#connected = false;
        this.#emit({ type: 'disconnected', reason: `connection to ${status.server} lost` });
        return;
      case 'staleConnection':
        this.#emit({ type: 'warning', message: `the NATS server did not answer ${meshTimers.pingOutMax} pings` });
        return;
      case 'reconnect':
        this.#onReconnect();
        return;
      case 'ldm':
        this.#emit({ type: 'server_leaving' });
        return;
      case 'error':
        if (status.error instanceof PermissionViolationError) {
          const { operation, subject } = status.error;
          this.#emit({ type: 'permission_denied', operation: operation === 'publish' ? 'publish' : 'subscribe', subject });
        } else this.#emit({ type: 'warning', message: status.error.message });
        return;
      case 'slowConsumer':
      case 'reconnecting':
      case 'update':
      case 'ping':
      case 'forceReconnect':
      case 'close':
        return;
      default:
        status satisfies never;
    }
  }

  #onReconnect(): void {
    const info = this.#connection.info;
    this.#serverName = info?.server_name ?? this.#serverName;
    this.#serverVersion = info?.version ?? this.#serverVersion;
    this.#payloadBytesMax = Math.min(info?.max_payload ?? this.#payloadBytesMax, messageLimits.payloadBytesMax);
    const stranger = this.#stranger();
    if (stranger) {
      this.#fatal = stranger;
      void this.#connection.close();
      return;
    }
    this.#connected = true;
    this.#counters.reconnects++;
    this.#emit({ type: 'connected', server: this.#serverName, version: this.#serverVersion });
  }

  #stranger(): ShardmeshError | null {
    if (this.#expectedServer === null || this.#serverName === this.#expectedServer) return null;
    return new ShardmeshError(
      'broker_refused',
      `the NATS server at ${this.#connection.getServer()} calls itself ${JSON.stringify(this.#serverName)}, ${JSON.stringify(this.#expectedServer)} was meant: another program took its port`,
    );
  }

  #checkOpen(): void {
    if (this.#closing || this.#connection.isClosed())
      throw new ShardmeshError('broker_lost', 'the connection to the NATS server is closed');
  }

  #emit(event: TransportEvent): void {
    for (const listener of this.#listeners) listener(event);
  }
}
