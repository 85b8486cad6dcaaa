/** What one `shardmesh bench` found: the object that `--result` writes and the reports are made of. */
import type { Figures } from './figures.ts';
import type { MeshFigures } from './mesh-figures.ts';
import type { Series } from './series.ts';

export interface BenchResult {
  /** Of this format; a reader of another number should not guess. */
  version: 1;
  startedAt: string;
  url: string;
  model: string;
  seed: number;
  /** What was asked, in words. */
  workload: string;
  client: { node: string; cpu: string; cores: number };
  runs: BenchRun[];
}

export interface BenchRun {
  load: string;
  figures: Figures;
  series: Series;
  /** null: not a server of ours. */
  mesh: MeshFigures | null;
}
