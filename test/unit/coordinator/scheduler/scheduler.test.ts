import { describe, expect, it } from 'vitest';
import type { PromptDemand } from '../../../../coordinator/scheduler/scheduler.ts';
import type { StepPlan } from '../../../../protocol/step-plan.ts';
import { greedy, makeScheduler, makeSequence, resultOf, type MakeScheduler } from './make-scheduler.ts';

/** slot: rows, as `0: 5..8` for literal tokens of positions 5 to 8, `0: 9 after 3` for a row that takes the token of step 3. */
const rowsOf = (plan: StepPlan | null): string[] | null =>
  plan &&
  plan.sequences.map(({ slot, position, tokens, after }) =>
    tokens === null ? `${slot}: ${position} after ${after}` : `${slot}: ${position}..${position + tokens.length - 1}`,
  );

describe('scheduler', () => {
  it('scheduler - plans a whole prompt that fits, then one row a step with the token that came back', () => {
    const { scheduler } = makeScheduler();
    const sequence = scheduler.add(makeSequence({ promptTokens: 20, outputTokensMax: 3 }));
    const first = scheduler.schedule(5)!;
    expect(first).toEqual({
      type: 'step_plan',
      placement: 'placement',
      epoch: 1,
      step: 1,
      opened: [{ slot: 0, sampling: greedy, promptTokens: [], outputTokens: [] }],
      closed: [],
      sequences: [
        {
          slot: 0,
          position: 0,
          tokens: sequence.promptTokens,
          after: 0,
          newBlocks: [0, 1],
          outputs: [{ row: 19, score: null, banned: [] }],
        },
      ],
      waitTimeoutMs: 2000,
      resultWaits: false,
    });
    expect(sequence.admittedAt).toBe(5);
    expect(scheduler.schedule(6)).toBeNull();
    expect(scheduler.complete(resultOf(first, 42))).toMatchObject([
      { promptComputed: true, output: { token: 42 }, finished: null },
    ]);
    const second = scheduler.schedule(7)!;
    expect(second.opened).toEqual([]);
    expect(second.sequences).toEqual([
      { slot: 0, position: 20, tokens: [42], after: 0, newBlocks: [], outputs: [{ row: 0, score: null, banned: [] }] },
    ]);
    expect(scheduler.complete(resultOf(second, 43))).toMatchObject([{ promptComputed: false, finished: null }]);
    expect(scheduler.complete(resultOf(scheduler.schedule(8)!, 44))).toMatchObject([{ finished: 'length' }]);
    expect(sequence.tokens.slice(20)).toEqual([42, 43, 44]);
    expect(scheduler.schedule(9)).toBeNull();
  });

  it('scheduler - counts the last token of a prompt as one of the prompt, and the row behind it not', () => {
    const { scheduler } = makeScheduler({ prefillChunkMax: 19 });
    scheduler.add(makeSequence({ promptTokens: 20, outputTokensMax: 2 }));
    const counts: number[] = [];
    for (let step = 0; step < 3; step++) {
      const plan = scheduler.schedule(step)!;
      counts.push(scheduler.plannedPromptTokens);
      scheduler.complete(resultOf(plan));
    }
    expect(counts).toEqual([19, 1, 0]);
  });

  it('scheduler - plans the next row before the result is back, and never more rows than output tokens', () => {
    const { scheduler } = makeScheduler({ stepsInFlightMax: 3, sequenceStepsMax: 3 });
    scheduler.add(makeSequence({ promptTokens: 16, outputTokensMax: 3 }));
    const plans = [scheduler.schedule(0), scheduler.schedule(0), scheduler.schedule(0)];
    expect(plans.map(rowsOf)).toEqual([['0: 0..15'], ['0: 16 after 1'], ['0: 17 after 2']]);
    // Position 16 opens the second block.
    expect(plans.map((plan) => plan!.sequences[0]!.newBlocks)).toEqual([[0], [1], []]);
    scheduler.complete(resultOf(plans[0]!));
    expect(scheduler.schedule(0)).toBeNull();
  });

  it('scheduler - decodes first and fills the budget with chunks of the prompts', () => {
    const { scheduler } = makeScheduler({ stepTokensMax: 24, prefillChunkMax: 16 });
    scheduler.add(makeSequence({ promptTokens: 8 }));
    scheduler.add(makeSequence({ promptTokens: 40 }));
    scheduler.add(makeSequence({ promptTokens: 40 }));
    const first = scheduler.schedule(0)!;
    expect(rowsOf(first)).toEqual(['0: 0..7', '1: 0..15']);
    expect(first.sequences.map(({ outputs }) => outputs.length)).toEqual([1, 0]);
    scheduler.complete(resultOf(first));
    const second = scheduler.schedule(0)!;
    expect(rowsOf(second)).toEqual(['0: 8..8', '1: 16..31', '2: 0..6']);
    scheduler.complete(resultOf(second));
    expect(rowsOf(scheduler.schedule(0))).toEqual(['0: 9..9', '1: 32..39', '2: 7..21']);
  });

  it('scheduler - lets decoding sequences take turns when the budget is short, and prefill goes on', () => {
    const { scheduler } = makeScheduler({ stepTokensMax: 4 });
    for (let i = 0; i < 4; i++) scheduler.add(makeSequence({ promptTokens: 1, outputTokensMax: 9 }));
    scheduler.complete(resultOf(scheduler.schedule(0)!));
    scheduler.add(makeSequence({ promptTokens: 6 }));
    const seen: (string[] | null)[] = [];
    for (let i = 0; i < 2; i++) {
      const plan = scheduler.schedule(0)!;
      seen.push(rowsOf(plan));
      scheduler.complete(resultOf(plan));
    }
    // Four rows for four sequences: the fifth is not admitted until there is budget.
    expect(seen).toEqual([
      ['0: 1..1', '1: 1..1', '2: 1..1', '3: 1..1'],
      ['0: 2..2', '1: 2..2', '2: 2..2', '3: 2..2'],
    ]);
    scheduler.end(scheduler.running[3]!);
    for (let i = 0; i < 2; i++) {
      const plan = scheduler.schedule(0)!;
      seen.push(rowsOf(plan));
      scheduler.complete(resultOf(plan));
    }
    expect(seen.slice(2)).toEqual([
      ['0: 3..3', '1: 3..3', '2: 3..3', '3: 0..0'],
      ['0: 4..4', '1: 4..4', '2: 4..4', '3: 1..1'],
    ]);
  });

  it('scheduler - admits in order of arrival, and nobody overtakes a long prompt that has no room yet', () => {
    const { scheduler } = makeScheduler({ blocks: 4 });
    scheduler.add(makeSequence({ promptTokens: 32, outputTokensMax: 1 }));
    scheduler.add(makeSequence({ promptTokens: 48, outputTokensMax: 1 }));
    scheduler.add(makeSequence({ promptTokens: 16, outputTokensMax: 1 }));
    const first = scheduler.schedule(0)!;
    expect(rowsOf(first)).toEqual(['0: 0..31']);
    expect(scheduler.waitingCount).toBe(2);
    scheduler.complete(resultOf(first));
    expect(rowsOf(scheduler.schedule(0))).toEqual(['0: 0..47']);
  });

  it('scheduler - preempts the newest running sequence when no block is free', () => {
    const { scheduler, pool } = makeScheduler({ blocks: 3, blockTokens: 16 });
    const oldest = scheduler.add(makeSequence({ promptTokens: 16, outputTokensMax: 20, firstToken: 100 }));
    const newest = scheduler.add(makeSequence({ promptTokens: 15, outputTokensMax: 20, firstToken: 200 }));
    let plan = scheduler.schedule(0)!;
    expect(plan.sequences.map(({ newBlocks }) => newBlocks)).toEqual([[0], [1]]);
    scheduler.complete(resultOf(plan, 7));
    // The oldest takes the last block; the newest still has room in its own.
    plan = scheduler.schedule(0)!;
    expect(rowsOf(plan)).toEqual(['0: 16..16', '1: 15..15']);
    expect(plan.sequences.map(({ newBlocks }) => newBlocks)).toEqual([[2], []]);
    scheduler.complete(resultOf(plan, 8));
    // The newest needs a second block and is itself the newest.
    plan = scheduler.schedule(0)!;
    expect(rowsOf(plan)).toEqual(['0: 17..17']);
    expect([newest.state, newest.preemptions, oldest.state]).toEqual(['preempted', 1, 'running']);
    expect(pool.references(1)).toBe(0);
    scheduler.complete(resultOf(plan, 9));
    // Its slot is closed; it comes back, with its output, once the oldest has ended.
    expect(scheduler.schedule(0)!.closed).toEqual([1]);
    scheduler.end(oldest);
    scheduler.complete({ ...resultOf(plan, 9), step: 4, outputs: [{ slot: 0, token: 1, logprob: null, top: [] }] });
    plan = scheduler.schedule(0)!;
    expect(plan.closed).toEqual([0]);
    expect(rowsOf(plan)).toEqual(['0: 0..16']);
    expect(plan.sequences[0]!.tokens!.slice(14)).toEqual([214, 7, 8]);
    expect(plan.sequences[0]!.outputs).toEqual([{ row: 16, score: null, banned: [] }]);
  });

  it('scheduler - ignores what a step in flight brings for a sequence that was preempted', () => {
    const { scheduler } = makeScheduler({ blocks: 3, stepsInFlightMax: 2, sequenceStepsMax: 2 });
    const oldest = scheduler.add(makeSequence({ promptTokens: 16, outputTokensMax: 20 }));
    const newest = scheduler.add(makeSequence({ promptTokens: 16, outputTokensMax: 20 }));
    const first = scheduler.schedule(0)!;
    const second = scheduler.schedule(0)!;
    expect([rowsOf(first), rowsOf(second)]).toEqual([['0: 0..15', '1: 0..15'], ['0: 16 after 1']]);
    expect(newest.state).toBe('preempted');
    expect(scheduler.complete(resultOf(first)).map(({ sequence }) => sequence)).toEqual([oldest]);
    expect(newest.tokens).toHaveLength(16);
    expect(scheduler.counts().rowsWasted).toBe(16);
  });

  it('scheduler - frees the blocks of a cancelled sequence at once and its slot after its last step', () => {
    const { scheduler, pool } = makeScheduler({ stepsInFlightMax: 2, sequenceStepsMax: 2, sequencesMax: 1 });
    const cancelled = scheduler.add(makeSequence({ promptTokens: 48 }));
    scheduler.add(makeSequence({ promptTokens: 16 }));
    const first = scheduler.schedule(0)!;
    expect(pool.used).toBe(3);
    scheduler.end(cancelled);
    expect(pool.used).toBe(0);
    // Its only slot is still in a step in flight.
    expect(scheduler.schedule(0)).toBeNull();
    expect(scheduler.complete(resultOf(first))).toEqual([]);
    const next = scheduler.schedule(0)!;
    expect(next.closed).toEqual([0]);
    expect(next.opened.map(({ slot }) => slot)).toEqual([0]);
    expect(next.step).toBe(2);
  });

  it('scheduler - ends a sequence at a stop token and wastes only the row that was planned behind it', () => {
    const { scheduler, pool } = makeScheduler({ stepsInFlightMax: 2, sequenceStepsMax: 2 });
    const sequence = scheduler.add(makeSequence({ promptTokens: 16, stopTokens: [7] }));
    const first = scheduler.schedule(0)!;
    const second = scheduler.schedule(0)!;
    expect(scheduler.complete(resultOf(first, 7))).toMatchObject([{ output: { token: 7 }, finished: 'stop' }]);
    expect([sequence.state, pool.used]).toEqual(['finished', 0]);
    expect(scheduler.schedule(0)).toBeNull();
    expect(scheduler.complete(resultOf(second, 9))).toEqual([]);
    expect(sequence.tokens.at(-1)).toBe(7);
    expect(scheduler.counts()).toMatchObject({ rowsPlanned: 17, rowsWasted: 1 });
  });

  it('scheduler - bans stop tokens below the smallest number of output tokens, also for tokens not known yet', () => {
    const { scheduler } = makeScheduler({ stepsInFlightMax: 3, sequenceStepsMax: 3 });
    scheduler.add(makeSequence({ outputTokensMin: 2, stopTokens: [7, 9] }));
    const banned = [0, 1, 2].map(() => scheduler.schedule(0)!.sequences[0]!.outputs[0]!.banned);
    expect(banned).toEqual([[7, 9], [7, 9], []]);
  });

  it('scheduler - shares cached blocks and computes at least the last prompt token', () => {
    const { scheduler, pool } = makeScheduler({ cache: true });
    scheduler.add(makeSequence({ promptTokens: 48 }));
    scheduler.complete(resultOf(scheduler.schedule(0)!));
    const same = scheduler.add(makeSequence({ promptTokens: 48 }));
    const other = scheduler.add(makeSequence({ promptTokens: 48, tenant: 'other' }));
    const plan = scheduler.schedule(0)!;
    expect(rowsOf(plan)).toEqual(['0: 48..48', '1: 32..47', '2: 0..46']);
    expect(plan.sequences[1]!.newBlocks).toEqual([0, 1, 4]);
    expect([same.cachedTokens, other.cachedTokens]).toEqual([32, 0]);
    expect([0, 1, 2].map((block) => pool.references(block))).toEqual([2, 2, 1]);
    expect(scheduler.counts()).toMatchObject({ promptTokens: 144, cachedTokens: 32 });
  });

  it('scheduler - lets nobody find a block whose step has not come back', () => {
    const { scheduler } = makeScheduler({
      cache: true,
      stepTokensMax: 200,
      prefillChunkMax: 200,
      stepsInFlightMax: 2,
      sequenceStepsMax: 2,
    });
    scheduler.add(makeSequence({ promptTokens: 48 }));
    scheduler.schedule(0);
    scheduler.add(makeSequence({ promptTokens: 48 }));
    expect(rowsOf(scheduler.schedule(0))).toEqual(['0: 48 after 1', '1: 0..47']);
  });

  it('scheduler - forgets every cached block when the epoch fails', () => {
    const { scheduler, pool, cache } = makeScheduler({ cache: true });
    const sequence = scheduler.add(makeSequence({ promptTokens: 48 }));
    scheduler.complete(resultOf(scheduler.schedule(0)!));
    scheduler.schedule(0);
    expect(cache!.size).toBe(3);
    scheduler.abandon();
    expect([cache!.size, pool.used, sequence.state, scheduler.stepsInFlight]).toEqual([0, 0, 'finished', 0]);
    pool.check([]);
  });

  it('scheduler - scores every prompt token once, within the output budget, without reading the cache', () => {
    const { scheduler } = makeScheduler({ cache: true, stepOutputsMax: 20, blockTokens: 16 });
    scheduler.add(makeSequence({ promptTokens: 33, outputTokensMax: 1 }));
    scheduler.complete(resultOf(scheduler.schedule(0)!));
    const scored = scheduler.add(makeSequence({ promptTokens: 33, outputTokensMax: 1, scorePrompt: true }));
    const first = scheduler.schedule(0)!;
    expect(rowsOf(first)).toEqual(['0: 0..19']);
    expect(first.sequences[0]!.outputs[19]).toEqual({ row: 19, score: 120, banned: [] });
    scheduler.complete(resultOf(first));
    const second = scheduler.schedule(0)!;
    expect(rowsOf(second)).toEqual(['0: 20..32']);
    expect(second.sequences[0]!.outputs.map(({ score }) => score)).toEqual([
      121,
      122,
      123,
      124,
      125,
      126,
      127,
      128,
      129,
      130,
      131,
      132,
      null,
    ]);
    expect(scheduler.complete(resultOf(second))).toMatchObject([{ promptComputed: true, finished: 'length' }]);
    expect(scored.promptScores.map((score) => score?.token)).toEqual([undefined, ...scored.promptTokens.slice(1)]);
    expect([scored.scoresMissing, scored.cachedTokens]).toEqual([0, 0]);
  });

  it('scheduler - scores a prompt without any output, and does not compute its last token', () => {
    const { scheduler } = makeScheduler();
    scheduler.add(makeSequence({ promptTokens: 17, outputTokensMax: 0, scorePrompt: true }));
    const plan = scheduler.schedule(0)!;
    expect(rowsOf(plan)).toEqual(['0: 0..15']);
    expect(plan.sequences[0]!.newBlocks).toEqual([0]);
    expect(scheduler.complete(resultOf(plan))).toMatchObject([{ promptComputed: true, output: null, finished: 'length' }]);
  });

  it('scheduler - computes the prompt of several choices once', () => {
    const { scheduler } = makeScheduler({ cache: true });
    const leader = scheduler.add(makeSequence({ promptTokens: 40 }));
    const second = scheduler.add(makeSequence({ promptTokens: 40 }), leader);
    const later = scheduler.add(makeSequence({ promptTokens: 16, firstToken: 500 }));
    expect([second.state, scheduler.waitingCount]).toEqual(['held', 3]);
    const first = scheduler.schedule(0)!;
    expect(rowsOf(first)).toEqual(['0: 0..39', '1: 0..15']);
    scheduler.complete(resultOf(first));
    expect(later.state).toBe('running');
    expect(rowsOf(scheduler.schedule(0))).toEqual(['0: 40..40', '1: 16..16', '2: 32..39']);
    expect(second.cachedTokens).toBe(32);
  });

  it('scheduler - lets the other choices compute the prompt themselves when the first one ends early', () => {
    const { scheduler } = makeScheduler();
    const leader = scheduler.add(makeSequence({ promptTokens: 16 }));
    const follower = scheduler.add(makeSequence({ promptTokens: 16 }), leader);
    scheduler.end(leader);
    expect([follower.state, scheduler.waitingCount]).toEqual(['waiting', 1]);
    expect(rowsOf(scheduler.schedule(0))).toEqual(['0: 0..15']);
  });

  it('scheduler - splits decoding sequences evenly over disjoint micro-batches', () => {
    const { scheduler } = makeScheduler({ microBatches: () => 3, stepsInFlightMax: 3 });
    for (let i = 0; i < 7; i++) scheduler.add(makeSequence({ promptTokens: 1, outputTokensMax: 9 }));
    scheduler.complete(resultOf(scheduler.schedule(0)!));
    const plans = [scheduler.schedule(0)!, scheduler.schedule(0)!, scheduler.schedule(0)!];
    const slots = plans.map((plan) => plan.sequences.map(({ slot }) => slot));
    expect(slots).toEqual([
      [0, 1, 2],
      [3, 4],
      [5, 6],
    ]);
    expect(scheduler.schedule(0)).toBeNull();
    scheduler.complete(resultOf(plans[0]!));
    expect(rowsOf(scheduler.schedule(0))).toEqual(['0: 2..2', '1: 2..2', '2: 2..2']);
  });

  it('scheduler - two sequences on three micro-batches follow each other, each waiting for its own token only', () => {
    const { scheduler } = makeScheduler({ microBatches: () => 3, stepsInFlightMax: 6, sequenceStepsMax: 2 });
    for (let i = 0; i < 2; i++) scheduler.add(makeSequence({ promptTokens: 1, outputTokensMax: 9 }));
    scheduler.complete(resultOf(scheduler.schedule(0)!));
    const plans = Array.from({ length: 4 }, () => scheduler.schedule(0)!);
    expect(plans.map(({ sequences }) => sequences.map(({ slot, after }) => [slot, after]))).toEqual([
      [[0, 0]],
      [[1, 0]],
      [[0, 2]],
      [[1, 3]],
    ]);
    expect(scheduler.schedule(0)).toBeNull();
  });

  it('scheduler - on several stages a sequence that had all steps to itself takes turns with the next one at once', () => {
    const { scheduler } = makeScheduler({ microBatches: () => 4, stepsInFlightMax: 8, sequenceStepsMax: 2 });
    const slots: number[] = [];
    const inFlight: StepPlan[] = [];
    const plan = () => {
      for (let next = scheduler.schedule(0); next !== null; next = scheduler.schedule(0)) {
        inFlight.push(next);
        slots.push(...next.sequences.map(({ slot }) => slot));
      }
    };
    scheduler.add(makeSequence({ promptTokens: 1, outputTokensMax: 20 }));
    plan();
    scheduler.complete(resultOf(inFlight.shift()!));
    plan();
    scheduler.add(makeSequence({ promptTokens: 1, outputTokensMax: 20, firstToken: 500 }));
    for (let i = 0; i < 9; i++) {
      plan();
      scheduler.complete(resultOf(inFlight.shift()!));
    }
    // The first step of each is its prompt's.
    expect(slots.join('')).toBe('0001010101010');
  });

  it('scheduler - sequences with steps of their own share them once fewer micro-batches are enough', () => {
    let parts = 4;
    const { scheduler } = makeScheduler({ microBatches: () => parts, stepsInFlightMax: 8, sequenceStepsMax: 2 });
    for (let i = 0; i < 4; i++) scheduler.add(makeSequence({ promptTokens: 1, outputTokensMax: 60 }));
    const sizes: number[] = [];
    const inFlight: StepPlan[] = [];
    for (let i = 0; i < 24; i++) {
      if (i === 12) parts = 2;
      for (let next = scheduler.schedule(0); next !== null; next = scheduler.schedule(0)) {
        inFlight.push(next);
        sizes.push(next.sequences.length);
      }
      scheduler.complete(resultOf(inFlight.shift()!));
    }
    expect(sizes.join('')).toBe('411111111111111111122222222');
  });

  it('scheduler - prompt tokens beside decode rows are bounded by what the rows allow, alone they are not', () => {
    const { scheduler } = makeScheduler({ prefillTokensMax: ({ decodeRows }) => (decodeRows === 0 ? 1_000 : 10 * decodeRows) });
    scheduler.add(makeSequence({ promptTokens: 40, outputTokensMax: 9 }));
    const first = scheduler.schedule(0)!;
    expect(rowsOf(first)).toEqual(['0: 0..39']);
    scheduler.complete(resultOf(first));
    scheduler.add(makeSequence({ promptTokens: 25, outputTokensMax: 9, firstToken: 500 }));
    for (const rows of [
      ['0: 40..40', '1: 0..9'],
      ['0: 41..41', '1: 10..19'],
      ['0: 42..42', '1: 20..24'],
    ]) {
      const plan = scheduler.schedule(0)!;
      expect(rowsOf(plan)).toEqual(rows);
      scheduler.complete(resultOf(plan));
    }
  });

  it('scheduler - tells how many prompts wait beside the streams that decode, those without a slot included, and what is left of the first', () => {
    const asked: PromptDemand[] = [];
    const { scheduler } = makeScheduler({ sequencesMax: 3, prefillTokensMax: (demand) => (asked.push(demand), 4) });
    scheduler.add(makeSequence({ promptTokens: 4, outputTokensMax: 9 }));
    scheduler.complete(resultOf(scheduler.schedule(0)!));
    for (let i = 0; i < 3; i++) scheduler.add(makeSequence({ promptTokens: 8, outputTokensMax: 9, firstToken: 100 * (i + 1) }));
    // Each time the prompt in front gets 4 of its 8 tokens; its second half brings its first token.
    for (let i = 0; i < 3; i++) scheduler.complete(resultOf(scheduler.schedule(0)!));
    expect(asked).toEqual([
      { decodeRows: 0, decoding: 0, waiting: 1, tokens: 4, tokensLeft: 4, completedTokens: 0, stepsSince: 0 },
      { decodeRows: 1, decoding: 1, waiting: 3, tokens: 8, tokensLeft: 8, completedTokens: 4, stepsSince: 0 },
      { decodeRows: 1, decoding: 1, waiting: 3, tokens: 8, tokensLeft: 4, completedTokens: 4, stepsSince: 1 },
      { decodeRows: 2, decoding: 2, waiting: 2, tokens: 8, tokensLeft: 8, completedTokens: 4, stepsSince: 0 },
    ]);
  });

  it('scheduler - prompts that wait for a step without any are admitted in the next one', () => {
    const { scheduler } = makeScheduler({
      prefillTokensMax: ({ decodeRows, completedTokens, stepsSince }) =>
        decodeRows * completedTokens > 0 && stepsSince < 1 ? 0 : 4,
    });
    for (let i = 0; i < 3; i++) scheduler.add(makeSequence({ promptTokens: 4, outputTokensMax: 9, firstToken: 100 * (i + 1) }));
    const planned: (string[] | null)[] = [];
    for (let i = 0; i < 5; i++) {
      const plan = scheduler.schedule(0)!;
      planned.push(rowsOf(plan));
      scheduler.complete(resultOf(plan));
    }
    expect(planned).toEqual([
      ['0: 0..3'],
      ['0: 4..4'],
      ['0: 5..5', '1: 0..3'],
      ['0: 6..6', '1: 4..4'],
      ['0: 7..7', '1: 5..5', '2: 0..3'],
    ]);
  });

  it('scheduler - a step that was given less time than its budget takes no beginning of a prompt behind one that it completes', () => {
    const { scheduler } = makeScheduler({ stepTokensMax: 64, prefillTokensMax: () => 32 });
    for (const promptTokens of [20, 8, 30]) scheduler.add(makeSequence({ promptTokens, outputTokensMax: 1 }));
    // 4 more tokens would not complete the third.
    expect(rowsOf(scheduler.schedule(0))).toEqual(['0: 0..19', '1: 0..7']);
    const { scheduler: whole } = makeScheduler({ stepTokensMax: 32 });
    for (const promptTokens of [20, 8, 30]) whole.add(makeSequence({ promptTokens, outputTokensMax: 1 }));
    expect(rowsOf(whole.schedule(0))).toEqual(['0: 0..19', '1: 0..7', '2: 0..3']);
  });

  it('scheduler - a prompt of three chunks that is under way lets seven chunks of others pass, then comes to its end', () => {
    const { scheduler } = makeScheduler({ blocks: 200, prefillChunkMax: 10, prefillTokensMax: () => 10 });
    scheduler.add(makeSequence({ promptTokens: 30, outputTokensMax: 1 }));
    const planned: string[] = [];
    for (let i = 1; i <= 14; i++) {
      const plan = scheduler.schedule(0)!;
      planned.push(`${plan.sequences[0]!.position / 10 + 1} of ${plan.sequences[0]!.tokens![0]}`);
      scheduler.complete(resultOf(plan));
      scheduler.add(makeSequence({ promptTokens: 10, outputTokensMax: 1, firstToken: 1_000 * i }));
    }
    // The eighth's place in the order is the one that the long prompt has by its patience: 30 + 4 * 20 = 110 tokens.
    const seven = [1, 2, 3, 4, 5, 6, 7].map((i) => `1 of ${1_000 * i}`);
    expect(planned).toEqual(['1 of 100', ...seven, '2 of 110', '3 of 120', '1 of 8000', '1 of 9000', '1 of 10000', '1 of 11000']);
  });

  it('scheduler - gives a paused sequence no rows, and takes its blocks before anybody waits for them', () => {
    const { scheduler } = makeScheduler({ blocks: 3 });
    const paused = scheduler.add(makeSequence({ promptTokens: 32 }));
    scheduler.complete(resultOf(scheduler.schedule(0)!));
    scheduler.pause(paused);
    expect(scheduler.schedule(0)).toBeNull();
    scheduler.add(makeSequence({ promptTokens: 20, outputTokensMax: 1, firstToken: 500 }));
    const plan = scheduler.schedule(0)!;
    expect(rowsOf(plan)).toEqual(['0: 0..19']);
    expect(plan.closed).toEqual([0]);
    expect(paused.state).toBe('preempted');
    scheduler.complete(resultOf(plan));
    expect(scheduler.schedule(0)).toBeNull();
    scheduler.resume(paused);
    expect(rowsOf(scheduler.schedule(0))).toEqual(['0: 0..32']);
  });

  it('scheduler - sends the tokens that penalties need when a sequence is opened, and no others', () => {
    const { scheduler } = makeScheduler();
    const sampling = { ...greedy, repetitionPenalty: 1.1 };
    const sequence = scheduler.add({ ...makeSequence(), promptTokens: [5, 6, 5, 5], sampling });
    scheduler.add({ ...makeSequence(), promptTokens: [5, 6], sampling: { ...greedy, presencePenalty: 1 } });
    sequence.tokens.push(9);
    expect(scheduler.schedule(0)!.opened.map(({ promptTokens, outputTokens }) => [promptTokens, outputTokens])).toEqual([
      [[5, 6], [9]],
      [[], []],
    ]);
  });

  it('scheduler - refuses a result that is not of the oldest step or not shaped like its plan, and changes nothing', () => {
    const { scheduler } = makeScheduler({ stepsInFlightMax: 2, sequenceStepsMax: 2 });
    const sequence = scheduler.add(makeSequence({ promptTokens: 16 }));
    const first = scheduler.schedule(0)!;
    const second = scheduler.schedule(0)!;
    const result = resultOf(first);
    expect(() => scheduler.complete(resultOf(second))).toThrow('A result of step 2 came but step 1 is the oldest in flight.');
    expect(() => scheduler.complete({ ...result, outputs: [] })).toThrow('The result of step 1 has 0 outputs, expected 1.');
    const wrongSlot = [{ ...result.outputs[0]!, slot: 3 }];
    expect(() => scheduler.complete({ ...result, outputs: wrongSlot })).toThrow(
      'Output 0 of step 1 is of slot 3 and token 7, expected slot 0.',
    );
    expect([sequence.tokens.length, scheduler.stepsInFlight]).toEqual([16, 2]);
    scheduler.complete(result);
    scheduler.complete(resultOf(second));
    expect(() => scheduler.complete(result)).toThrow('A result of step 1 came but no step is in flight.');
  });

  it('scheduler - refuses a sequence that could never fit and one with nothing to compute', () => {
    const { scheduler } = makeScheduler({ blocks: 2 });
    expect(scheduler.blocksNeeded(makeSequence({ promptTokens: 24, outputTokensMax: 9 }))).toBe(2);
    expect(() => scheduler.add(makeSequence({ promptTokens: 24, outputTokensMax: 10 }))).toThrow(
      'a sequence needs 3 blocks and the pool has 2',
    );
    expect(() => scheduler.add(makeSequence({ promptTokens: 1, outputTokensMax: 0 }))).toThrow('nothing to compute');
  });

  describe('with drafts', () => {
    /** Rounds take as long as steps: every draft pays. */
    const speculation = { tokensPerMs: (sequences: number) => sequences, roundMs: () => 1 };
    /** Prompt 10 11 12 13 10 11, which sampled 12: 13 10 11 12 ... is expected. */
    const start = (options: MakeScheduler = {}, spec: Parameters<typeof makeSequence>[0] = {}) => {
      const made = makeScheduler({ stepsInFlightMax: 3, sequenceStepsMax: 3, speculation, ...options });
      const sequence = made.scheduler.add({
        ...makeSequence({ outputTokensMax: 20, ...spec }),
        promptTokens: [10, 11, 12, 13, 10, 11],
      });
      made.scheduler.complete(resultOf(made.scheduler.schedule(0)!, 12));
      return { ...made, sequence };
    };
    const outputsOf = (plan: StepPlan, ...tokens: number[]) => ({
      ...resultOf(plan),
      outputs: tokens.map((token) => ({ slot: 0, token, logprob: null, top: [] })),
    });

    it('scheduler - plans drafts behind the newest token, and nothing before the result is here', () => {
      const { scheduler, sequence } = start();
      const plan = scheduler.schedule(0)!;
      const sample = (row: number) => ({ row, score: null, banned: [] });
      expect(plan.sequences).toEqual([
        {
          slot: 0,
          position: 6,
          tokens: [12, 13, 10, 11, 12, 13, 10, 11],
          after: 0,
          newBlocks: [],
          outputs: [0, 1, 2, 3, 4, 5, 6, 7].map(sample),
        },
      ]);
      expect(scheduler.schedule(0)).toBeNull();
      // 13 and 10 came true, 11 did not: three tokens, and rows go on behind them.
      expect(scheduler.complete(outputsOf(plan, 13, 10, 50))).toMatchObject([
        { output: { token: 13 }, finished: null },
        { output: { token: 10 }, finished: null },
        { output: { token: 50 }, finished: null },
      ]);
      expect(sequence).toMatchObject({ computed: 9, planned: 9 });
      expect(scheduler.counts()).toMatchObject({ drafts: 1, draftTokens: 7, draftTokensAccepted: 2 });
      // Nothing is known of 10 50: planned ahead again.
      expect([scheduler.schedule(0), scheduler.schedule(0)].map(rowsOf)).toEqual([['0: 9..9'], ['0: 10 after 3']]);
    });

    it('scheduler - waits for what is in flight before it drafts', () => {
      let pays = false;
      const { scheduler } = start({ speculation: { ...speculation, roundMs: () => (pays ? 1 : 9) } });
      const plans = [scheduler.schedule(0)!, scheduler.schedule(0)!];
      expect(plans.map(rowsOf)).toEqual([['0: 6..6'], ['0: 7 after 2']]);
      pays = true;
      scheduler.complete(resultOf(plans[0]!, 13));
      expect(scheduler.schedule(0)).toBeNull();
      expect(scheduler.drafting).toBe(false);
      scheduler.complete(resultOf(plans[1]!, 10));
      expect(rowsOf(scheduler.schedule(0))).toEqual(['0: 8..15']);
      expect(scheduler.drafting).toBe(true);
    });

    it('scheduler - ends at a stop token inside of a draft and at the last output token', () => {
      const stopping = start({}, { stopTokens: [10] });
      const plan = stopping.scheduler.schedule(0)!;
      // What would follow a stop token is not drafted.
      expect(plan.sequences[0]!.tokens).toEqual([12, 13]);
      expect(stopping.scheduler.complete(outputsOf(plan, 13, 10))).toMatchObject([{ finished: null }, { finished: 'stop' }]);
      expect(stopping.sequence.tokens.slice(6)).toEqual([12, 13, 10]);

      const short = start({}, { outputTokensMax: 4 });
      const last = short.scheduler.schedule(0)!;
      expect(last.sequences[0]!.tokens).toEqual([12, 13, 10]);
      expect(short.scheduler.complete(outputsOf(last, 13, 10, 11))).toMatchObject([{}, {}, { finished: 'length' }]);
    });

    it('scheduler - drafts for nobody while a prompt waits, and takes no blocks from others', () => {
      const { scheduler } = start();
      scheduler.add(makeSequence({ promptTokens: 4 }));
      expect(rowsOf(scheduler.schedule(0))).toEqual(['0: 6..6', '1: 0..3']);
      // One that came while drafts are in flight is computed beside them; where the drafting sequence goes on is not known yet.
      const late = start();
      expect(rowsOf(late.scheduler.schedule(0))).toEqual(['0: 6..13']);
      late.scheduler.add(makeSequence({ promptTokens: 4 }));
      expect(rowsOf(late.scheduler.schedule(0))).toEqual(['1: 0..3']);
      const full = start({ blocks: 3, blockTokens: 8 }, { outputTokensMax: 8 });
      const other = full.scheduler.add(makeSequence({ promptTokens: 8, outputTokensMax: 2 }));
      const plan = full.scheduler.schedule(0)!;
      const outputs = [13, 30].map((token, slot) => ({ slot, token, logprob: null, top: [] }));
      full.scheduler.complete({ ...resultOf(plan), outputs });
      expect([other.state, full.pool.free]).toEqual(['running', 1]);
      // Drafts behind position 7 would need the block that the other is about to need.
      expect(rowsOf(full.scheduler.schedule(0))).toEqual(['0: 7..7', '1: 8..8']);
    });

    it('scheduler - refuses a result that goes on behind a draft that was wrong, or ends before it', () => {
      for (const tokens of [[13, 10, 50, 12], [13], [13, 10]]) {
        const { scheduler } = start();
        const plan = scheduler.schedule(0)!;
        expect(() => scheduler.complete(outputsOf(plan, ...tokens))).toThrow(/outputs, expected/);
      }
    });
  });

  it('scheduler - plans a step of 1,024 running sequences in less than 2 ms', () => {
    const sequences = 1024;
    const { scheduler } = makeScheduler({
      blocks: 8192,
      cache: true,
      sequencesMax: sequences,
      stepTokensMax: sequences,
      stepOutputsMax: sequences,
      stepsInFlightMax: 2,
      sequenceStepsMax: 2,
    });
    for (let i = 0; i < sequences; i++) scheduler.add(makeSequence({ promptTokens: 1, firstToken: i, outputTokensMax: 100 }));
    const waiting: StepPlan[] = [scheduler.schedule(0)!];
    const times: number[] = [];
    for (let step = 0; step < 90; step++) {
      const before = performance.now();
      const plan = scheduler.schedule(0)!;
      times.push(performance.now() - before);
      expect(plan.sequences).toHaveLength(sequences);
      waiting.push(plan);
      scheduler.complete(resultOf(waiting.shift()!));
    }
    // The best of many: the machine is shared.
    expect(Math.min(...times)).toBeLessThan(2);
  });
});
