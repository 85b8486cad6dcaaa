import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { Sequence, SequenceSpec } from '../../../../coordinator/scheduler/sequence.ts';
import type { SpeculationTimes } from '../../../../coordinator/scheduler/speculation.ts';
import { greedy, makeScheduler } from './make-scheduler.ts';
import {
  expectedScores,
  expectedTokens,
  SimulatedWorker,
  vocabularySize,
  type SimulatedWorkerOptions,
} from './simulated-worker.ts';

interface Workload {
  options: SimulatedWorkerOptions & {
    microBatches: () => number;
    prefillTokensMax: () => number;
    speculation: SpeculationTimes | null;
    cache: boolean;
  };
  requests: {
    spec: SequenceSpec;
    choices: number;
    /** Turns of the driver before it arrives, and after which it is cancelled or paused. */
    arrival: number;
    cancelAfter: number | null;
    pauseAfter: number | null;
  }[];
  /** Which of planning and taking a result comes next. */
  turns: boolean[];
}

const workload: fc.Arbitrary<Workload> = fc
  .record({
    blockTokens: fc.constantFrom(2, 4, 16),
    extraBlocks: fc.integer({ min: 0, max: 12 }),
    sequencesMax: fc.integer({ min: 1, max: 6 }),
    stepTokensMax: fc.integer({ min: 1, max: 24 }),
    prefillChunkMax: fc.integer({ min: 1, max: 24 }),
    stepOutputsMax: fc.integer({ min: 1, max: 24 }),
    parts: fc.integer({ min: 1, max: 4 }),
    prefillBudget: fc.constantFrom(1, 5, 1_000),
    stepsInFlightMax: fc.integer({ min: 1, max: 4 }),
    sequenceStepsMax: fc.integer({ min: 1, max: 3 }),
    cache: fc.boolean(),
    /** A round with drafts takes so many times what a step takes. */
    round: fc.option(fc.constantFrom(0.5, 1, 1.5), { freq: 8 }),
    requests: fc.array(
      fc.record({
        // Few different prompts, so that prefixes are shared; different lengths of the same text.
        promptFamily: fc.integer({ min: 0, max: 2 }),
        promptLength: fc.integer({ min: 1, max: 40 }),
        tenant: fc.constantFrom('a', 'a', 'b'),
        outputTokensMax: fc.oneof(fc.integer({ min: 0, max: 20 }), fc.integer({ min: 0, max: 60 })),
        // Texts of the high temperature repeat themselves, so there are drafts.
        temperature: fc.constantFrom(0, 2, 2, 2),
        outputTokensMin: fc.integer({ min: 0, max: 6 }),
        seed: fc.integer({ min: 0, max: 3 }),
        stopTokens: fc.array(fc.integer({ min: 0, max: vocabularySize - 1 }), { maxLength: 8 }),
        scorePrompt: fc.boolean(),
        choices: fc.constantFrom(1, 1, 1, 3),
        arrival: fc.integer({ min: 0, max: 30 }),
        cancelAfter: fc.option(fc.integer({ min: 0, max: 20 }), { freq: 5 }),
        pauseAfter: fc.option(fc.integer({ min: 0, max: 10 }), { freq: 5 }),
      }),
      { minLength: 1, maxLength: 10 },
    ),
    turns: fc.array(fc.boolean(), { minLength: 1, maxLength: 40 }),
  })
  .map(({ extraBlocks, requests, turns, parts, prefillBudget, round, ...others }) => {
    const speculation = round === null ? null : { tokensPerMs: (sequences: number) => sequences, roundMs: () => round };
    const options = { ...others, microBatches: () => parts, prefillTokensMax: () => prefillBudget, speculation };
    const all = requests.map((request) => ({
      spec: {
        tenant: request.tenant,
        promptTokens: Array.from(
          { length: request.promptLength },
          (_, i) => (i * 7 + request.promptFamily * 31) % vocabularySize,
        ),
        sampling: { ...greedy, seed: BigInt(request.seed), temperature: request.temperature },
        outputTokensMax: request.outputTokensMax,
        outputTokensMin: Math.min(request.outputTokensMin, request.outputTokensMax),
        stopTokens: new Set(request.stopTokens),
        scorePrompt: request.scorePrompt || request.outputTokensMax === 0,
      },
      choices: request.choices,
      arrival: request.arrival,
      cancelAfter: request.cancelAfter,
      pauseAfter: request.pauseAfter,
    }));
    const positions = all.map(({ spec }) => spec.promptTokens.length + spec.outputTokensMax - 1);
    const blocks = Math.max(1, Math.ceil(Math.max(...positions) / options.blockTokens)) + extraBlocks;
    return { options: { ...options, blocks }, requests: all.filter((_, i) => positions[i]! > 0), turns };
  });

