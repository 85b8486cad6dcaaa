/**
 * The real mesh service and engine over simulated workers, on a transport with faults and a clock that only the test moves. A seed is a history: workers are
 * killed and frozen, the broker goes and comes back, the coordinator is cut off, messages are lost, doubled and late. Whatever happens: every request ends
 * exactly once; one that finishes has the tokens it would have had alone; after the last fault the mesh heals by itself and all blocks are free.
 */
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { ShardmeshEngine } from '../../coordinator/engine/engine.ts';
import type { EngineEvent } from '../../coordinator/engine/engine-types.ts';
import { MeshService } from '../../coordinator/mesh/mesh-service.ts';
import { defaultMeshTimers } from '../../coordinator/mesh/mesh.ts';
import { newMeshId, newPlacementId, newWorkerId } from '../../protocol/ids.ts';
import type { SamplingParams } from '../../protocol/step-plan.ts';
import { meshSubjects } from '../../protocol/subjects.ts';
import { collect, fakeDetokenizer, makeRequest, settle } from '../unit/coordinator/engine/make-engine.ts';
import { greedy } from '../unit/coordinator/scheduler/make-scheduler.ts';
import { expectedTokens, vocabularySize, type SimulatedWorkerOptions } from '../unit/coordinator/scheduler/simulated-worker.ts';
import { FakeTime } from './fake-time.ts';
import { MemoryBus } from './memory-transport.ts';
import { Fabric, SimulatedProcess, sliceSha256 } from './simulated-process.ts';

const seeds = Number(process.env['SHARDMESH_MESH_SEEDS'] ?? 200);
const seedsPerTest = 50;
const faultsMs = 6_000;
const healMs = 8_000;
const quantumMs = 10;
let time: FakeTime;

/** Time moves on in small steps, and what waits for a promise runs between them. */
async function advance(ms: number): Promise<void> {
  for (let left = ms; left > 0; left -= quantumMs) {
    time.advance(Math.min(left, quantumMs));
    await settle();
  }
}

/** mulberry32 */
function randomOf(seed: number): (below: number) => number {
  let state = seed >>> 0;
  return (below) => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t;
    return (((t ^ (t >>> 14)) >>> 0) / 4_294_967_296) * below;
  };
}

interface Asked {
  promptTokens: number[];
  outputTokensMax: number;
  events: EngineEvent[];
  ended: boolean;
}

