/**
 * Full blocks found again by what they hold. A block is named by a chained HMAC-SHA-256: its digest covers every token from position 0 to its end,
 * and the chain starts from a key of one tenant, so no tenant can find (or time) another's prompts, and nobody can construct a collision.
 *
 *   root     = HMAC(secret, tenant | model digest | activations | K/V type | executor arithmetic)      each field with its length before it
 *   digest_i = HMAC(root, digest_{i-1} | tokens of block i as uint32 little-endian)      digest_{-1} is empty
 *
 * Only blocks whose step has come back are ever registered: a block of a step in flight may never be written when the step fails.
 */
import { createHmac } from 'node:crypto';
import type { BlockPool } from './block-pool.ts';

/** What, besides the tokens, decides the bits of a block. */
export interface CacheIdentity {
  modelSha256: string;
  activations: string;
  kvType: string;
  /** `WorkerFacts.arithmetic` of the placement's workers. */
  arithmetic: string;
}

/** Digest of a block and of all before it, 32 bytes as a latin1 string. */
export type BlockDigest = string;

export class PrefixCache {
  readonly blockTokens: number;
  readonly #pool: BlockPool;
  readonly #secret: Uint8Array;
  readonly #identity: CacheIdentity;
  readonly #roots = new Map<string, Buffer>();
  readonly #blockOf = new Map<BlockDigest, number>();
  readonly #digestOf = new Map<number, BlockDigest>();

  /** @param secret  32 random bytes of this coordinator; digests mean nothing without it */
  constructor(options: { pool: BlockPool; blockTokens: number; secret: Uint8Array; identity: CacheIdentity }) {
    this.#pool = options.pool;
    this.blockTokens = options.blockTokens;
    this.#secret = options.secret;
    this.#identity = options.identity;
  }

  /** Blocks that can be found. */
  get size(): number {
    return this.#blockOf.size;
  }

  /**
   * Extends `digests` to the first `blockCount` blocks of `tokens`. A sequence keeps its list: tokens that are known never change.
   * @param tokens  at least blockCount * blockTokens of them
   */
  extendDigests(tenant: string, tokens: readonly number[], digests: BlockDigest[], blockCount: number): void {
    const root = this.#rootOf(tenant);
    const bytes = Buffer.allocUnsafe(this.blockTokens * 4);
    for (let i = digests.length; i < blockCount; i++) {
      for (let j = 0; j < this.blockTokens; j++) bytes.writeUInt32LE(tokens[i * this.blockTokens + j]!, j * 4);
      const hmac = createHmac('sha256', root);
      if (i > 0) hmac.update(digests[i - 1]!, 'latin1');
      digests.push(hmac.update(bytes).digest('binary'));
    }
  }

  /**
   * Finds the longest cached prefix of `tokens`, of at most `blockCountMax` blocks. Takes no reference: `pool.share` each block before anything else
   * is allocated.
   * @param digests  the sequence's own list, extended as far as the search goes
   * @returns block ids in position order
   */
  find(tenant: string, tokens: readonly number[], digests: BlockDigest[], blockCountMax: number): number[] {
    const blocks: number[] = [];
    for (let i = 0; i < blockCountMax; i++) {
      this.extendDigests(tenant, tokens, digests, i + 1);
      const block = this.#blockOf.get(digests[i]!);
      if (block === undefined) break;
      blocks.push(block);
    }
    return blocks;
  }

  /** `block`, in use and computed, holds what `digest` names. The first block of a content stays the one that is found. */
  register(block: number, digest: BlockDigest): void {
    if (this.#blockOf.has(digest)) return;
    this.#pool.markCached(block);
    this.#blockOf.set(digest, block);
    this.#digestOf.set(block, digest);
  }

  /** The pool gives `block` away. */
  forget(block: number): void {
    const digest = this.#digestOf.get(block);
    if (digest === undefined) return;
    this.#digestOf.delete(block);
    this.#blockOf.delete(digest);
  }

  /** Nothing can be found any more: the epoch failed and blocks may hold anything. */
  clear(): void {
    this.#pool.forgetCached();
    this.#blockOf.clear();
    this.#digestOf.clear();
  }

  #rootOf(tenant: string): Buffer {
    let root = this.#roots.get(tenant);
    if (root === undefined) {
      const hmac = createHmac('sha256', this.#secret);
      const { modelSha256, activations, kvType, arithmetic } = this.#identity;
      for (const field of [tenant, modelSha256, activations, kvType, arithmetic]) {
        const bytes = Buffer.from(field, 'utf8');
        const length = Buffer.allocUnsafe(4);
        length.writeUInt32LE(bytes.length);
        hmac.update(length).update(bytes);
      }
      root = hmac.digest();
      this.#roots.set(tenant, root);
    }
    return root;
  }
}
