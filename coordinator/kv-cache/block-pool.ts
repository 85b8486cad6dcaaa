/**
 * All K/V blocks of an epoch: who uses each one, and in which order unused ones are given away. The pool knows numbers only; what a block holds is
 * the prefix cache's business. Pure: no I/O, no clock.
 *
 *   used    refCount >= 1, in the block tables of that many sequences
 *   free    refCount 0, in the free queue; it may still hold cached tokens and be shared again until it is allocated
 *
 *   free queue   [ nothing worth keeping | cached, least recently used ... most recently used ]
 *                  ^ allocate takes from here                        release puts cached blocks here ^
 */

/** A broken invariant of the scheduler, the pool or the cache: a bug here, never something a client or a worker did. */
export class InvariantError extends Error {
  override readonly name = 'InvariantError';
}

export class BlockPool {
  readonly total: number;
  readonly #refCount: Int32Array;
  readonly #cached: Uint8Array;
  /** Doubly linked free queue over block ids; index `total` is the sentinel. A used block has next = -1. */
  readonly #next: Int32Array;
  readonly #previous: Int32Array;
  readonly #onEvict: (block: number) => void;
  #free: number;

  /**
   * @param total  blocks of the epoch, 1 or more; ids are 0..total-1
   * @param onEvict  called when a block with cached content is given away: forget that content
   */
  constructor(total: number, onEvict: (block: number) => void = () => undefined) {
    if (!Number.isInteger(total) || total < 1) throw new InvariantError(`a block pool needs at least 1 block, got ${total}`);
    this.total = total;
    this.#refCount = new Int32Array(total);
    this.#cached = new Uint8Array(total);
    this.#next = new Int32Array(total + 1);
    this.#previous = new Int32Array(total + 1);
    this.#onEvict = onEvict;
    this.#free = total;
    for (let i = 0; i <= total; i++) {
      this.#next[i] = i === total ? 0 : i + 1;
      this.#previous[i] = i === 0 ? total : i - 1;
    }
  }

  /** Blocks that `allocate` could give now, cached ones included. */
  get free(): number {
    return this.#free;
  }

  get used(): number {
    return this.total - this.#free;
  }

  /** Block tables that hold `block`. */
  references(block: number): number {
    return this.#refCount[this.#known(block)]!;
  }

  /**
   * Takes `count` blocks in eviction order and forgets what they cached. All or nothing.
   * @returns ids; `null` when fewer than `count` are free, and then nothing has changed
   */
  allocate(count: number): number[] | null {
    if (count > this.#free) return null;
    const blocks: number[] = [];
    for (let i = 0; i < count; i++) {
      const block = this.#next[this.total]!;
      this.#unlink(block);
      this.#refCount[block] = 1;
      if (this.#cached[block] === 1) {
        this.#cached[block] = 0;
        this.#onEvict(block);
      }
      blocks.push(block);
    }
    return blocks;
  }

  /** One more sequence uses `block`, whose content is cached. A free block leaves the free queue. */
  share(block: number): void {
    this.#known(block);
    if (this.#cached[block] !== 1) throw new InvariantError(`block ${block} is shared but its content is not cached`);
    if (this.#refCount[block] === 0) this.#unlink(block);
    this.#refCount[block]! += 1;
  }

  /**
   * One sequence less uses each of `blocks`. Those that nobody uses any more join the free queue: cached ones as the most recently used, the last
   * block of the table before the first, so that the tail of a prefix is evicted before its head; the others at the front.
   * @param blocks  a block table, or its end, in position order
   */
  release(blocks: readonly number[]): void {
    for (let i = blocks.length - 1; i >= 0; i--) {
      const block = this.#known(blocks[i]!);
      const references = this.#refCount[block]!;
      if (references === 0) throw new InvariantError(`block ${block} is released twice`);
      this.#refCount[block] = references - 1;
      if (references > 1) continue;
      if (this.#cached[block] === 1) this.#link(block, this.#previous[this.total]!);
      else this.#link(block, this.total);
    }
  }

  /** The content of a used block can be found again from now on. */
  markCached(block: number): void {
    if (this.references(block) === 0) throw new InvariantError(`block ${block} is marked as cached but no sequence uses it`);
    this.#cached[block] = 1;
  }

  /** The content of no block can be found again (the epoch failed, or the cache was emptied). Does not call `onEvict`. */
  forgetCached(): void {
    this.#cached.fill(0);
  }

  /** Free blocks in the order in which `allocate` gives them. */
  freeQueue(): number[] {
    const blocks: number[] = [];
    for (let block = this.#next[this.total]!; block !== this.total; block = this.#next[block]!) blocks.push(block);
    return blocks;
  }

  /**
   * Compares the pool with all block tables there are. Walks every block: for tests and for the end of an epoch.
   * @throws {InvariantError} a block leaked, is owned by more tables than it counts, or the free queue is broken
   */
  check(tables: Iterable<readonly number[]>): void {
    const expected = new Int32Array(this.total);
    for (const table of tables) for (const block of table) expected[this.#known(block)]! += 1;
    const queue = this.freeQueue();
    if (queue.length !== this.#free) {
      throw new InvariantError(`the free queue holds ${queue.length} blocks and the pool counts ${this.#free} free`);
    }
    const inQueue = new Set(queue);
    for (let block = 0; block < this.total; block++) {
      const references = this.#refCount[block]!;
      if (references !== expected[block]) {
        throw new InvariantError(`block ${block} counts ${references} references and is in ${expected[block]} block tables`);
      }
      if ((references === 0) !== inQueue.has(block)) {
        throw new InvariantError(
          `block ${block} has ${references} references and is ${inQueue.has(block) ? '' : 'not '}in the free queue`,
        );
      }
    }
  }

  #known(block: number): number {
    if (!Number.isInteger(block) || block < 0 || block >= this.total) {
      throw new InvariantError(`block ${block} is not in the pool of ${this.total} blocks`);
    }
    return block;
  }

  #unlink(block: number): void {
    const next = this.#next[block]!;
    const previous = this.#previous[block]!;
    this.#next[previous] = next;
    this.#previous[next] = previous;
    this.#next[block] = -1;
    this.#free--;
  }

  /** Puts `block` into the free queue right behind `after`. */
  #link(block: number, after: number): void {
    const next = this.#next[after]!;
    this.#next[after] = block;
    this.#previous[block] = after;
    this.#next[block] = next;
    this.#previous[next] = block;
    this.#free++;
  }
}
