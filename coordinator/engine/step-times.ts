/**
 * What steps take, learned from those that came back, and what follows for the next one: how many prompt tokens it may have so that first tokens come soon and
 * the streams that decode keep their pace. Pure.
 *
 *   ms of a step  ~  decodeMs(rows)  +  prefill tokens * tokenMs       tokenMs is of the latest chunks: it grows with the position in the prompt
 */
import type { PromptDemand } from '../scheduler/scheduler.ts';

const rowsWeight = 0.1;
const tokenWeight = 0.3;
/** A chunk this small is no measure of what a token costs: it rides along. */
const measuredTokensMin = 8;
const tokenMsMin = 1e-6;
/**
 * A chunk never is smaller: a step of a few rows more than a kernel's small batch takes as long as one of many more, so that chunks of 8 beside 16 decode rows
 * delayed the prompt by half and spared the streams nothing (Xeon).
 */
const chunkTokensMin = 12;
/** Before anything was measured. */
const chunkTokensFirst = 64;
/** Without a target of its own, prefill may make decode steps this much longer ... */
const stretch = 1.5;
/** ... and in any case up to 50 tokens a second for each stream: faster than anybody reads. */
export const unnoticedMs = 20;
/**
 * ... and where many prompts wait beside few streams, by this much for each prompt that waits for a stream: with 16 requests at once those that come last do not wait for
 * the pace of those that came first ...
 */
const stretchForWaiting = 4;
/**
 * ... up to 10 tokens a second for each stream, still faster than most read. A short prompt is computed in steps of this length from the start, mostly in one: a stream that
 * waits this long for a token now and then loses less than a request that waits for the pace of all streams, and whose successors queue behind it meanwhile.
 */
const bearableMs = 100;
/**
 * Between two steps that complete short prompts the streams have steps for themselves, of together this share of what the prompts took and two at most. Streams that begin in
 * steps next to each other end in steps next to each other; each successor then comes when the step with the prompt of the one before has begun, and waits for two prompts.
 * Three steps apart it finds none before its own: one step runs when it comes, and one is planned.
 */
const shareBetween = 0.5;
const stepsBetweenMax = 2;
/** Prompts that take longer go at the pace of the streams. */
const shortPromptMs = 400;

/** Mean milliseconds by rows; told apart are powers of two: 1, 2, 3..4, 5..8 ... */
export class RowTimes {
  readonly #ms: (number | undefined)[] = [];

  observe(rows: number, ms: number): void {
    const index = classOf(rows);
    const before = this.#ms[index];
    this.#ms[index] = before === undefined ? ms : before + rowsWeight * (ms - before);
  }

  /** Of this many rows; of the most similar number seen when there was none. Null: nothing seen. */
  of(rows: number): number | null {
    const index = classOf(rows);
    for (let distance = 0; distance < Math.max(this.#ms.length, index + 1); distance++) {
      const ms = this.#ms[index - distance] ?? this.#ms[index + distance];
      if (ms !== undefined) return ms;
    }
    return null;
  }

  /** All shrink to this share of what they are, so that what once was slow is tried again. */
  fade(share: number): void {
    for (const [index, ms] of this.#ms.entries()) if (ms !== undefined) this.#ms[index] = share * ms;
  }
}

const classOf = (rows: number): number => Math.ceil(Math.log2(rows));

export class StepTimes {
  readonly #decode = new RowTimes();
  #tokenMs: number | null = null;

  observe({ decodeRows, prefillTokens, ms }: { decodeRows: number; prefillTokens: number; ms: number }): void {
    if (prefillTokens === 0 && decodeRows > 0) {
      this.#decode.observe(decodeRows, ms);
    } else if (prefillTokens >= measuredTokensMin) {
      const tokenMs = Math.max(0, ms - (decodeRows === 0 ? 0 : (this.decodeMs(decodeRows) ?? 0))) / prefillTokens;
      this.#tokenMs = this.#tokenMs === null ? tokenMs : this.#tokenMs + tokenWeight * (tokenMs - this.#tokenMs);
    }
  }

  /** Of a step of this many rows and no prefill, or of a similar one. Null: nothing seen. */
  decodeMs(rows: number): number | null {
    return this.#decode.of(rows);
  }

  /** Expected of a step; a step without rows that decode has prompt tokens. Null: nothing like it was seen. */
  stepMs({ decodeRows, prefillTokens }: { decodeRows: number; prefillTokens: number }): number | null {
    const decodeMs = decodeRows === 0 ? 0 : this.decodeMs(decodeRows);
    if (decodeMs === null || prefillTokens === 0) return decodeMs;
    return this.#tokenMs === null ? null : decodeMs + prefillTokens * this.#tokenMs;
  }

  /**
   * Most prompt tokens of the next step.
   * @param targetMs  how long a step with rows that decode may take; null: a short prompt lengthens it by 100 ms or what it takes, other prompts to 1.5 times a step
   *   without prefill, 20 ms at least, more where many wait
   * @returns 0: none, the streams have this step for themselves
   */
  prefillTokensMax(demand: PromptDemand, targetMs: number | null): number {
    const { decodeRows, decoding, waiting, tokens, tokensLeft } = demand;
    if (this.#tokenMs === null) return decodeRows === 0 ? Number.POSITIVE_INFINITY : chunkTokensFirst;
    const tokenMs = Math.max(this.#tokenMs, tokenMsMin);
    const isShort = targetMs === null && tokens * tokenMs <= shortPromptMs;
    // Of prompts that come together in a step, none has its first token before the last.
    if (decodeRows === 0 && (waiting === 1 || !isShort)) return Number.POSITIVE_INFINITY;
    const decodeMs = this.decodeMs(decodeRows);
    if (isShort) {
      if (decodeRows > 0 && decodeMs !== null && demand.stepsSince < stepsBetween(demand.completedTokens * tokenMs, decodeMs))
        return 0;
      return shortPromptTokens(tokensLeft, Math.floor(bearableMs / tokenMs));
    }
    if (decodeMs === null) return chunkTokensFirst;
    const forWaitingMs = Math.min((1 + stretchForWaiting * (waiting / decoding)) * decodeMs, bearableMs);
    const limitMs = targetMs ?? Math.max(stretch * decodeMs, unnoticedMs, forWaitingMs);
    return Math.max(chunkTokensMin, Math.floor((limitMs - decodeMs) / tokenMs));
  }
}

/** Steps without prompts that follow one whose short prompts took `promptMs`. */
const stepsBetween = (promptMs: number, decodeMs: number): number =>
  Math.min(Math.round((shareBetween * promptMs) / decodeMs), stepsBetweenMax);

/** In as many equal steps as come nearest to `tokensMax` each: no step is held up for a few last tokens. Where one does, there may be room for other prompts. */
function shortPromptTokens(tokensLeft: number, tokensMax: number): number {
  const steps = Math.max(1, Math.round(tokensLeft / tokensMax));
  return steps === 1 ? Math.max(tokensLeft, tokensMax) : Math.ceil(tokensLeft / steps);
}
