/** Fetches a weight slice from the coordinator, over gRPC, from any byte offset; a broken connection is taken up again where it stopped. */
import { status, type ClientReadableStream, type ServiceError } from '@grpc/grpc-js';
import { slicePartBytes } from '../../kernels/model-file/slice.ts';
import { ShardmeshError } from '../../protocol/errors.ts';
import { createGrpcClient, openWeightsFetch } from '../../protocol/grpc/index.ts';
import type { TlsIdentity } from '../../protocol/tls.ts';

export interface SliceFetchOptions {
  /** host:port of the coordinator's weight server. */
  server: string;
  secret: string;
  /** Own certificate, and the name that the coordinator's must carry; null: plaintext on loopback. */
  tls: { identity: TlsIdentity; serverName: string } | null;
  /** Own worker id. */
  caller: string;
  slice: { address: string; bytes: number };
  offset: number;
  signal?: AbortSignal;
  /** No part for this long ends one try. */
  stallTimeoutMs?: number;
  /** Tries in a row without a byte. */
  triesMax?: number;
  /** Pause before the n-th try in a row: n * this. */
  backoffMs?: number;
}

/** One try may last this long; what it brought is kept. */
const tryTimeoutMs = 600_000;

/** What asking again does not change. */
const finalCodes: ReadonlySet<number> = new Set([
  status.UNAUTHENTICATED,
  status.PERMISSION_DENIED,
  status.NOT_FOUND,
  status.INVALID_ARGUMENT,
  status.OUT_OF_RANGE,
  status.UNIMPLEMENTED,
  status.DATA_LOSS,
]);

/**
 * The slice's bytes from `offset` to its end, in parts of at most 256 KiB. The next part is asked for when the last one is taken.
 * @throws {ShardmeshError} `load_failed`, naming the server and why
 */
export async function* fetchSlice(options: SliceFetchOptions): AsyncGenerator<Buffer, void, undefined> {
  const { server, slice, signal, triesMax = 6, backoffMs = 250 } = options;
  let position = options.offset;
  let failures = 0;
  while (position < slice.bytes) {
    signal?.throwIfAborted();
    try {
      for await (const part of oneTry(options, position)) {
        if (part.length === 0 || part.length > slicePartBytes || position + part.length > slice.bytes)
          throw new ShardmeshError(
            'load_failed',
            `coordinator ${server} sent a part of ${part.length} bytes at ${position}, limit ${Math.min(slicePartBytes, slice.bytes - position)}`,
          );
        failures = 0;
        yield part;
        position += part.length;
      }
      if (position < slice.bytes) throw new Error(`it ended at byte ${position} of ${slice.bytes}`);
    } catch (error) {
      signal?.throwIfAborted();
      if (error instanceof ShardmeshError) throw error;
      const { code, details, message } = error as Partial<ServiceError> & Error;
      failures++;
      if ((code !== undefined && finalCodes.has(code)) || failures >= triesMax)
        throw new ShardmeshError(
          'load_failed',
          `slice ${slice.address.slice(0, 12)} could not be fetched from coordinator ${server} (at byte ${position} of ${slice.bytes}, try ${failures}): ${details || message}`,
          { cause: error },
        );
      await new Promise((resolve) => setTimeout(resolve, failures * backoffMs));
    }
  }
}

async function* oneTry(options: SliceFetchOptions, offset: number): AsyncGenerator<Buffer, void, undefined> {
  const { server, secret, tls, caller, slice, signal, stallTimeoutMs = 15_000 } = options;
  const client = createGrpcClient(server, tls?.identity, tls?.serverName);
  const request = Buffer.from(JSON.stringify({ slice: slice.address, offset }));
  const call: ClientReadableStream<Buffer> = openWeightsFetch(client, secret, caller, request, tryTimeoutMs);
  const cancel = (): void => call.cancel();
  signal?.addEventListener('abort', cancel, { once: true });
  let timer = setTimeout(cancel, stallTimeoutMs);
  try {
    for await (const part of call) {
      clearTimeout(timer);
      yield part as Buffer;
      // Runs only while we wait for the other end, not while the part is written to disk.
      timer = setTimeout(cancel, stallTimeoutMs);
    }
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener('abort', cancel);
    call.cancel();
    client.close();
  }
}
