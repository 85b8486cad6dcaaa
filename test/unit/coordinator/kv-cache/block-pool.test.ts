import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { BlockPool, InvariantError } from '../../../../coordinator/kv-cache/block-pool.ts';

describe('block pool', () => {
  it('block pool - gives blocks in ascending order when new', () => {
    const pool = new BlockPool(4);
    expect(pool.allocate(3)).toEqual([0, 1, 2]);
    expect([pool.used, pool.free, pool.total]).toEqual([3, 1, 4]);
  });

  it('block pool - gives all or nothing', () => {
    const pool = new BlockPool(4);
    pool.allocate(2);
    expect(pool.allocate(3)).toBeNull();
    expect(pool.freeQueue()).toEqual([2, 3]);
    expect(pool.allocate(2)).toEqual([2, 3]);
    expect(pool.allocate(1)).toBeNull();
    expect(pool.allocate(0)).toEqual([]);
  });

  it('block pool - evicts the tail of a prefix before its head', () => {
    const pool = new BlockPool(4);
    const table = pool.allocate(3)!;
    for (const block of table) pool.markCached(block);
    pool.release(table);
    // 3 was never used; then the prefix 0, 1, 2 from its end.
    expect(pool.freeQueue()).toEqual([3, 2, 1, 0]);
  });

  it('block pool - evicts the least recently used prefix first, and blocks with nothing cached before any prefix', () => {
    const pool = new BlockPool(5);
    const first = pool.allocate(2)!;
    const second = pool.allocate(3)!;
    for (const block of [...first, second[0]!, second[1]!]) pool.markCached(block);
    pool.release(first);
    pool.release(second);
    expect(pool.freeQueue()).toEqual([4, 1, 0, 3, 2]);
  });

  it('block pool - tells when a cached block is given away, and only then', () => {
    const evicted: number[] = [];
    const pool = new BlockPool(2, (block) => evicted.push(block));
    const table = pool.allocate(2)!;
    pool.markCached(0);
    pool.release(table);
    expect(evicted).toEqual([]);
    expect(pool.allocate(1)).toEqual([1]);
    expect(evicted).toEqual([]);
    expect(pool.allocate(1)).toEqual([0]);
    expect(evicted).toEqual([0]);
    pool.release([0]);
    pool.allocate(1);
    expect(evicted).toEqual([0]);
  });

  it('block pool - keeps a shared block until the last sequence lets it go', () => {
    const pool = new BlockPool(2);
    const table = pool.allocate(1)!;
    pool.markCached(0);
    pool.share(0);
    pool.release(table);
    expect([pool.references(0), pool.used]).toEqual([1, 1]);
    pool.release([0]);
    expect([pool.references(0), pool.used]).toEqual([0, 0]);
    pool.share(0);
    expect(pool.freeQueue()).toEqual([1]);
  });

  it('block pool - refuses to release a block twice, to share one that is not cached, and ids it does not have', () => {
    const pool = new BlockPool(2);
    pool.allocate(1);
    pool.release([0]);
    expect(() => pool.release([0])).toThrow(new InvariantError('block 0 is released twice'));
    expect(() => pool.share(1)).toThrow('block 1 is shared but its content is not cached');
    expect(() => pool.markCached(1)).toThrow('block 1 is marked as cached but no sequence uses it');
    expect(() => pool.release([2])).toThrow('block 2 is not in the pool of 2 blocks');
    expect(() => new BlockPool(0)).toThrow('a block pool needs at least 1 block, got 0');
  });

  it('block pool - finds a leaked block and one with two owners', () => {
    const pool = new BlockPool(3);
    pool.allocate(2);
    expect(() => pool.check([[0]])).toThrow('block 1 counts 1 references and is in 0 block tables');
    expect(() => pool.check([[0, 1], [1]])).toThrow('block 1 counts 1 references and is in 2 block tables');
    pool.check([[0], [1]]);
  });

  it('block pool - counts right after any sequence of takes and releases', () => {
    const operations = fc.array(fc.tuple(fc.constantFrom('allocate', 'release', 'cache', 'share'), fc.nat(20)), {
      maxLength: 80,
    });
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 12 }), operations, (total, steps) => {
        const cached = new Set<number>();
        const pool = new BlockPool(total, (block) => expect(cached.delete(block)).toBe(true));
        const tables: number[][] = [];
        for (const [operation, n] of steps) {
          const table = tables[n % Math.max(tables.length, 1)];
          if (operation === 'allocate') {
            const free = pool.free;
            const blocks = pool.allocate(n % 5);
            expect(blocks === null).toBe(n % 5 > free);
            if (blocks !== null) tables.push(blocks);
          } else if (operation === 'release' && table !== undefined) {
            pool.release(table);
            tables.splice(tables.indexOf(table), 1);
          } else if (operation === 'cache' && table !== undefined) {
            for (const block of table) {
              pool.markCached(block);
              cached.add(block);
            }
          } else if (operation === 'share') {
            const block = [...cached][n % Math.max(cached.size, 1)];
            if (block !== undefined) {
              pool.share(block);
              tables.push([block]);
            }
          }
          pool.check(tables);
        }
        for (const table of tables) pool.release(table);
        expect(pool.free).toBe(total);
        expect([...pool.freeQueue()].sort((a, b) => a - b)).toEqual(Array.from({ length: total }, (_, i) => i));
      }),
      { numRuns: 300 },
    );
  });
});
