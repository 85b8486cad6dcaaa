/** What our own mesh says of a run: `/metrics` before, during and after it. Other servers have no such page, or not these names; then there is nothing. */
export interface MeshFigures {
  steps: number;
  /** From one result to the next, mean, while there was work. */
  stepMs: number;
  /** Share of that time in which the last stage had nothing to compute though requests were there. */
  bubbleRatio: number;
  generationTokensPerStep: number;
  promptTokens: number;
  cachedTokens: number;
  preemptions: number;
  /** Tokens that were guessed from earlier text of their sequence, and those that were right. */
  draftTokens: number;
  draftTokensAccepted: number;
  /** Mean and most over the run, looked at once a second. */
  waiting: Level;
  running: Level;
  kvUsage: Level;
  shards: ShardFigures[];
}

export interface Level {
  mean: number;
  max: number;
}

export interface ShardFigures {
  worker: string;
  stage: number;
  rank: number;
  steps: number;
  /** Milliseconds a step: computing and reducing; what of it was waiting in reductions. */
  stepMs: number;
  syncMs: number;
  /** Beside that: waiting for the stage before, and having no step to run. */
  linkWaitMs: number;
  idleMs: number;
  /** Frames that left through a link; what goes through shared memory is neither sent nor counted. */
  bytesPerStep: number;
  messagesPerStep: number;
  rssBytes: number;
}

interface Sample {
  name: string;
  labels: Record<string, string>;
  value: number;
}

const sampleMs = 1_000;

/** The samples of a Prometheus page; lines it does not know are passed over. */
export function parseMetrics(text: string): Sample[] {
  const samples: Sample[] = [];
  for (const line of text.split('\n')) {
    const match = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match?.[1]) continue;
    const labels: Record<string, string> = {};
    for (const [, key, value] of (match[2] ?? '').matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) if (key) labels[key] = value ?? '';
    samples.push({ name: match[1], labels, value: Number(match[3]) });
  }
  return samples;
}

/** Reads the page until `finish`. */
export class MeshWatch {
  readonly #read: () => Promise<Sample[] | null>;
  readonly #before: Sample[];
  readonly #gauges: Sample[][];
  readonly #timer: NodeJS.Timeout;

  private constructor(read: () => Promise<Sample[] | null>, before: Sample[]) {
    this.#read = read;
    this.#before = before;
    this.#gauges = [before];
    this.#timer = setInterval(() => {
      void read().then((samples) => samples && this.#gauges.push(samples));
    }, sampleMs);
  }

  /** null: the server has no such page. */
  static async start(url: string, apiKey: string | null): Promise<MeshWatch | null> {
    const headers: Record<string, string> = apiKey === null ? {} : { authorization: `Bearer ${apiKey}` };
    const read = async (): Promise<Sample[] | null> => {
      try {
        const response = await fetch(`${url}/metrics`, { headers, signal: AbortSignal.timeout(5_000) });
        return response.ok ? parseMetrics(await response.text()) : null;
      } catch {
        return null;
      }
    };
    const before = await read();
    return before?.some(({ name }) => name === 'shardmesh_steps_total') ? new MeshWatch(read, before) : null;
  }

  /** null: the page was gone at the end. */
  async finish(): Promise<MeshFigures | null> {
    clearInterval(this.#timer);
    const after = await this.#read();
    return after && meshFigures(this.#before, after, [...this.#gauges, after]);
  }
}

export function meshFigures(before: Sample[], after: Sample[], during: Sample[][]): MeshFigures {
  const one = (samples: Sample[], name: string, worker?: string): number =>
    samples.find((sample) => sample.name === `shardmesh_${name}` && (worker === undefined || sample.labels['worker'] === worker))
      ?.value ?? 0;
  /** Growth over the run. A worker that was started anew counts from zero, so its sum may be lower than before: then it is all growth. */
  const grown = (name: string, worker?: string): number => {
    const [from, to] = [one(before, name, worker), one(after, name, worker)];
    return to >= from ? to - from : to;
  };
  const level = (name: string): Level => {
    const values = during.map((samples) => one(samples, name));
    return { mean: values.reduce((sum, value) => sum + value, 0) / values.length, max: Math.max(...values) };
  };
  const steps = grown('steps_total');
  const busy = grown('step_busy_seconds_total');
  const shards = after
    .filter(({ name }) => name === 'shardmesh_worker_steps_total')
    .map(({ labels }): ShardFigures => {
      const worker = labels['worker'] ?? '';
      const own = grown('worker_steps_total', worker);
      const perStep = (name: string): number => (own === 0 ? 0 : grown(`worker_${name}_total`, worker) / own);
      return {
        worker,
        stage: Number(labels['stage']),
        rank: Number(labels['rank']),
        steps: own,
        stepMs: 1000 * perStep('busy_seconds'),
        syncMs: 1000 * perStep('collective_seconds'),
        linkWaitMs: 1000 * perStep('link_wait_seconds'),
        idleMs: 1000 * perStep('idle_seconds'),
        bytesPerStep: perStep('bytes_out'),
        messagesPerStep: perStep('frames_out'),
        rssBytes: one(after, 'worker_rss_bytes', worker),
      };
    })
    .sort((a, b) => a.stage - b.stage || a.rank - b.rank);
  return {
    steps,
    stepMs: steps === 0 ? 0 : (1000 * busy) / steps,
    bubbleRatio: busy === 0 ? 0 : Math.min(1, grown('bubble_seconds_total') / busy),
    generationTokensPerStep: steps === 0 ? 0 : grown('generation_tokens_total') / steps,
    promptTokens: grown('prompt_tokens_total'),
    cachedTokens: grown('prompt_tokens_cached_total'),
    preemptions: grown('preemptions_total'),
    draftTokens: grown('spec_decode_num_draft_tokens_total'),
    draftTokensAccepted: grown('spec_decode_num_accepted_tokens_total'),
    waiting: level('num_requests_waiting'),
    running: level('num_requests_running'),
    kvUsage: level('kv_cache_usage_ratio'),
    shards,
  };
}
