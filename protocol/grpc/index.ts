export { linkService, linkStream, weightsFetch, weightsService } from './services.ts';
export {
  authenticate,
  bindLoopback,
  callMetadata,
  channelOptions,
  createGrpcClient,
  createGrpcServer,
  openLinkStream,
  openWeightsFetch,
} from './channel.ts';
