/** POST /tokenize and /detokenize */
import type { FastifyInstance } from 'fastify';
import { ShardmeshError } from '../../protocol/errors.ts';
import { chatMessages } from './chat-completions.ts';
import { checkBody } from './errors.ts';
import { detokenizeSchema, tokenizeSchema } from './schemas.ts';
import { checkModel, type HttpServerOptions } from './server.ts';

export function tokenize(app: FastifyInstance, { text, model }: HttpServerOptions): void {
  const tokensMax = model.contextTokensMax;
  app.post('/tokenize', async (request) => {
    const body = checkBody(tokenizeSchema, request.body);
    if (body.model !== undefined) checkModel(model, body.model);
    if ((body.prompt === undefined) === (body.messages === undefined))
      throw new ShardmeshError('invalid_value', 'Exactly one of prompt and messages is needed.', { param: 'prompt' });
    const tokens = body.messages
      ? (
          await text.encodeChat(chatMessages(body.messages), {
            addGenerationPrompt: body.add_generation_prompt ?? true,
            tokensMax,
          })
        ).tokens
      : await text.encode(body.prompt ?? '', { special: 'parse', addBos: body.add_special_tokens ?? true, tokensMax });
    return { count: tokens.length, max_model_len: model.contextTokensMax, tokens };
  });

  app.post('/detokenize', async (request) => {
    const body = checkBody(detokenizeSchema, request.body);
    const { tokens, model: name } = body;
    if (name !== undefined) checkModel(model, name);
    const wrong = tokens.find((token) => token >= model.vocabularySize);
    if (wrong !== undefined)
      throw new ShardmeshError(
        'invalid_value',
        `tokens: token id ${wrong} is not in the vocabulary (0..${model.vocabularySize - 1}).`,
        { param: 'tokens' },
      );
    return { prompt: text.decode(tokens, { special: true }) };
  });
}
