import { describe, expect, it } from 'vitest';
import { BlockPool } from '../../../../coordinator/kv-cache/block-pool.ts';
import { PrefixCache, type BlockDigest, type CacheIdentity } from '../../../../coordinator/kv-cache/prefix-cache.ts';

const identity: CacheIdentity = { modelSha256: 'ab', activations: 'int8', kvType: 'int8', arithmetic: '1' };

function makeCache(blocks = 8, of: CacheIdentity = identity, secret: Uint8Array = new Uint8Array(32)) {
  const pool = new BlockPool(blocks, (block) => cache.forget(block));
  const cache = new PrefixCache({ pool, blockTokens: 4, secret, identity: of });
  return { pool, cache };
}

const tokens = Array.from({ length: 14 }, (_, i) => i + 1);

/** Computes `tokens` into fresh blocks, as a sequence would, and registers the full ones. */
function fill({ pool, cache }: ReturnType<typeof makeCache>, tenant: string, text = tokens): number[] {
  const digests: BlockDigest[] = [];
  const full = Math.floor(text.length / 4);
  const blocks = pool.allocate(full)!;
  cache.extendDigests(tenant, text, digests, full);
  blocks.forEach((block, i) => cache.register(block, digests[i]!));
  return blocks;
}

describe('prefix cache', () => {
  it('prefix cache - finds the longest cached prefix, in full blocks, up to the limit asked for', () => {
    const made = makeCache();
    expect(fill(made, 'a')).toEqual([0, 1, 2]);
    const { cache } = made;
    expect(cache.find('a', tokens, [], 3)).toEqual([0, 1, 2]);
    expect(cache.find('a', tokens, [], 2)).toEqual([0, 1]);
    expect(cache.find('a', [1, 2, 3, 4, 5, 6, 7, 99, 9, 10, 11, 12], [], 3)).toEqual([0]);
    expect(cache.find('a', [99, 2, 3, 4, 5, 6, 7, 8], [], 2)).toEqual([]);
  });

  it('prefix cache - does not find equal tokens after a different beginning', () => {
    const made = makeCache();
    fill(made, 'a', [1, 2, 3, 4, 5, 6, 7, 8]);
    expect(made.cache.find('a', [5, 6, 7, 8], [], 1)).toEqual([]);
  });

  it('prefix cache - never shows one tenant the blocks of another', () => {
    const made = makeCache();
    fill(made, 'a');
    expect(made.cache.find('b', tokens, [], 3)).toEqual([]);
  });

  it('prefix cache - names blocks by model, activations, K/V type, arithmetic and secret too', () => {
    const digestOf = (of: CacheIdentity, secret?: Uint8Array, tenant = 'a'): BlockDigest => {
      const digests: BlockDigest[] = [];
      makeCache(1, of, secret).cache.extendDigests(tenant, tokens, digests, 1);
      return digests[0]!;
    };
    const all = [
      digestOf(identity),
      digestOf({ ...identity, modelSha256: 'cd' }),
      digestOf({ ...identity, activations: 'int16' }),
      digestOf({ ...identity, kvType: 'f16' }),
      digestOf({ ...identity, arithmetic: '2' }),
      digestOf(identity, new Uint8Array(32).fill(1)),
      // Lengths are covered: 'aa' + 'b' is not 'a' + 'ab'.
      digestOf({ ...identity, modelSha256: 'b' }, undefined, 'aa'),
      digestOf({ ...identity, modelSha256: 'ab' }, undefined, 'a'),
    ];
    expect(all[0]).toBe(all[7]);
    expect(new Set(all).size).toBe(7);
    expect(all[0]).toHaveLength(32);
  });

  it('prefix cache - forgets a block that the pool gives away, and with it the way to the blocks behind', () => {
    const made = makeCache(3);
    const { pool, cache } = made;
    pool.release(fill(made, 'a'));
    expect(pool.allocate(1)).toEqual([2]);
    expect(cache.find('a', tokens, [], 3)).toEqual([0, 1]);
    expect(cache.size).toBe(2);
    pool.allocate(2);
    expect(cache.find('a', tokens, [], 3)).toEqual([]);
    expect(cache.size).toBe(0);
  });

  it('prefix cache - keeps the first of two blocks with the same content', () => {
    const made = makeCache();
    fill(made, 'a');
    const again = fill(made, 'a');
    expect(again).toEqual([3, 4, 5]);
    expect(made.cache.find('a', tokens, [], 3)).toEqual([0, 1, 2]);
    made.pool.release(again);
    // Not cached, so they are the next to be given away.
    expect(made.pool.allocate(3)).toEqual([3, 4, 5]);
  });

  it('prefix cache - finds nothing after clear, and free blocks are given away without being told', () => {
    const made = makeCache();
    made.pool.release(fill(made, 'a'));
    made.cache.clear();
    expect(made.cache.find('a', tokens, [], 3)).toEqual([]);
    expect(made.pool.allocate(8)).toHaveLength(8);
  });
});
