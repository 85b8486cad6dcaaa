/** What a coordinator is started with: checked by the command line, frozen, and never read from the environment below this point. */
import type { Address } from '../protocol/addresses.ts';
import type { Credentials } from '../protocol/credentials.ts';
import type { Placement, WireType } from '../protocol/placement.ts';
import type { CutShares } from '../kernels/programs/units.ts';

export interface CoordinatorConfig {
  modelPath: string;
  /** null: the model's own name. */
  servedModelName: string | null;
  tensorParallel: CutShares;
  pipelineParallel: CutShares;
  /** Of workers that have no choice of their own; `cuda`: of local workers only. */
  executor: 'cpu' | 'cuda' | 'reference';
  /** null: the best each worker has. */
  isa: 'amx' | 'avx512' | 'avx2' | 'portable' | null;
  link: Placement['link'];
  /** How activations travel between workers. */
  wire: WireType;
  http: { host: string; port: number; apiKeys: string[] };
  /** A running broker and who we are on it; null: a private broker and local workers. */
  broker: Credentials | null;
  /** Workers of other hosts may join: where they reach this host (three ports from `port` on), and the folder that remembers the mesh. */
  hosts: { address: Address; meshFolder: string } | null;
  /** Seats that local workers take; null: all. */
  localWorkers: number | null;
  /** Local workers are one process, and share its card. */
  oneProcess: boolean;
  /** Logical cores that local workers may compute on; null: all this process may use. */
  cores: number[] | null;
  stepTokensMax: number;
  prefillChunkMax: number;
  blockTokens: number;
  kvCacheBytes: number;
  /** What a step's arithmetic must be the same on: every executor, or those of one kind. */
  bits: 'exact' | 'per-kind' | 'free';
  activations: 'int8' | 'int16';
  kvType: 'auto' | 'int8' | 'f16-int8' | 'f16';
  contextTokensMax: number | null;
  sequencesMax: number;
  prefixCache: boolean;
  /** null: as many as keep the workers busy. */
  stepsInFlightMax: number | null;
  /** null: 1.5 times what it is without prefill, 100 ms more for a short prompt. */
  itlTargetMs: number | null;
  /** Steps may have drafts where that pays. */
  speculation: boolean;
  cacheDirectory: string;
  /** Compiled main module of a worker process, and arguments of each. */
  workerModule: string;
  logLevel: string;
}
