/** What the engine needs of the mesh: plans go down, results come up, and the mesh says when an epoch begins and when it is over. */
import type { Placement } from '../../protocol/placement.ts';
import type { StepPlan, StepResult } from '../../protocol/step-plan.ts';

/** An epoch that serves: every worker is connected, its K/V empty, all slots closed, step numbers start from 1. */
export interface MeshEpoch {
  epoch: number;
  placement: Placement;
  /** Blocks that every rank has. */
  kvBlocks: number;
  /** `WorkerFacts.arithmetic`, the same on all workers of the placement. */
  arithmetic: string;
}

/** Why an epoch is over. `code` is of the error table; the message names the worker. */
export interface MeshFault {
  code: string;
  message: string;
}

export interface StepTransport {
  /** Plans can be published now. False as soon as the epoch is known to be over. */
  readonly ready: boolean;
  /** Plans of steps that follow each other, to all workers of the placement. Never waits; a plan that could not be sent ends the epoch by `onLost`. */
  publishPlans(plans: StepPlan[]): void;
  onResult(listener: (result: StepResult) => void): void;
  onEpoch(listener: (epoch: MeshEpoch) => void): void;
  /** The epoch is over. More than once, or without an epoch, is harmless. */
  onLost(listener: (fault: MeshFault) => void): void;
  /** What a fault that the engine has seen is, as the mesh knows it (a broker that does not answer, silent workers by name). Called before `reportFault`. */
  explain?(fault: MeshFault): MeshFault;
  /**
   * The engine gave the epoch up: a step is overdue, or a result does not fit its plan. All its requests have ended already; the mesh must begin a new epoch.
   */
  reportFault(fault: MeshFault): void;
}
