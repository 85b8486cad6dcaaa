/**
 * Holds a sender back: at most `windowBytes` are with the transport at a time, the rest waits here, bounded. Without it a slow peer would show as memory
 * in the library's own buffers, which have no limit.
 */
export interface SendQueueOptions {
  /** Bytes handed to the transport and not yet reported written. One frame larger than this may go alone. */
  windowBytes: number;
  queueBytesMax: number;
  /** Hands one frame to the transport; `written` is called once, later or at once, when the transport has passed it on. */
  write(bytes: Buffer, written: () => void): void;
}

export class SendQueue {
  readonly #options: SendQueueOptions;
  #waiting: Buffer[] = [];
  #waitingBytes = 0;
  #inFlightBytes = 0;
  #open = false;
  /** Reports of an earlier connection must not open the window of this one. */
  #generation = 0;

  constructor(options: SendQueueOptions) {
    this.#options = options;
  }

  get waitingBytes(): number {
    return this.#waitingBytes;
  }

  /** @returns false when there is no room; nothing has changed then */
  push(bytes: Buffer): boolean {
    if (this.#waitingBytes + bytes.length > this.#options.queueBytesMax) return false;
    this.#waiting.push(bytes);
    this.#waitingBytes += bytes.length;
    this.#pump();
    return true;
  }

  /** The transport takes bytes from now on. */
  open(): void {
    this.#open = true;
    this.#pump();
  }

  /** The transport takes nothing; forgets what waits. @returns frames forgotten */
  close(): number {
    const forgotten = this.#waiting.length;
    this.#open = false;
    this.#generation++;
    this.#waiting = [];
    this.#waitingBytes = 0;
    this.#inFlightBytes = 0;
    return forgotten;
  }

  #pump(): void {
    const generation = this.#generation;
    while (this.#open && this.#waiting.length > 0) {
      const bytes = this.#waiting[0] as Buffer;
      if (this.#inFlightBytes > 0 && this.#inFlightBytes + bytes.length > this.#options.windowBytes) return;
      this.#waiting.shift();
      this.#waitingBytes -= bytes.length;
      this.#inFlightBytes += bytes.length;
      let reported = false;
      this.#options.write(bytes, () => {
        if (reported || generation !== this.#generation) return;
        reported = true;
        this.#inFlightBytes -= bytes.length;
        this.#pump();
      });
      if (generation !== this.#generation) return;
    }
  }
}
