/** Where a model lives: `Placement` names stages (cuts of layers), ranks (cuts of every layer) and the worker that holds each shard. */

export interface Range {
  from: number;
  to: number;
}

/**
 * `peer`: reductions by the cards of a stage, which read each other's memory; `card`: the ranks of a stage are workers of one process and do each step together on its card;
 * the rest as with `shm`. Both are chosen by `auto` only.
 */
export type LinkDriver = 'shm' | 'peer' | 'card' | 'tcp' | 'grpc' | 'nats';

/** How reductions and hidden states travel: as they are, rounded to bf16, or 34 bytes for 32 values. With less than f32 bits depend on the split. */
export type WireType = 'f32' | 'bf16' | 'q8';

export interface RankPlacement {
  worker: string;
  /** Attention units (design section 13), feed-forward units, vocabulary units of 1,024 ids. */
  attentionUnits: Range;
  feedForwardUnits: Range;
  vocabularyUnits: Range;
}

export interface StagePlacement {
  layers: Range;
  ranks: RankPlacement[];
}

export interface Placement {
  /** Random id of this placement, in every frame. */
  id: string;
  /** Raised by one whenever a worker, a link or a cut changes. A frame of an older epoch changes nothing. */
  epoch: number;
  model: string;
  stages: StagePlacement[];
  /** Link driver forced by the operator, else picked for each pair when the mesh is connected. */
  link: Exclude<LinkDriver, 'peer' | 'card'> | 'auto';
  /** Of every link, whatever driver carries it. */
  wire: WireType;
}