async function makeMesh(seed: number, stages: number, ranks: number) {
  const limits: SimulatedWorkerOptions = {
    blocks: 48,
    blockTokens: 4,
    sequencesMax: 6,
    stepTokensMax: 32,
    prefillChunkMax: 16,
    stepOutputsMax: 32,
    stepsInFlightMax: stages === 1 ? 2 : stages + 1,
    sequenceStepsMax: stages + 1,
  };
  const bus = new MemoryBus({ seed });
  const meshId = newMeshId();
  const subjects = meshSubjects(meshId);
  const range = { from: 0, to: 1 };
  const rank = { worker: '', attentionUnits: range, feedForwardUnits: range, vocabularyUnits: range };
  const seats = Array.from({ length: stages * ranks }, (_, i) => ({ stage: Math.floor(i / ranks), rank: i % ranks }));
  const coordinator = bus.connect('coordinator');
  const fatal: Error[] = [];
  const events: string[] = [];
  const service = await MeshService.start({
    transport: coordinator,
    meshId,
    onFatal: (error) => fatal.push(error),
    event: (name, fields) => events.push(`${Math.round(performance.now())} ${name} ${JSON.stringify(fields)}`),
    mesh: {
      model: 'm',
      link: 'auto',
      wire: 'f32',
      bits: 'exact',
      seats,
      placementTemplate: {
        stages: Array.from({ length: stages }, () => ({
          layers: range,
          ranks: Array.from({ length: ranks }, () => ({ ...rank })),
        })),
      },
      protocol: { min: 1, max: 1 },
      placementId: newPlacementId(),
      newLinkKey: () => '00'.repeat(32),
      sliceSha256For: () => sliceSha256,
      timers: defaultMeshTimers,
      assignFor: () => ({
        model: '{}',
        sourceSha256: sliceSha256,
        sliceSha256,
        modelPath: '',
        weightsAddress: '127.0.0.1:1',
        executor: 'cpu',
        isa: null,
        cores: [],
        spin: false,
        blockTokens: 16,
        kvBlocks: 0,
        kvCacheBytes: 1 << 20,
        bits: 'exact' as const,
        activations: 'int8' as const,
        kvType: 'auto' as const,
        contextTokensMax: 64,
        stepTokensMax: 32,
        sequencesMax: 6,
      }),
    },
  });
  const engine = new ShardmeshEngine({
    text: { detokenizer: fakeDetokenizer, endTokens: [], bosToken: 1, vocabularySize },
    transport: service,
    modelSha256: 'ab',
    activations: 'int8',
    kvType: 'int8',
    prefixCacheSecret: new Uint8Array(32),
    contextTokensMax: 64,
    blockTokens: 4,
    sequencesMax: limits.sequencesMax,
    stepTokensMax: limits.stepTokensMax,
    prefillChunkMax: limits.prefillChunkMax,
    stepOutputsMax: limits.stepOutputsMax,
    // Half of the histories have drafts.
    speculation: seed % 2 === 0,
  });
  const fabric = new Fabric();
  const start = (worker = newWorkerId()): SimulatedProcess => new SimulatedProcess({ worker, bus, subjects, fabric, limits });
  const workers = seats.map(() => newWorkerId());
  const processes = workers.map((worker) => start(worker));
  const asked: Asked[] = [];
  const ask = (promptTokens: number[], outputTokensMax: number): Asked | null => {
    try {
      const deadlineAt = performance.now() + 60_000;
      const handle = engine.submit(
        makeRequest({ promptTokens, sampling: samplingOf(promptTokens), outputTokensMax, deadlineAt }),
      );
      const { events: seen, done } = collect(handle.events);
      const one: Asked = { promptTokens, outputTokensMax, events: seen, ended: false };
      void done.then(() => (one.ended = true));
      asked.push(one);
      return one;
    } catch (error) {
      // Not accepted (no epoch, queue full): said at once, by a thrown error.
      expect((error as { code?: string }).code).toMatch(/^(mesh_unavailable|queue_full)$/);
      return null;
    }
  };
  return { bus, coordinator, service, engine, workers, processes, start, ask, asked, fatal, events };
}

/** Every other text repeats itself: it has drafts. */
const samplingOf = (promptTokens: number[]): SamplingParams => ({ ...greedy, temperature: promptTokens.length % 2 ? 2 : 0 });

function checkEnded({ promptTokens, outputTokensMax, events, ended }: Asked): 'finished' | 'error' {
  expect(ended).toBe(true);
  const ends = events.filter(({ type }) => type === 'finished' || type === 'error');
  expect(ends).toHaveLength(1);
  expect(events.at(-1)).toBe(ends[0]);
  const tokens = events.flatMap((event) => (event.type === 'token' ? [event.token] : []));
  const expected = expectedTokens({
    promptTokens,
    sampling: samplingOf(promptTokens),
    outputTokensMax,
    outputTokensMin: 0,
    stopTokens: new Set(),
  });
  if (ends[0]?.type === 'finished') {
    expect(tokens).toEqual(expected);
    return 'finished';
  }
  // What came before the error was right.
  expect(tokens).toEqual(expected.slice(0, tokens.length));
  return 'error';
}

interface Sums {
  finished: number;
  failed: number;
  epochs: number;
  stale: number;
  drafts: number;
}

