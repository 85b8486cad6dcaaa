/**
 * The configuration file of a private nats-server. Users live in `accounts` only: a top-level `authorization` block beside accounts lets anonymous
 * clients in on servers before 2.9.23 (CVE-2023-47090). Permissions are allow-lists; no monitoring, WebSocket, MQTT, leafnode or cluster listener.
 */
import { createUser } from '@nats-io/nkeys';
import { frameHeaderBytes } from '../../protocol/frame-codec.ts';
import { frameLimits, meshTimers, messageLimits } from '../../protocol/limits.ts';
import { meshAccount, systemAccount, type Permissions } from '../../protocol/subjects.ts';

/** A user of the broker: public nkey, and the seed that only its owner has. */
export interface User {
  nkey: string;
  seed: string;
}

export function newUser(): User {
  const pair = createUser();
  return { nkey: pair.getPublicKey(), seed: new TextDecoder().decode(pair.getSeed()) };
}

export interface BrokerUser {
  /** Public nkey. */
  nkey: string;
  permissions: Permissions;
}

/** Files of the server's own certificate and key, and of the authority that clients must have theirs from. */
export interface BrokerTls {
  authorityFile: string;
  certificateFile: string;
  keyFile: string;
}

export interface BrokerConfig {
  serverName: string;
  /** Address to listen on. */
  host: string;
  /** null: plaintext, which is for loopback. */
  tls: BrokerTls | null;
  /** -1: a free port, written into `portsDirectory`. */
  port: number;
  portsDirectory: string;
  meshUsers: BrokerUser[];
  systemUsers: BrokerUser[];
}

export function brokerConfigText(config: BrokerConfig): string {
  return [
    `server_name: ${quote(config.serverName)}`,
    `host: ${quote(config.host)}`,
    `port: ${config.port}`,
    `ports_file_dir: ${quote(config.portsDirectory)}`,
    `max_payload: ${messageLimits.payloadBytesMax}`,
    `max_pending: ${64 * (frameLimits.chunkBytesMax + frameHeaderBytes)}`,
    // A frozen reader is cut off after this long, so that it does not stall whoever publishes to it.
    `write_deadline: "2s"`,
    `ping_interval: "${meshTimers.pingIntervalMs}ms"`,
    `ping_max: ${meshTimers.pingOutMax}`,
    `max_connections: 2048`,
    ...(config.tls ? tlsLines(config.tls) : []),
    `system_account: ${systemAccount}`,
    `accounts {`,
    `  ${meshAccount} {`,
    ...userLines(config.meshUsers),
    `  }`,
    `  ${systemAccount} {`,
    ...userLines(config.systemUsers),
    `  }`,
    `}`,
    '',
  ].join('\n');
}

/** Mutual TLS 1.3 before the first word of the protocol: a client in plaintext, or without a certificate of this authority, gets nothing. */
const tlsLines = ({ authorityFile, certificateFile, keyFile }: BrokerTls): string[] => [
  `tls {`,
  `  ca_file: ${quote(authorityFile)}`,
  `  cert_file: ${quote(certificateFile)}`,
  `  key_file: ${quote(keyFile)}`,
  `  verify: true`,
  `  min_version: "1.3"`,
  `  handshake_first: true`,
  `  timeout: 5`,
  `}`,
];

function userLines(users: BrokerUser[]): string[] {
  return [
    `    users: [`,
    ...users.map(({ nkey, permissions }) => {
      const publish = permissions.publish.map(quote).join(', ');
      const subscribe = permissions.subscribe.map(quote).join(', ');
      // An empty allow-list would mean that everything is allowed.
      if (!publish || !subscribe) throw new RangeError(`user ${nkey} has an empty allow-list`);
      return `      { nkey: ${nkey}, permissions: { publish: { allow: [${publish}] }, subscribe: { allow: [${subscribe}] } } }`;
    }),
    `    ]`,
  ];
}

const quote = (text: string): string => JSON.stringify(text);
