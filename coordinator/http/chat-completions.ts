/** POST /v1/chat/completions */
import type { FastifyInstance } from 'fastify';
import { ShardmeshError } from '../../protocol/errors.ts';
import type { FinishReason } from '../engine/engine-types.ts';
import type { ChatMessage } from '../text/text-types.ts';
import { checkBody } from './errors.ts';
import { chatLogprob } from './logprobs.ts';
import { engineRequest } from './request-parameters.ts';
import { runRequests, usage, usageSoFar } from './run-request.ts';
import { chatSchema, type MessageBody } from './schemas.ts';
import { checkModel, requestContext, type HttpServerOptions } from './server.ts';
import { streamReply } from './stream-reply.ts';

export function chatMessages(messages: readonly MessageBody[]): ChatMessage[] {
  return messages.map((message, index) => {
    const { content } = message;
    if (content === undefined || content === null) {
      if (message.role !== 'assistant' || !message.tool_calls)
        throw new ShardmeshError('missing_field', `messages[${index}].content: a string is needed.`, {
          param: `messages[${index}].content`,
        });
    }
    return {
      role: message.role === 'developer' ? 'system' : message.role,
      content: typeof content === 'string' ? content : (content ?? []).map((part) => part.text).join(''),
      ...(message.name === undefined ? {} : { name: message.name }),
      ...(message.tool_calls === undefined ? {} : { tool_calls: message.tool_calls }),
      ...(message.tool_call_id === undefined ? {} : { tool_call_id: message.tool_call_id }),
    };
  });
}

interface Choice {
  text: string;
  logprobs: ReturnType<typeof chatLogprob>[];
  reason: FinishReason | null;
}

export function chatCompletions(app: FastifyInstance, options: HttpServerOptions): void {
  const { text, model } = options;
  app.post('/v1/chat/completions', async (request, reply) => {
    const body = checkBody(chatSchema, request.body);
    checkModel(model, body.model);
    if (body.top_logprobs !== undefined && body.top_logprobs > 0 && !body.logprobs)
      throw new ShardmeshError('invalid_value', 'top_logprobs needs logprobs to be true.', { param: 'top_logprobs' });
    const { tokens } = await text.encodeChat(chatMessages(body.messages), {
      addGenerationPrompt: true,
      tokensMax: model.contextTokensMax,
    });
    const engineInput = engineRequest(body, model, requestContext(request), {
      promptTokens: tokens,
      promptParam: 'messages',
      outputTokensMax: body.max_completion_tokens ?? body.max_tokens,
      logprobs: body.logprobs ? (body.top_logprobs ?? 0) : null,
      promptLogprobs: null,
    });
    const head = { id: `chatcmpl-${engineInput.id}`, created: Math.floor(Date.now() / 1000), model: model.id };

    if (body.stream) {
      const chunk = (index: number, delta: object, reason: FinishReason | null, logprobs: object | null) => ({
        ...head,
        object: 'chat.completion.chunk',
        choices: [{ index, delta, logprobs, finish_reason: reason }],
        ...usageSoFar(body.stream_options, request.summary),
      });
      return streamReply(request, reply, options, async (sse) => {
        const begun = new Set<number>();
        const begin = async (choice: number): Promise<void> => {
          if (begun.has(choice)) return;
          begun.add(choice);
          await sse.send(chunk(choice, { role: 'assistant', content: '' }, null, null));
        };
        await runRequests(options, [engineInput], request, async (_, event) => {
          switch (event.type) {
            case 'prompt':
              return;
            case 'token': {
              await begin(event.choice);
              const logprobs = event.logprob ? { content: [chatLogprob(text, event.logprob)], refusal: null } : null;
              if (event.text !== '' || logprobs) await sse.send(chunk(event.choice, { content: event.text }, null, logprobs));
              return;
            }
            case 'finished':
              await begin(event.choice);
              if (event.text !== '') await sse.send(chunk(event.choice, { content: event.text }, null, null));
              await sse.send(chunk(event.choice, {}, event.reason, null));
              return;
            default:
              event satisfies never;
          }
        });
        if (body.stream_options?.include_usage)
          await sse.send({ ...head, object: 'chat.completion.chunk', choices: [], usage: usage(request.summary) });
      });
    }

    const choices = Array.from({ length: engineInput.n }, (): Choice => ({ text: '', logprobs: [], reason: null }));
    await runRequests(options, [engineInput], request, (_, event) => {
      if (event.type === 'prompt') return;
      const choice = choices[event.choice];
      if (!choice) return;
      choice.text += event.text;
      if (event.type === 'token') {
        if (event.logprob) choice.logprobs.push(chatLogprob(text, event.logprob));
      } else choice.reason = event.reason;
    });
    return {
      ...head,
      object: 'chat.completion',
      choices: choices.map((choice, index) => ({
        index,
        message: { role: 'assistant', content: choice.text, refusal: null },
        logprobs: body.logprobs ? { content: choice.logprobs, refusal: null } : null,
        finish_reason: choice.reason,
      })),
      usage: usage(request.summary),
    };
  });
}
