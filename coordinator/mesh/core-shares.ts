/** Equal shares of the cores, contiguous; null when there are more workers than cores (then nobody is pinned). */
export function coreShares(cores: readonly number[], workers: number): number[][] | null {
  if (workers > cores.length) return null;
  return Array.from({ length: workers }, (_, index) =>
    cores.slice(Math.floor((index * cores.length) / workers), Math.floor(((index + 1) * cores.length) / workers)),
  );
}
