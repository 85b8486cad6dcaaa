/** Sends a workload to a server, in a closed or an open loop, and keeps what came back of each request. */
import { arrivals, type Load } from './arrivals.ts';
import type { ChatMessage, CompletionClient, Prompt } from './completion-client.ts';
import { Random } from './random.ts';
import type { RequestRecord } from './request-record.ts';
import type { Turn, Workload } from './workload.ts';

export interface RunOptions {
  load: Load;
  seed: number;
  /** As messages to /v1/chat/completions. */
  chat: boolean;
  /** Sending ends with whichever comes first; requests that are out then are awaited. null: no limit. */
  requestsMax: number | null;
  secondsMax: number | null;
  onProgress: (live: LiveFigures) => void;
}

export interface LoadRun {
  load: Load;
  startedAt: number;
  /** Sending had ended and, without a limit of time, every answer had come. Tokens after it count for no rate. */
  endedAt: number;
  records: RequestRecord[];
  /** Processor time of this process over the run, as a share of one core. */
  clientCpuShare: number;
}

export interface LiveFigures {
  seconds: number;
  running: number;
  finished: number;
  failed: number;
  outputTokens: number;
  /** Of the requests finished last. */
  ttftMs: number | null;
}

const progressMs = 250;

/** Warm-up: requests whose records are thrown away, in a closed loop like the one to come. */
export async function warmUp(
  client: CompletionClient,
  workload: Workload,
  { requests, streams, chat }: { requests: number; streams: number; chat: boolean },
): Promise<void> {
  await runLoad(client, workload, {
    load: { kind: 'closed', streams: Math.min(streams, requests) },
    seed: 0,
    chat,
    requestsMax: requests,
    secondsMax: null,
    onProgress: () => undefined,
  });
}

export async function runLoad(client: CompletionClient, workload: Workload, options: RunOptions): Promise<LoadRun> {
  const { load, chat, requestsMax, secondsMax } = options;
  const records: RequestRecord[] = [];
  const startedAt = performance.now();
  const cpu = process.cpuUsage();
  const deadline = secondsMax === null ? Infinity : startedAt + secondsMax * 1000;
  let sent = 0;
  let failed = 0;
  let finishedTokens = 0;
  const running = new Set<Promise<void>>();

  const mayTake = (): boolean => (requestsMax === null || sent < requestsMax) && performance.now() < deadline;
  /** One conversation, turn after turn; ends early when a turn fails or the time is up. */
  const converse = async (turns: Turn[], dueAt: number): Promise<void> => {
    let prompt: Prompt = chat ? [] : '';
    for (const [index, { text, outputTokens }] of turns.entries()) {
      if (index > 0 && !mayTake()) return;
      sent++;
      prompt = withQuestion(prompt, text);
      const answer = await client.stream(prompt, outputTokens);
      // Later turns follow on an answer: they are due when they are sent.
      records.push({ ...answer, dueAt: index === 0 ? dueAt : answer.sentAt, outputTokensAsked: outputTokens });
      finishedTokens += answer.usage?.outputTokens ?? answer.chunkAt.length;
      if (answer.error !== null) {
        failed++;
        return;
      }
      prompt = withAnswer(prompt, answer.text);
    }
  };
  const track = (conversation: Promise<void>): void => {
    const tracked = conversation.finally(() => running.delete(tracked));
    running.add(tracked);
  };
  const progress = setInterval(() => {
    const last = records.at(-1);
    options.onProgress({
      seconds: (performance.now() - startedAt) / 1000,
      running: sent - records.length,
      finished: records.length,
      failed,
      outputTokens: finishedTokens,
      ttftMs: last?.chunkAt[0] === undefined ? null : last.chunkAt[0] - last.dueAt,
    });
  }, progressMs);

  try {
    if (load.kind === 'closed') {
      const stream = async (): Promise<void> => {
        while (mayTake()) await converse(workload.conversation(null), performance.now());
      };
      await Promise.all(Array.from({ length: load.streams }, stream));
    } else {
      for (const { at, lengths } of arrivals(load, new Random(options.seed))) {
        const dueAt = startedAt + at * 1000;
        if (dueAt >= deadline || !mayTake()) break;
        const waitMs = dueAt - performance.now();
        if (waitMs > 0) await new Promise((resolve) => setTimeout(resolve, waitMs));
        track(converse(workload.conversation(lengths), dueAt));
      }
      await Promise.all(running);
    }
  } finally {
    clearInterval(progress);
  }
  const now = performance.now();
  const { user, system } = process.cpuUsage(cpu);
  return {
    load,
    startedAt,
    endedAt: Math.min(now, deadline),
    records,
    clientCpuShare: (user + system) / 1000 / (now - startedAt),
  };
}

const withQuestion = (prompt: Prompt, text: string): Prompt =>
  typeof prompt === 'string'
    ? prompt === ''
      ? text
      : `${prompt} ${text}`
    : [...prompt, { role: 'user', content: text } satisfies ChatMessage];

const withAnswer = (prompt: Prompt, text: string): Prompt =>
  typeof prompt === 'string' ? prompt + text : [...prompt, { role: 'assistant', content: text } satisfies ChatMessage];
