/** Measuring a link: a `probe` frame goes out, the other end sends its payload back as `echo`. */
import { ShardmeshError } from '../../protocol/errors.ts';
import type { Frame, FrameHeader } from '../../protocol/frame-codec.ts';
import type { MeshId, PlacementId } from '../../protocol/ids.ts';
import { messageLimits } from '../../protocol/limits.ts';

/** Rounds are told apart by 16 bits of the header, so a late echo of another round is not taken for this one. */
const roundsModulo = 0x1_0000;

/** Probes belong to no placement: the mesh's id stands in its place, epoch and step are 0. */
export const probeHeader = (mesh: MeshId, kind: 'probe' | 'echo', round: number): FrameHeader => ({
  mesh,
  placement: mesh as string as PlacementId,
  epoch: 0,
  step: 0,
  operation: round % roundsModulo,
  subtree: 0,
  kind,
  source: { stage: 0, rank: 0 },
  dtype: 'bytes',
  rows: 0,
});

/** The answer to a probe; null when it is larger than anybody should send. */
export const echoOf = (probe: Frame): FrameHeader | null =>
  probe.payload.length > messageLimits.probeBytesMax ? null : { ...probeHeader(probe.mesh as MeshId, 'echo', probe.operation) };

/** Rounds of one measurement, one after the other. The owner passes on the echoes that come for it. */
export class RoundTrips {
  #waiting: { round: number; bytes: number; resolve: () => void } | null = null;
  readonly #name: string;

  /** @param name  of the peer and driver, for the error */
  constructor(name: string) {
    this.#name = name;
  }

  onEcho(echo: Frame): void {
    const waiting = this.#waiting;
    if (!waiting || echo.operation !== waiting.round % roundsModulo || echo.payload.length !== waiting.bytes) return;
    this.#waiting = null;
    waiting.resolve();
  }

  /**
   * @param send  sends the probe of one round; called again every `resendMs` where messages can be lost before the peer listens
   * @returns microseconds of each round
   * @throws {ShardmeshError} `worker_lost`
   */
  async run(options: {
    rounds: number;
    bytes: number;
    timeoutMs: number;
    resendMs?: number;
    send: (round: number) => void;
    signal: AbortSignal;
  }): Promise<number[]> {
    const { rounds, bytes, timeoutMs, resendMs, send, signal } = options;
    const end = performance.now() + timeoutMs;
    const times: number[] = [];
    for (let round = 1; round <= rounds; round++) {
      const begin = performance.now();
      let timer: NodeJS.Timeout | undefined;
      let resend: NodeJS.Timeout | undefined;
      let onAbort: () => void = () => undefined;
      try {
        await new Promise<void>((resolve, reject) => {
          this.#waiting = { round, bytes, resolve };
          const fail = (reason: string): void =>
            reject(new ShardmeshError('worker_lost', `${this.#name} did not answer a probe of ${bytes} bytes: ${reason}`));
          timer = setTimeout(
            () => fail(`${round - 1} of ${rounds} rounds came back within ${timeoutMs} ms`),
            Math.max(0, end - begin),
          );
          onAbort = () => fail(signal.reason instanceof Error ? signal.reason.message : 'the link was closed');
          if (signal.aborted) return onAbort();
          signal.addEventListener('abort', onAbort, { once: true });
          if (resendMs !== undefined) resend = setInterval(() => send(round), resendMs);
          send(round);
        });
      } finally {
        clearTimeout(timer);
        clearInterval(resend);
        signal.removeEventListener('abort', onAbort);
        this.#waiting = null;
      }
      times.push((performance.now() - begin) * 1000);
    }
    return times;
  }
}
