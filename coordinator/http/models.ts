/** GET /v1/models and /v1/models/:id */
import type { FastifyInstance } from 'fastify';
import { checkModel, type HttpServerOptions, type ServedModel } from './server.ts';

const describeModel = (model: ServedModel) => ({
  id: model.id,
  object: 'model',
  created: model.created,
  owned_by: 'shardmesh',
  max_model_len: model.contextTokensMax,
});

export function models(app: FastifyInstance, { model }: HttpServerOptions): void {
  app.get('/v1/models', async () => ({ object: 'list', data: [describeModel(model)] }));
  app.get<{ Params: { id: string } }>('/v1/models/:id', async (request) => {
    checkModel(model, request.params.id);
    return describeModel(model);
  });
}
