/** A mesh under the engine: the simulated worker of the scheduler's tests behind `StepTransport`, its results given by hand. */
import type { MeshEpoch, MeshFault, StepTransport } from '../../../../coordinator/engine/step-transport.ts';
import type { StagePlacement } from '../../../../protocol/placement.ts';
import type { StepPlan, StepResult } from '../../../../protocol/step-plan.ts';
import { SimulatedWorker, type SimulatedWorkerOptions } from '../scheduler/simulated-worker.ts';

const range = { from: 0, to: 1 };

export class FakeMesh implements StepTransport {
  ready = false;
  worker: SimulatedWorker | null = null;
  readonly plans: StepPlan[] = [];
  readonly faults: MeshFault[] = [];
  #epoch = 0;
  readonly #options: SimulatedWorkerOptions;
  readonly #stages: number;
  #result: (result: StepResult) => void = () => undefined;
  #began: (epoch: MeshEpoch) => void = () => undefined;
  #lost: (fault: MeshFault) => void = () => undefined;

  constructor(options: SimulatedWorkerOptions, stages: number) {
    this.#options = options;
    this.#stages = stages;
  }

  publishPlans(plans: StepPlan[]): void {
    this.plans.push(...plans);
    for (const plan of plans) this.worker!.publish(plan);
  }

  onResult(listener: (result: StepResult) => void): void {
    this.#result = listener;
  }

  onEpoch(listener: (epoch: MeshEpoch) => void): void {
    this.#began = listener;
  }

  onLost(listener: (fault: MeshFault) => void): void {
    this.#lost = listener;
  }

  reportFault(fault: MeshFault): void {
    this.faults.push(fault);
    this.ready = false;
  }

  begin(): void {
    this.#epoch++;
    this.ready = true;
    this.worker = new SimulatedWorker(this.#options);
    const rank = { worker: 'w', attentionUnits: range, feedForwardUnits: range, vocabularyUnits: range };
    const stages: StagePlacement[] = Array.from({ length: this.#stages }, () => ({ layers: range, ranks: [rank] }));
    const placement = {
      id: `p${this.#epoch}`,
      epoch: this.#epoch,
      model: 'm',
      stages,
      link: 'auto' as const,
      wire: 'f32' as const,
    };
    this.#began({ epoch: this.#epoch, placement, kvBlocks: this.#options.blocks, arithmetic: '1' });
  }

  lose(fault: MeshFault): void {
    this.ready = false;
    this.#lost(fault);
  }

  /** Gives the engine the result of the oldest step. False: none is in flight. */
  step(): boolean {
    if (this.worker === null || this.worker.stepsInFlight === 0) return false;
    this.#result(this.worker.take());
    return true;
  }

  deliver(result: StepResult): void {
    this.#result(result);
  }
}
