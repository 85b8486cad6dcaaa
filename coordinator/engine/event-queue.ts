/** Events between the engine, which never waits, and one reader, which may be slow. The queue only counts; who must slow down is the engine's decision. */
export class EventQueue<Event> implements AsyncIterable<Event> {
  #buffer: Event[] = [];
  /** First event in `#buffer` that was not delivered. */
  #next = 0;
  #ended = false;
  #reader: ((result: IteratorResult<Event, undefined>) => void) | null = null;
  readonly #onTaken: () => void;
  readonly #onLeft: () => void;

  /**
   * @param onTaken  the reader took an event from the buffer
   * @param onLeft  the reader stopped reading before the end
   */
  constructor(onTaken: () => void, onLeft: () => void) {
    this.#onTaken = onTaken;
    this.#onLeft = onLeft;
  }

  /** Events that wait for the reader. */
  get pending(): number {
    return this.#buffer.length - this.#next;
  }

  /** After `end` nothing is taken any more. */
  push(event: Event): void {
    if (this.#ended) return;
    if (this.#reader === null) {
      this.#buffer.push(event);
    } else {
      const reader = this.#reader;
      this.#reader = null;
      reader({ done: false, value: event });
    }
  }

  /** Nothing follows what is in the queue. */
  end(): void {
    this.#ended = true;
    const reader = this.#reader;
    this.#reader = null;
    reader?.({ done: true, value: undefined });
  }

  /** Forgets what was not delivered, and ends. */
  discard(): void {
    this.#buffer = [];
    this.#next = 0;
    this.end();
  }

  /** For one reader: what one iterator took, another does not see. */
  [Symbol.asyncIterator](): AsyncIterator<Event, undefined> {
    return {
      next: () => this.#take(),
      return: async () => {
        if (!this.#ended || this.pending > 0) this.#onLeft();
        return { done: true, value: undefined };
      },
    };
  }

  #take(): Promise<IteratorResult<Event, undefined>> {
    if (this.pending > 0) {
      const value = this.#buffer[this.#next++]!;
      // Let go of what was delivered, now and then, so that taking one event does not move all others.
      if (this.#next === this.#buffer.length || this.#next >= 256) {
        this.#buffer = this.#buffer.slice(this.#next);
        this.#next = 0;
      }
      this.#onTaken();
      return Promise.resolve({ done: false, value });
    }
    if (this.#ended) return Promise.resolve({ done: true, value: undefined });
    if (this.#reader !== null) return Promise.reject(new Error('the events of a request are read twice at the same time'));
    return new Promise((resolve) => (this.#reader = resolve));
  }
}
