/**
 * Streams completions of any OpenAI-compatible server over keep-alive connections and notes when each piece of text came. Built on node:http directly: `fetch`
 * costs several times the processor time for each event.
 */
import { Agent, request, type ClientRequest, type IncomingMessage } from 'node:http';
import { Agent as SecureAgent, request as secureRequest } from 'node:https';
import { SseParser } from './sse-parser.ts';

export interface ChatMessage {
  role: 'system' | 'user' | 'assistant';
  content: string;
}

/** Text goes to /v1/completions, messages to /v1/chat/completions. */
export type Prompt = string | ChatMessage[];

export interface ClientOptions {
  /** `http://127.0.0.1:8080`, without `/v1`. */
  url: string;
  model: string;
  apiKey: string | null;
  /** From sending to the last byte. */
  timeoutMs: number;
  /** Fields that every request carries besides ours. */
  extraBody: Record<string, unknown>;
}

export interface Answer {
  /** `performance.now()`; so are all times here. */
  sentAt: number;
  /** When each chunk came that had text. */
  chunkAt: number[];
  endedAt: number;
  text: string;
  /** What the server says in `usage`; null when it says nothing. */
  usage: { promptTokens: number; outputTokens: number; cachedTokens: number } | null;
  /** null: answered whole. Else its kind, in few words: errors are counted by it. */
  error: string | null;
}

interface StreamEvent {
  error?: { code?: unknown; type?: unknown };
  choices?: { text?: string; delta?: { content?: string | null; reasoning_content?: string | null } }[];
  usage?: {
    prompt_tokens?: number;
    completion_tokens?: number;
    prompt_tokens_details?: { cached_tokens?: number } | null;
  } | null;
}

const errorBodyBytesMax = 64 * 1024;

export class CompletionClient {
  readonly #options: ClientOptions;
  readonly #agent: Agent;
  readonly #secure: boolean;

  constructor(options: ClientOptions) {
    this.#options = options;
    this.#secure = options.url.startsWith('https:');
    const keepAlive = { keepAlive: true, noDelay: true, maxSockets: Infinity, maxFreeSockets: 4096 };
    this.#agent = this.#secure ? new SecureAgent(keepAlive) : new Agent(keepAlive);
  }

  close(): void {
    this.#agent.destroy();
  }

  /** Never rejects: what went wrong is in the answer. */
  stream(prompt: Prompt, outputTokensMax: number, signal?: AbortSignal): Promise<Answer> {
    const { url, model, apiKey, timeoutMs, extraBody } = this.#options;
    const chat = typeof prompt !== 'string';
    const body = Buffer.from(
      JSON.stringify({
        model,
        ...(chat ? { messages: prompt } : { prompt }),
        max_tokens: outputTokensMax,
        temperature: 0,
        stream: true,
        stream_options: { include_usage: true },
        ...extraBody,
      }),
    );
    return new Promise((resolve) => {
      const answer: Answer = { sentAt: performance.now(), chunkAt: [], endedAt: 0, text: '', usage: null, error: null };
      let settled = false;
      const end = (error: string | null): void => {
        if (settled) return;
        settled = true;
        clearTimeout(timer);
        answer.endedAt = performance.now();
        answer.error ??= error;
        resolve(answer);
      };
      let outgoing: ClientRequest;
      const timer = setTimeout(() => {
        end('timeout');
        outgoing.destroy();
      }, timeoutMs);
      const send = (): void => {
        outgoing = (this.#secure ? secureRequest : request)(
          `${url}/v1/${chat ? 'chat/completions' : 'completions'}`,
          {
            method: 'POST',
            agent: this.#agent,
            ...(signal ? { signal } : {}),
            headers: {
              'content-type': 'application/json',
              'content-length': body.length,
              ...(apiKey === null ? {} : { authorization: `Bearer ${apiKey}` }),
            },
          },
          (response) => {
            if (response.statusCode === 200) readStream(response, answer, end);
            else readError(response, end);
          },
        );
        const sent = outgoing;
        sent.on('error', (error: NodeJS.ErrnoException) => {
          // The server ended an idle connection just as it was taken again, and knows nothing of this request: a new connection.
          if (sent.reusedSocket && error.code === 'ECONNRESET' && !settled && answer.chunkAt.length === 0) send();
          else end(signal?.aborted ? 'aborted' : (error.code ?? error.message));
        });
        sent.end(body);
      };
      send();
    });
  }
}

function readStream(response: IncomingMessage, answer: Answer, end: (error: string | null) => void): void {
  let done = false;
  let now = 0;
  const parser = new SseParser((data) => {
    if (data === '[DONE]') {
      done = true;
      return;
    }
    const event = JSON.parse(data) as StreamEvent;
    if (event.error) answer.error ??= `stream: ${kindOf(event.error)}`;
    const choice = event.choices?.[0];
    const text = choice?.text ?? choice?.delta?.content ?? choice?.delta?.reasoning_content ?? '';
    if (text !== '') {
      answer.chunkAt.push(now);
      answer.text += text;
    }
    if (event.usage)
      answer.usage = {
        promptTokens: event.usage.prompt_tokens ?? 0,
        outputTokens: event.usage.completion_tokens ?? 0,
        cachedTokens: event.usage.prompt_tokens_details?.cached_tokens ?? 0,
      };
  });
  response.on('data', (bytes: Buffer) => {
    now = performance.now();
    try {
      parser.push(bytes);
    } catch {
      end('stream: not server-sent events of JSON');
      response.destroy();
    }
  });
  response.on('end', () => end(done ? null : 'stream: cut short'));
  response.on('error', (error: NodeJS.ErrnoException) => end(error.code ?? error.message));
}

function readError(response: IncomingMessage, end: (error: string) => void): void {
  let text = '';
  response.setEncoding('utf8');
  response.on('data', (part: string) => {
    if (text.length < errorBodyBytesMax) text += part;
  });
  response.on('end', () => {
    let kind = '';
    try {
      const { error } = JSON.parse(text) as { error?: { code?: unknown; type?: unknown } };
      kind = error ? ` ${kindOf(error)}` : '';
    } catch {
      // Proxies answer in HTML: the status is all that is known.
    }
    end(`HTTP ${response.statusCode}${kind}`);
  });
  response.on('error', (error: NodeJS.ErrnoException) => end(error.code ?? error.message));
}

/** Codes are texts with us and numbers with others; either is good enough to count by. */
function kindOf({ code, type }: { code?: unknown; type?: unknown }): string {
  const known = [code, type].find((value) => typeof value === 'string' || typeof value === 'number');
  return known === undefined ? 'error' : String(known);
}
