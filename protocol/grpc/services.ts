/**
 * The two gRPC services between processes of a mesh. Bodies are raw bytes, there is no schema compiler: frames are `frame-codec.ts`, requests of weights
 * are defined by who serves them. One bidirectional stream per pair of workers, never a unary call per step (that costs a millisecond each).
 */
import type { MethodDefinition, ServiceDefinition } from '@grpc/grpc-js';

const identity = (value: Buffer): Buffer => value;

const rawMethod = (path: string, requestStream: boolean, responseStream: boolean): MethodDefinition<Buffer, Buffer> => ({
  path,
  requestStream,
  responseStream,
  requestSerialize: identity,
  requestDeserialize: identity,
  responseSerialize: identity,
  responseDeserialize: identity,
});

/** Frames both ways between two workers. */
export const linkStream = rawMethod('/shardmesh.Link/Stream', true, true);
/** Parts of a weight slice: one request, a stream of parts. */
export const weightsFetch = rawMethod('/shardmesh.Weights/Fetch', false, true);

export const linkService = { Stream: linkStream } satisfies ServiceDefinition;
export const weightsService = { Fetch: weightsFetch } satisfies ServiceDefinition;
