/**
 * Options, listeners, clients and the check of callers that the link and the weight service share. On loopback in plaintext; beyond it with mutual TLS, where a
 * process is known by the name in its certificate.
 */
import { createHash, timingSafeEqual } from 'node:crypto';
import {
  Client,
  credentials,
  logVerbosity,
  Metadata,
  Server,
  ServerCredentials,
  setLogVerbosity,
  type ChannelOptions,
  type ClientDuplexStream,
  type ClientReadableStream,
} from '@grpc/grpc-js';
import { addressText, isLoopback, listenHost, parseAddress } from '../addresses.ts';
import { ShardmeshError } from '../errors.ts';
import { isId, type MeshId, type WorkerId } from '../ids.ts';
import { grpcLimits } from '../limits.ts';
import { secureContextOf, tlsVersionMin, workerName, type TlsIdentity } from '../tls.ts';
import { linkStream, weightsFetch } from './services.ts';

// The library prints to stderr what it also reports as errors of calls; those are logged by whoever made the call.
setLogVerbosity(logVerbosity.NONE);

const identityCompression = 0;

/**
 * For clients and servers. No compression (a bomb is cheap to send), no proxy from the environment, and messages over the limit are refused before
 * they are buffered.
 */
export const channelOptions: ChannelOptions = {
  'grpc.max_send_message_length': grpcLimits.messageBytesMax,
  'grpc.max_receive_message_length': grpcLimits.messageBytesMax,
  'grpc.max_concurrent_streams': grpcLimits.streamsMax,
  'grpc.default_compression_algorithm': identityCompression,
  'grpc.keepalive_time_ms': grpcLimits.keepaliveTimeMs,
  'grpc.keepalive_timeout_ms': grpcLimits.keepaliveTimeoutMs,
  'grpc.keepalive_permit_without_calls': 1,
  'grpc.enable_http_proxy': 0,
  'grpc.enable_retries': 0,
  'grpc.enable_channelz': 0,
  'grpc.service_config_disable_resolution': 1,
  'grpc.use_local_subchannel_pool': 1,
  'grpc.initial_reconnect_backoff_ms': 100,
  'grpc.max_reconnect_backoff_ms': 1_000,
};

export const createGrpcServer = (): Server => new Server(channelOptions);

export interface GrpcListener {
  /** Where peers reach it; the default is loopback. */
  host?: string;
  /** 0 (the default): a free one. */
  port?: number;
  /** null (the default): plaintext, on loopback only. */
  tls?: TlsIdentity | null;
}

/**
 * @returns host:port to give to peers
 * @throws {ShardmeshError} `config_invalid`: the port is taken, the address does not exist here, or plaintext beyond loopback
 */
export async function bindGrpc(server: Server, { host = '127.0.0.1', port = 0, tls = null }: GrpcListener = {}): Promise<string> {
  checkEncrypted(host, tls);
  const listen = addressText({ host: listenHost(host), port });
  const bound = await new Promise<number>((resolve, reject) => {
    const security = tls ? new MutualTls(tls) : ServerCredentials.createInsecure();
    server.bindAsync(listen, security, (error, boundPort) => {
      if (error)
        reject(new ShardmeshError('config_invalid', `cannot listen on ${listen} for gRPC: ${error.message}`, { cause: error }));
      else resolve(boundPort);
    });
  });
  return addressText({ host, port: bound });
}

/** The library's own takes no lowest version of TLS. */
class MutualTls extends ServerCredentials {
  constructor({ authority, certificate, key }: TlsIdentity) {
    super(
      { requestCert: true, rejectUnauthorized: true, minVersion: tlsVersionMin },
      { ca: authority, cert: certificate, key, minVersion: tlsVersionMin },
    );
  }
  override _equals(other: ServerCredentials): boolean {
    return this === other;
  }
}

/**
 * A channel to host:port. Connects by itself when used; `close()` ends it.
 * @param peerName  the name that the certificate there must carry
 * @throws {ShardmeshError} `config_invalid`: plaintext beyond loopback
 */
export function createGrpcClient(address: string, tls: TlsIdentity | null = null, peerName = ''): Client {
  const host = parseAddress(address)?.host;
  if (host === undefined) throw new ShardmeshError('config_invalid', `${address} is not the address of a gRPC server`);
  checkEncrypted(host, tls);
  if (!tls) return new Client(address, credentials.createInsecure(), channelOptions);
  return new Client(address, credentials.createFromSecureContext(secureContextOf(tls)), {
    ...channelOptions,
    'grpc.ssl_target_name_override': peerName,
    'grpc.default_authority': peerName,
  });
}

function checkEncrypted(host: string, tls: TlsIdentity | null): void {
  if (tls === null && !isLoopback(host))
    throw new ShardmeshError(
      'config_invalid',
      `gRPC with ${host} would leave this host in plaintext: that needs certificates, see \`shardmesh enroll\``,
    );
}

/** Opens the stream of frames. `caller` is the own worker id, so that the other end knows whose stream this is. */
export const openLinkStream = (client: Client, secret: string, caller: string): ClientDuplexStream<Buffer, Buffer> =>
  client.makeBidiStreamRequest(
    linkStream.path,
    linkStream.requestSerialize,
    linkStream.responseDeserialize,
    callMetadata(secret, caller),
  );

/** Asks for parts of a weight slice. The whole transfer ends by `timeoutMs`. */
export const openWeightsFetch = (
  client: Client,
  secret: string,
  caller: string,
  request: Buffer,
  timeoutMs: number,
): ClientReadableStream<Buffer> =>
  client.makeServerStreamRequest(
    weightsFetch.path,
    weightsFetch.requestSerialize,
    weightsFetch.responseDeserialize,
    request,
    callMetadata(secret, caller),
    { deadline: Date.now() + timeoutMs },
  );

const tokenKey = 'authorization';
const callerKey = 'shardmesh-worker';

export function callMetadata(secret: string, caller: string): Metadata {
  const metadata = new Metadata();
  metadata.set(tokenKey, `Bearer ${secret}`);
  metadata.set(callerKey, caller);
  return metadata;
}

/**
 * Whose call this is, or null when it does not carry the mesh secret (answer `UNAUTHENTICATED`). Takes the same time whatever the token.
 */
export function authenticate(metadata: Metadata, secret: string): { caller: string } | null {
  const tokens = metadata.get(tokenKey);
  const callers = metadata.get(callerKey);
  const given = tokens.length === 1 ? String(tokens[0]) : '';
  // Digests have one length, so the comparison does not tell how long the secret is.
  if (secret === '' || !timingSafeEqual(digest(given), digest(`Bearer ${secret}`))) return null;
  return callers.length === 1 ? { caller: String(callers[0]) } : null;
}

/** What a listener knows a call by. */
export interface IncomingCall {
  metadata: Metadata;
  getAuthContext(): { sslPeerCertificate?: { subjectaltname?: string } } | null;
}

/**
 * The worker whose call this is, or null (answer `UNAUTHENTICATED`): the call carries the mesh secret and, over TLS, the certificate of the worker it says to be.
 */
export function callingWorker(
  call: IncomingCall,
  { secret, mesh, tls }: { secret: string; mesh: MeshId; tls: TlsIdentity | null },
): string | null {
  const caller = authenticate(call.metadata, secret)?.caller;
  if (caller === undefined || tls === null) return caller ?? null;
  const certified = call.getAuthContext()?.sslPeerCertificate?.subjectaltname;
  return isId(caller) && certified === `DNS:${workerName(mesh, caller as WorkerId)}` ? caller : null;
}

const digest = (text: string): Buffer => createHash('sha256').update(text).digest();
