/** POST /v1/completions: one or several prompts, as text or token ids. Special tokens spelled in a prompt are parsed. */
import type { FastifyInstance } from 'fastify';
import { ShardmeshError } from '../../protocol/errors.ts';
import type { FinishReason, TokenLogprob } from '../engine/engine-types.ts';
import type { TextModel } from '../text/text-types.ts';
import { checkBody } from './errors.ts';
import { CompletionLogprobs } from './logprobs.ts';
import { engineRequest } from './request-parameters.ts';
import { runRequests, usage, usageSoFar } from './run-request.ts';
import { completionSchema, type Prompt } from './schemas.ts';
import { checkModel, requestContext, type HttpServerOptions } from './server.ts';
import { streamReply } from './stream-reply.ts';

/** Each prompt as token ids. */
async function promptTokens(prompt: Prompt, text: TextModel, tokensMax: number): Promise<number[][]> {
  const encode = (one: string) => text.encode(one, { special: 'parse', addBos: true, tokensMax });
  if (typeof prompt === 'string') return [await encode(prompt)];
  const [first] = prompt;
  if (typeof first === 'number') return [prompt as number[]];
  if (typeof first === 'string') return Promise.all((prompt as string[]).map(encode));
  return prompt as number[][];
}

/** Log-probabilities of a long echoed prompt are streamed in several events, so that none is much larger than the buffer of a stream. */
const echoTokensPerChunk = 64;

interface Choice {
  text: string;
  logprobs: CompletionLogprobs;
  reason: FinishReason | null;
}

export function completions(app: FastifyInstance, options: HttpServerOptions): void {
  const { text, model } = options;
  app.post('/v1/completions', async (request, reply) => {
    const body = checkBody(completionSchema, request.body);
    checkModel(model, body.model);
    const prompts = await promptTokens(body.prompt, text, model.contextTokensMax);
    if (prompts.length * (body.n ?? 1) > 64)
      throw new ShardmeshError('invalid_value', `${prompts.length} prompts with n = ${body.n ?? 1} make more than 64 choices.`, {
        param: 'n',
      });
    const wantsLogprobs = body.logprobs !== undefined;
    const echo = body.echo ?? false;
    const context = requestContext(request);
    const requests = prompts.map((tokens, index) =>
      engineRequest(body, model, prompts.length === 1 ? context : { ...context, requestId: `${context.requestId}-${index}` }, {
        promptTokens: tokens,
        promptParam: 'prompt',
        // Without max_tokens: OpenAI's 16, or what fits.
        outputTokensMax: body.max_tokens ?? Math.max(1, Math.min(16, model.contextTokensMax - tokens.length)),
        logprobs: body.logprobs ?? null,
        promptLogprobs: echo && wantsLogprobs ? (body.logprobs ?? 0) : null,
      }),
    );
    const n = body.n ?? 1;
    const head = {
      id: `cmpl-${context.requestId}`,
      object: 'text_completion',
      created: Math.floor(Date.now() / 1000),
      model: model.id,
    };
    const echoText = (index: number): string => (echo ? text.decode(prompts[index] ?? [], { special: true }) : '');
    const echoLogprobs = (index: number, promptLogprobs: (TokenLogprob | null)[] | null): CompletionLogprobs => {
      const logprobs = new CompletionLogprobs(text);
      if (promptLogprobs) prompts[index]?.forEach((token, position) => logprobs.push(token, promptLogprobs[position] ?? null));
      return logprobs;
    };

    if (body.stream) {
      const chunk = (index: number, piece: string, reason: FinishReason | null, logprobs: CompletionLogprobs | null) => ({
        ...head,
        choices: [{ index, text: piece, logprobs, finish_reason: reason }],
        ...usageSoFar(body.stream_options, request.summary),
      });
      return streamReply(request, reply, options, async (sse) => {
        const offsets = new Map<number, number>();
        await runRequests(options, requests, request, async (promptIndex, event) => {
          if (event.type === 'prompt') {
            if (!echo) return;
            const whole = echoText(promptIndex);
            const parts = wantsLogprobs ? echoLogprobs(promptIndex, event.promptLogprobs).slices(echoTokensPerChunk) : [null];
            for (let choice = 0; choice < n; choice++) {
              const index = promptIndex * n + choice;
              offsets.set(index, parts.at(-1)?.end ?? whole.length);
              for (const [at, logprobs] of parts.entries()) await sse.send(chunk(index, at === 0 ? whole : '', null, logprobs));
            }
            return;
          }
          const index = promptIndex * n + event.choice;
          if (event.type === 'token') {
            let logprobs: CompletionLogprobs | null = null;
            if (event.logprob) {
              const offset = offsets.get(index) ?? 0;
              logprobs = new CompletionLogprobs(text, offset);
              logprobs.push(event.token, event.logprob);
              offsets.set(index, logprobs.end);
            }
            if (event.text !== '' || logprobs) await sse.send(chunk(index, event.text, null, logprobs));
          } else await sse.send(chunk(index, event.text, event.reason, null));
        });
        if (body.stream_options?.include_usage) await sse.send({ ...head, choices: [], usage: usage(request.summary) });
      });
    }

    const choices = Array.from({ length: prompts.length * n }, (_, index): Choice => {
      const promptIndex = Math.floor(index / n);
      return { text: echoText(promptIndex), logprobs: new CompletionLogprobs(text), reason: null };
    });
    await runRequests(options, requests, request, (promptIndex, event) => {
      if (event.type === 'prompt') {
        if (echo && wantsLogprobs)
          for (let choice = 0; choice < n; choice++) {
            const one = choices[promptIndex * n + choice];
            if (one) one.logprobs = echoLogprobs(promptIndex, event.promptLogprobs);
          }
        return;
      }
      const choice = choices[promptIndex * n + event.choice];
      if (!choice) return;
      choice.text += event.text;
      if (event.type === 'token') {
        if (event.logprob) choice.logprobs.push(event.token, event.logprob);
      } else choice.reason = event.reason;
    });
    return {
      ...head,
      choices: choices.map((choice, index) => ({
        index,
        text: choice.text,
        logprobs: wantsLogprobs ? choice.logprobs : null,
        finish_reason: choice.reason,
      })),
      usage: usage(request.summary),
    };
  });
}
