/** Options, clients and the token check that the link and the weight service share. Listeners bind to loopback; other hosts need TLS first. */
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
import { ShardmeshError } from '../errors.ts';
import { grpcLimits } from '../limits.ts';
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

/**
 * Binds to a free loopback port.
 * @returns host:port to give to peers
 * @throws {ShardmeshError} `config_invalid`: the port is taken, or the address does not exist here
 */
export async function bindLoopback(server: Server, port = 0): Promise<string> {
  const bound = await new Promise<number>((resolve, reject) => {
    server.bindAsync(`127.0.0.1:${port}`, ServerCredentials.createInsecure(), (error, boundPort) => {
      if (error)
        reject(
          new ShardmeshError('config_invalid', `cannot listen on 127.0.0.1:${port} for gRPC: ${error.message}`, { cause: error }),
        );
      else resolve(boundPort);
    });
  });
  return `127.0.0.1:${bound}`;
}

/** A channel to host:port. Connects by itself when used; `close()` ends it. */
export const createGrpcClient = (address: string): Client => new Client(address, credentials.createInsecure(), channelOptions);

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

const digest = (text: string): Buffer => createHash('sha256').update(text).digest();