/** Runs a workload to its end and checks all that must hold; returns what it saw. */
function simulate({ options, requests, turns }: Workload) {
  const { scheduler, pool } = makeScheduler(options);
  const worker = new SimulatedWorker(options);
  const live: { sequence: Sequence; request: Workload['requests'][number]; born: number; choice: number; cancelled: boolean }[] =
    [];
  const waitingRequests = [...requests].sort((a, b) => a.arrival - b.arrival);
  const admitted: number[] = [];
  const neverHeld: number[] = [];
  let turn = 0;
  let useless = 0;
  for (; waitingRequests.length > 0 || live.some(({ sequence }) => sequence.state !== 'finished'); turn++) {
    if (turn > 20_000) throw new Error('a request did not end');
    while (waitingRequests[0] !== undefined && waitingRequests[0].arrival <= turn) {
      const request = waitingRequests.shift()!;
      let leader: Sequence | null = null;
      for (let choice = 0; choice < request.choices; choice++) {
        const sampling = { ...request.spec.sampling, choice };
        const sequence = scheduler.add(
          {
            ...request.spec,
            sampling,
            scorePrompt: request.spec.scorePrompt && (choice === 0 || request.spec.outputTokensMax === 0),
          },
          leader,
        );
        if (sequence.state === 'waiting' && request.pauseAfter === null) neverHeld.push(sequence.id);
        live.push({ sequence, request, born: turn, choice, cancelled: false });
        leader ??= sequence;
      }
    }
    for (const entry of live) {
      const { sequence, request, born } = entry;
      if (sequence.state === 'finished') continue;
      if (request.cancelAfter !== null && turn - born > request.cancelAfter) {
        const used = new Set(sequence.blocks.filter((block) => pool.references(block) === 1));
        const free = pool.free;
        scheduler.end(sequence);
        expect(pool.free).toBe(free + used.size);
        entry.cancelled = true;
      } else if (request.pauseAfter !== null && turn - born === request.pauseAfter) scheduler.pause(sequence);
      else if (request.pauseAfter !== null && turn - born === request.pauseAfter + 25) scheduler.resume(sequence);
    }

    const preferPlan = turns[turn % turns.length]!;
    const plan = preferPlan || worker.stepsInFlight === 0 ? scheduler.schedule(turn) : null;
    if (plan !== null) {
      worker.publish(plan);
      const bySlot = new Map(scheduler.running.map((sequence) => [sequence.slot, sequence]));
      for (const { slot } of plan.opened) {
        const sequence = bySlot.get(slot)!;
        if (sequence.preemptions === 0) admitted.push(sequence.id);
      }
      useless = 0;
    } else if (worker.stepsInFlight > 0) {
      scheduler.complete(worker.take());
      useless = 0;
    } else {
      const active = live.filter(({ sequence }) => sequence.state !== 'finished' && !sequence.paused);
      expect(active, 'nothing in flight, nothing planned, but sequences that could run').toHaveLength(0);
      useless++;
      expect(useless).toBeLessThan(200);
    }
    scheduler.check();
  }
  while (worker.stepsInFlight > 0) scheduler.complete(worker.take());
  expect(pool.used).toBe(0);
  pool.check([]);
  expect(scheduler.counts()).toMatchObject({ waiting: 0, running: 0, stepsInFlight: 0 });

  for (const { sequence, request, choice, cancelled } of live) {
    const tokens = expectedTokens({ ...request.spec, sampling: { ...request.spec.sampling, choice } });
    const outputs = sequence.tokens.slice(sequence.promptLength);
    expect(outputs).toEqual(cancelled ? tokens.slice(0, outputs.length) : tokens);
    if (sequence.scorePrompt && !cancelled) {
      expect(sequence.promptScores.slice(1).map((score) => score?.logprob)).toEqual(expectedScores(sequence.promptTokens));
    }
  }
  // Of those that only ever waited, one was admitted before another that came earlier only where that one has patience with it.
  const order = admitted
    .filter((id) => neverHeld.includes(id))
    .map((id) => live.find(({ sequence }) => sequence.id === id)!.sequence);
  for (const [i, sequence] of order.entries()) {
    const passed = order.slice(i + 1).filter(({ id }) => id < sequence.id);
    for (const other of passed) expect(sequence.promptLength).toBeLessThan(other.promptLength);
  }
  return { counts: scheduler.counts() };
}

describe('scheduler under random workloads', () => {
  it('scheduler - ends every request with the tokens it gets alone, whatever the budget, cache, stages and steps in flight', () => {
    const seen = { preemptions: 0, cachedTokens: 0, rowsWasted: 0, draftTokens: 0, draftTokensAccepted: 0 };
    fc.assert(
      fc.property(workload, (work) => {
        const { counts } = simulate(work);
        for (const name of Object.keys(seen) as (keyof typeof seen)[]) seen[name] += counts[name];
      }),
      { numRuns: 300 },
    );
    // The workloads are hard enough to show something.
    expect(Math.min(seen.preemptions, seen.cachedTokens, seen.rowsWasted, seen.draftTokensAccepted)).toBeGreaterThan(100);
    expect(seen.draftTokens - seen.draftTokensAccepted).toBeGreaterThan(100);
  });
});