async function runHistory(seed: number): Promise<Sums> {
  const random = randomOf(seed);
  const pick = (count: number): number => Math.floor(random(count));
  const stages = 1 + pick(3);
  const mesh = await makeMesh(seed, stages, 1 + pick(3));
  const { bus, service, engine, workers, processes, start, ask, asked } = mesh;
  await advance(500);
  expect(service.mesh.serving).not.toBeNull();

  // A third of the histories have an unreliable broker besides.
  if (seed % 3 === 0)
    bus.faults = {
      delayMs: seed % 2 ? [0, 3] : [1, 1],
      dropRate: random(0.01),
      duplicateRate: random(0.02),
      applies: () => true,
    };
  const thaws: (() => void)[] = [];
  const fault = (): void => {
    const index = pick(workers.length);
    const process = processes[index]!;
    const worker = workers[index]!;
    switch (pick(5)) {
      case 0:
        process.kill();
        // The parent sees the exit at once, or the broker tells that the connection has ended.
        if (pick(2)) service.mesh.workerGone(worker, 'killed', performance.now());
        else service.connectionEnded(worker, 'Client Closed');
        setTimeout(() => (processes[index] = start(worker)), 100 + random(500));
        return;
      case 1:
        process.freeze();
        thaws.push(() => process.thaw());
        setTimeout(() => process.thaw(), 200 + random(5_000));
        return;
      case 2:
        bus.setUp(false);
        setTimeout(() => bus.setUp(true), 50 + random(1_500));
        return;
      case 3:
        mesh.coordinator.setCut(true);
        setTimeout(() => mesh.coordinator.setCut(false), 50 + random(1_500));
        return;
      default:
        process.transport.setCut(true);
        setTimeout(() => process.transport.setCut(false), 50 + random(4_000));
    }
  };
  const faults = 1 + pick(4);
  for (let i = 0; i < faults; i++) setTimeout(fault, random(faultsMs));
  const until = performance.now() + faultsMs;
  while (performance.now() < until) {
    if (service.ready && asked.filter(({ ended }) => !ended).length < 8)
      ask(
        Array.from({ length: 1 + pick(24) }, () => pick(vocabularySize)),
        1 + pick(24),
      );
    await advance(20 + random(150));
  }

  // The last fault has passed: all heals by itself, and what comes then finishes.
  await advance(5_500);
  bus.faults = { delayMs: [0, 0], dropRate: 0, duplicateRate: 0, applies: () => true };
  await advance(healMs);
  expect(service.mesh.reason()).toBeNull();
  const last = ask([1, 2, 3], 5);
  await advance(2_000);
  expect(last && checkEnded(last), JSON.stringify([last?.events.at(-1), ...mesh.events.slice(-12)], null, 1)).toBe('finished');
  const ends = asked.map(checkEnded);
  const numbers = engine.numbers();
  expect(numbers.requestsLive).toBe(0);
  expect(numbers.requestsFinished + numbers.requestsFailed).toBe(asked.length);
  expect(numbers.kvBlocksUsed - numbers.kvBlocksCached).toBeLessThanOrEqual(0);
  expect(numbers.stepsInFlight).toBe(0);
  expect(mesh.fatal).toEqual([]);
  service.stop();
  for (const process of processes) process.kill();
  return {
    finished: ends.filter((end) => end === 'finished').length,
    failed: ends.filter((end) => end === 'error').length,
    epochs: service.mesh.epoch,
    stale: numbers.staleResults + service.mesh.staleMessages + processes.reduce((sum, process) => sum + process.stalePlans, 0),
    drafts: numbers.draftTokensAccepted,
  };
}

beforeEach(() => void (time = new FakeTime()));
afterEach(() => time.dispose());

describe('mesh under faults', () => {
  for (let first = 1; first <= seeds; first += seedsPerTest)
    it(`mesh seeds ${first} to ${first + seedsPerTest - 1} - every request ends once, with the right tokens, and the mesh heals`, async () => {
      const sums: Sums = { finished: 0, failed: 0, epochs: 0, stale: 0, drafts: 0 };
      for (let seed = first; seed < first + seedsPerTest; seed++) {
        time.clearTimers();
        try {
          const history = await runHistory(seed);
          for (const name of Object.keys(sums) as (keyof Sums)[]) sums[name] += history[name];
        } catch (error) {
          throw new Error(`seed ${seed}: ${(error as Error).message}`, { cause: error });
        }
      }
      // The histories did something: requests finished and failed, epochs ended, old messages came, drafts were right.
      expect(sums.finished).toBeGreaterThan(20 * seedsPerTest);
      expect(sums.failed).toBeGreaterThan(seedsPerTest);
      expect(sums.epochs).toBeGreaterThan(2 * seedsPerTest);
      expect(sums.stale).toBeGreaterThan(seedsPerTest);
      expect(sums.drafts).toBeGreaterThan(seedsPerTest / 2);
    });
});
