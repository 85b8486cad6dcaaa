/** Broken bytes from right ones, by a seed. */

/** mulberry32: 0 <= value < 1 */
export function seededRandom(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4_294_967_296;
  };
}

/** Bit flips, changed bytes, cuts, repeated and random stretches. The input stays as it is. */
export function mutate(bytes: Uint8Array, random: () => number): Uint8Array {
  const below = (count: number): number => Math.floor(random() * count);
  const copy = Buffer.from(bytes);
  switch (below(7)) {
    case 0:
      copy[below(copy.length)] = below(256);
      return copy;
    case 1: {
      const at = below(copy.length);
      copy[at] = (copy[at] ?? 0) ^ (1 << below(8));
      return copy;
    }
    case 2:
      return copy.subarray(0, below(copy.length + 1));
    case 3: {
      const at = below(copy.length);
      return Buffer.concat([copy.subarray(0, at), copy.subarray(below(at + 1))]);
    }
    case 4:
      for (let i = 0; i < 8; i++) copy[below(copy.length)] = below(256);
      return copy;
    case 5:
      return Buffer.concat([copy, Buffer.from(Array.from({ length: 1 + below(16) }, () => below(256)))]);
    default:
      return Buffer.from(Array.from({ length: below(200) }, () => below(256)));
  }
}
