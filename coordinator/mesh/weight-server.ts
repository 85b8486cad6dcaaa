/**
 * Gives workers that do not have the model file their slice of it, and nothing else: a slice must have been offered (it belongs to a rank of a placement), and the
 * call must carry the mesh secret. Row-parallel matrices are cut here, so that a worker reads one stream and not thousands of ranges.
 */
import { open } from 'node:fs/promises';
import { status, type handleServerStreamingCall, type Server, type ServerWritableStream } from '@grpc/grpc-js';
import { sliceParts, type Slice } from '../../kernels/model-file/slice.ts';
import { bindGrpc, callingWorker, createGrpcServer, weightsService, type GrpcListener } from '../../protocol/grpc/index.ts';
import type { MeshId } from '../../protocol/ids.ts';
import { grpcLimits } from '../../protocol/limits.ts';
import type { TlsIdentity } from '../../protocol/tls.ts';

export interface WeightServerEvents {
  /** A slice has been sent to its end, or the worker left. */
  onSent?: (sent: { caller: string; slice: string; offset: number; bytes: number; complete: boolean }) => void;
  /** A call was turned away. */
  onRefused?: (refused: { caller: string | null; reason: string }) => void;
}

interface Offer {
  slice: Slice;
  path: string;
}

/** What a call must show: the secret of the mesh and, with `tls`, the certificate of the worker it comes from. */
export interface WeightServerAccess {
  secret: string;
  mesh: MeshId;
  tls: TlsIdentity | null;
}

type FetchCall = ServerWritableStream<Buffer, Buffer>;

export class WeightServer {
  /** Bytes sent since the start. */
  bytesSent = 0;
  readonly #access: WeightServerAccess;
  readonly #calls = new Map<FetchCall, string>();
  readonly #refusedWorkers = new Set<string>();
  readonly #events: WeightServerEvents;
  readonly #offers = new Map<string, Offer>();
  readonly #server: Server = createGrpcServer();

  constructor(access: WeightServerAccess, events: WeightServerEvents = {}) {
    if (access.secret.length < 16) throw new RangeError(`the mesh secret has ${access.secret.length} characters, limit 16`);
    this.#access = access;
    this.#events = events;
    const fetch: handleServerStreamingCall<Buffer, Buffer> = (call) => void this.#serve(call);
    this.#server.addService(weightsService, { Fetch: fetch });
  }

  /** @returns host:port for `assign.weightsAddress` */
  listen(listener: Omit<GrpcListener, 'tls'> = {}): Promise<string> {
    return bindGrpc(this.#server, { ...listener, tls: this.#access.tls });
  }

  /** A revoked worker: its running transfers end now, and no other begins. */
  refuseWorker(worker: string): void {
    this.#refusedWorkers.add(worker);
    for (const [call, caller] of this.#calls)
      if (caller === worker) refuseCall(call, status.PERMISSION_DENIED, 'this worker was revoked');
  }

  /** Workers may fetch this slice of the model file at `path` from now on. */
  offer(slice: Slice, path: string): void {
    this.#offers.set(slice.address, { slice, path });
  }

  withdraw(address: string): void {
    this.#offers.delete(address);
  }

  /** Ends running transfers; workers take them up again when a server is back. */
  close(): void {
    this.#server.forceShutdown();
  }

  async #serve(call: FetchCall): Promise<void> {
    const caller = callingWorker(call, this.#access);
    const refuse = (code: status, reason: string): void => {
      this.#events.onRefused?.({ caller, reason });
      refuseCall(call, code, reason);
    };
    if (caller === null)
      return refuse(status.UNAUTHENTICATED, 'the call does not carry the secret, or the certificate, of a worker of this mesh');
    if (this.#refusedWorkers.has(caller)) return refuse(status.PERMISSION_DENIED, 'this worker was revoked');
    const request = parseRequest(call.request);
    if (request === null) return refuse(status.INVALID_ARGUMENT, 'a request is {"slice": sha256, "offset": bytes}');
    const offer = this.#offers.get(request.slice);
    if (!offer) return refuse(status.NOT_FOUND, `slice ${request.slice.slice(0, 12)} is of no rank of this placement`);
    if (request.offset > offer.slice.bytes)
      return refuse(status.OUT_OF_RANGE, `offset ${request.offset} is past the slice's ${offer.slice.bytes} bytes`);
    let bytes = 0;
    this.#calls.set(call, caller);
    try {
      bytes = await send(call, offer, request.offset, (sent) => (this.bytesSent += sent));
      call.end();
    } catch (error) {
      // The path stays here: a worker has no use for it.
      refuse(
        status.DATA_LOSS,
        `the model file could not be read: ${(error as NodeJS.ErrnoException).code ?? (error as Error).name}`,
      );
    } finally {
      this.#calls.delete(call);
    }
    const complete = request.offset + bytes === offer.slice.bytes;
    this.#events.onSent?.({ caller, slice: request.slice, offset: request.offset, bytes, complete });
  }
}

/** As the library wants it: `destroy(error)` would end the call without a status. */
function refuseCall(call: FetchCall, code: status, reason: string): void {
  call.emit('error', Object.assign(new Error(reason), { code, details: reason }));
}

function parseRequest(body: Buffer): { slice: string; offset: number } | null {
  if (body.length > grpcLimits.weightRequestBytesMax) return null;
  try {
    const value = JSON.parse(body.toString('utf8')) as { slice?: unknown; offset?: unknown } | null;
    const { slice, offset } = value ?? {};
    if (typeof slice !== 'string' || !/^[0-9a-f]{64}$/.test(slice)) return null;
    if (typeof offset !== 'number' || !Number.isSafeInteger(offset) || offset < 0) return null;
    return { slice, offset };
  } catch {
    return null;
  }
}

/** Sends parts as fast as the worker takes them. @returns bytes sent; fewer than all when the worker left */
async function send(call: FetchCall, { slice, path }: Offer, offset: number, onSent: (bytes: number) => void): Promise<number> {
  const file = await open(path, 'r');
  let bytes = 0;
  try {
    for await (const part of sliceParts(file, slice, offset)) {
      if (call.cancelled || call.destroyed) break;
      const roomLeft = call.write(part);
      bytes += part.length;
      onSent(part.length);
      if (!roomLeft) await drained(call);
    }
    return bytes;
  } finally {
    await file.close();
  }
}

/** Resolves when the worker has taken what was written, or has gone. */
function drained(call: FetchCall): Promise<void> {
  return new Promise((resolve) => {
    const done = (): void => {
      for (const event of ['drain', 'cancelled', 'close', 'error']) call.off(event, done);
      resolve();
    };
    for (const event of ['drain', 'cancelled', 'close', 'error']) call.once(event, done);
    if (call.cancelled) done();
  });
}
