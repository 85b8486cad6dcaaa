/**
 * The file of `shardmesh tune`: numbers of launches that change no bit, measured on the cards of this host (`tuning.h` reads it, `tuning_table.h` says what is in it). It
 * lies beside downloaded models, since both outlive a checkout.
 */
import { mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';

/** One card of the file, as far as JavaScript looks at it. */
export interface TunedCard {
  sm: number | null;
  card: string | null;
  measured: string | null;
}

interface TuningFile {
  version: number;
  cards: TunedCard[];
}

export const tuningPath = (cacheDirectory: string): string => join(cacheDirectory, 'cuda-tuning.json');

/** The file's text, null where `shardmesh tune` has not run. */
export function readTuning(cacheDirectory: string): string | null {
  try {
    return readFileSync(tuningPath(cacheDirectory), 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return null;
    throw error;
  }
}

/** When a card was tuned; null: not on this host. */
export function tunedAt(text: string | null, name: string): string | null {
  if (text === null) return null;
  return (JSON.parse(text) as TuningFile).cards.find(({ card }) => card === name)?.measured ?? null;
}

/** Puts what was measured of one card in place of what was known of it, and keeps other cards. `made`: as gpu_bench --tune writes it. Returns its card. */
export function keepTuning(path: string, known: string | null, made: string): TunedCard {
  const file = JSON.parse(made) as TuningFile;
  const tuned = file.cards[0]!;
  const others = known === null ? [] : (JSON.parse(known) as TuningFile).cards.filter(({ card }) => card !== tuned.card);
  mkdirSync(dirname(path), { recursive: true });
  writeFileSync(`${path}.new`, `${JSON.stringify({ ...file, cards: [tuned, ...others] }, null, 1)}\n`);
  renameSync(`${path}.new`, path);
  return tuned;
}
