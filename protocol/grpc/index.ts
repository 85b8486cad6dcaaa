export { linkService, linkStream, weightsFetch, weightsService } from './services.ts';
export {
  authenticate,
  bindGrpc,
  callMetadata,
  callingWorker,
  channelOptions,
  createGrpcClient,
  createGrpcServer,
  openLinkStream,
  openWeightsFetch,
} from './channel.ts';
export type { GrpcListener } from './channel.ts';
