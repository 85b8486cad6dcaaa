import fc from 'fast-check';
import { pack } from 'msgpackr';
import { describe, expect, test } from 'vitest';
import { ProtocolError, ShardmeshError } from '../../../protocol/errors.ts';
import { packStep } from '../../../protocol/step-codec.ts';
import { commonProtocol } from '../../../protocol/handshake.ts';
import { decodeCoordinatorMessage, decodeMessage, decodeWorkerMessage, encodeMessage } from '../../../protocol/message-codec.ts';
import type { Message } from '../../../protocol/messages.ts';
import type { StepPlan, StepPlans } from '../../../protocol/step-plan.ts';
import { mutate, seededRandom } from './mutate.ts';
import { samples, stepPlan } from './samples.ts';

const all = Object.values(samples) as Message[];
const plansOf = (plan: StepPlan): StepPlans => ({ type: 'step_plans', plans: [plan] });

/** The plain value with one field changed, packed by somebody who checks nothing. */
function packed(message: Message, path: (string | number)[], value: unknown): Uint8Array {
  return packAny(changed(message, path, value));
}

function changed(message: Message, path: (string | number)[], value: unknown): Message {
  const copy = structuredClone(message);
  let target = copy as unknown as Record<string | number, unknown>;
  for (const part of path.slice(0, -1)) target = target[part] as Record<string | number, unknown>;
  const name = path.at(-1) ?? '';
  if (value === undefined) Reflect.deleteProperty(target, name);
  else target[name] = value;
  return copy;
}

const packAny = (message: Message): Uint8Array =>
  message.type === 'step_plans' || message.type === 'step_result' ? packStep(message) : pack(message);

describe('message codec', () => {
  test.each(all.map((message) => [message.type, message] as const))('message codec - brings %s back as it was', (_, message) => {
    expect(decodeMessage(encodeMessage(message))).toEqual(message);
  });

  test('message codec - keeps seeds of 64 bits and doubles exact', () => {
    const plan = decodeMessage(encodeMessage(plansOf(stepPlan(1))));
    expect(plan.type === 'step_plans' && plan.plans[0]?.opened[0]?.sampling.seed).toBe(18_446_744_073_709_551_614n);
    const result = decodeMessage(encodeMessage(samples.step_result));
    expect(result.type === 'step_result' && result.outputs[0]?.logprob).toBe(-0.6931471824645996);
  });

  test('message codec - keeps every seed that 64 bits can hold', () => {
    fc.assert(
      fc.property(fc.bigInt(0n, 2n ** 64n - 1n), (seed) => {
        const plan = stepPlan(1);
        const opened = plan.opened[0];
        if (!opened) return false;
        opened.sampling.seed = seed;
        const decoded = decodeMessage(encodeMessage(plansOf(plan)));
        return decoded.type === 'step_plans' && decoded.plans[0]?.opened[0]?.sampling.seed === seed;
      }),
    );
  });

  test.each([
    ['an unknown type', samples.drain, ['type'], 'shutdown', 'type'],
    ['a type that is a property of every object', samples.drain, ['type'], 'constructor', 'type'],
    ['a missing field', samples.connected, ['epoch'], undefined, 'connected.epoch'],
    ['a text where a number belongs', samples.release, ['epoch'], '3', 'release.epoch'],
    ['a fraction where an integer belongs', samples.release, ['epoch'], 3.5, 'release.epoch'],
    ['a negative epoch', samples.release, ['epoch'], -1, 'release.epoch'],
    ['a worker that is not an id', samples.leaving, ['worker'], 'worker.>', 'leaving.worker'],
    ['a state that does not exist', samples.heartbeat, ['state'], 'thinking', 'heartbeat.state'],
    ['NaN', samples.heartbeat, ['stats', 'busyUs'], NaN, 'heartbeat.stats.busyUs'],
    ['infinity', samples.join, ['facts', 'weightBytesPerSecond'], Infinity, 'join.facts.weightBytesPerSecond'],
    ['a digest in capitals', samples.shard_ready, ['sliceSha256'], 'A'.repeat(64), 'shard_ready.sliceSha256'],
    [
      'a range that runs backwards',
      samples.assign,
      ['placement', 'stages', 0, 'layers', 'to'],
      -0.5,
      'assign.placement.stages[0].layers.to',
    ],
    [
      'a token beyond any vocabulary',
      samples.step_plans,
      ['plans', 0, 'opened', 0, 'promptTokens', 1],
      1_048_576,
      'step_plans.plans[0].opened[0].promptTokens[1]',
    ],
    [
      'a seed that is not a 64-bit integer',
      samples.step_plans,
      ['plans', 0, 'opened', 0, 'sampling', 'seed'],
      7,
      'step_plans.plans[0].opened[0].sampling.seed',
    ],
    [
      '21 log-probabilities',
      samples.step_plans,
      ['plans', 0, 'opened', 0, 'sampling', 'logprobs'],
      21,
      'step_plans.plans[0].opened[0].sampling.logprobs',
    ],
    [
      'a row the sequence does not have',
      samples.step_plans,
      ['plans', 0, 'sequences', 1, 'outputs', 0, 'row'],
      1,
      'step_plans.plans[0].sequences[1]',
    ],
    ['a slot planned twice', samples.step_plans, ['plans', 0, 'sequences', 1, 'slot'], 0, 'step_plans.plans[0]'],
    ['a step that waits for itself', samples.step_plans, ['plans', 0, 'sequences', 1, 'after'], 7, 'step_plans.plans[0]'],
    ['an address that is not host:port', samples.probe, ['grpcAddress'], 'unix:/tmp/x y:1', 'probe.grpcAddress'],
  ] as const)('message codec - rejects %s and names the field', (_, message, path, value, expected) => {
    const bytes = packed(message, [...path], value);
    expect(() => decodeMessage(bytes)).toThrow(ProtocolError);
    try {
      decodeMessage(bytes);
    } catch (error) {
      expect((error as ProtocolError).path).toBe(expected);
    }
  });

  test('message codec - rejects an unknown field and names it', () => {
    expect(() => decodeMessage(pack({ type: 'drain', now: true }))).toThrow('drain has the unknown field "now"');
    expect(() => decodeMessage(packed(samples.join, ['facts', 'gpu'], 1))).toThrow('join.facts has the unknown field "gpu"');
  });

  test('message codec - finds a mistake of the sender before it is sent', () => {
    expect(() => encodeMessage({ type: 'release', epoch: -1 })).toThrow(
      'release.epoch must be an integer of 0 to 4294967295, got -1',
    );
    expect(() => encodeMessage({ ...samples.assign, model: 'x'.repeat(768 * 1_024 + 1) })).toThrow(
      'assign.model must be a text of at most',
    );
  });

  test('message codec - refuses to send a chunk without tokens, a fraction, a log-probability that is no number', () => {
    const wrong = (path: (string | number)[], value: unknown) => () => encodeMessage(changed(samples.step_plans, path, value));
    expect(wrong(['plans', 0, 'sequences', 1, 'tokens'], [])).toThrow('step_plans.plans[0].sequences[1] has no rows');
    expect(wrong(['plans', 1, 'sequences', 0, 'position'], 0.5)).toThrow('step_plans.plans[1].sequences[0].position must be');
    expect(wrong(['plans', 1, 'sequences', 0, 'newBlocks'], 3)).toThrow('step_plans.plans[1].sequences[0].newBlocks must be');
    expect(wrong(['plans'], [])).toThrow('step_plans.plans must be a list of 1 to 64');
    const result = changed(samples.step_result, ['outputs', 0, 'logprob'], Number.NaN);
    expect(() => encodeMessage(result)).toThrow('step_result.outputs[0].logprob must be');
  });

  test('message codec - a step message has one form: as MessagePack it is refused', () => {
    expect(() => decodeMessage(pack(samples.step_plans))).toThrow('step_plans has a form of its own');
    expect(() => decodeMessage(pack(samples.step_result))).toThrow('step_result has a form of its own');
  });

  test('message codec - counts of a step message are held against its bytes before anything is made of them', () => {
    const bytes = encodeMessage(plansOf({ ...stepPlan(1), opened: [] }));
    for (let at = 0; at + 4 <= bytes.length; at += 4) {
      const broken = Buffer.from(bytes);
      broken.writeUInt32LE(0xffff_ffff, at);
      const before = process.memoryUsage().heapUsed;
      try {
        decodeMessage(broken);
      } catch (error) {
        expect(error).toBeInstanceOf(ProtocolError);
      }
      expect(process.memoryUsage().heapUsed - before).toBeLessThan(8 << 20);
    }
  });

  test('message codec - a decode step of 16 sequences is about 44 bytes a sequence', () => {
    const plan = { ...stepPlan(16), opened: [], closed: [] };
    for (const sequence of plan.sequences)
      Object.assign(sequence, { newBlocks: [], outputs: [{ row: 0, score: null, banned: [] }] });
    expect(encodeMessage(plansOf(plan)).length).toBe(4 + 48 + 16 * 36);
  });

  test('message codec - says of a plan that its result may wait by 0 or 1 and nothing else', () => {
    const plan = { ...stepPlan(1), opened: [], resultWaits: true };
    const bytes = Buffer.from(encodeMessage(plansOf(plan)));
    expect(decodeMessage(bytes)).toEqual(plansOf(plan));
    bytes.writeUInt32LE(2, 40);
    expect(() => decodeMessage(bytes)).toThrow('not a message: 2 where 0 or 1 is expected');
    const without = { ...plan, resultWaits: undefined as unknown as boolean };
    expect(() => encodeMessage(plansOf(without))).toThrow('resultWaits');
  });

  test('message codec - rejects more rows in a step than the limit, though each list is within its own', () => {
    const plan = stepPlan(2);
    plan.sequences = plan.sequences.map((sequence) => ({ ...sequence, tokens: new Array<number>(8_193).fill(1), outputs: [] }));
    expect(() => encodeMessage(plansOf(plan))).toThrow('has 16386 rows, the limit is 16384');
  });

  test('message codec - rejects bytes beyond 1 MiB, trailing bytes and the empty message', () => {
    expect(() => decodeMessage(new Uint8Array(1_048_577))).toThrow('over the limit of 1048576');
    expect(() => decodeMessage(Buffer.concat([encodeMessage({ type: 'drain' }), Buffer.from([0xc0])]))).toThrow('1 bytes follow');
    expect(() => decodeMessage(new Uint8Array(0))).toThrow('ends too early');
  });

  test.each([
    ['an extension (a date)', pack(new Date(0))],
    ['binary data', pack({ type: Buffer.from('drain') })],
    ['a list said to have 4 thousand million entries', Uint8Array.of(0xdd, 0xff, 0xff, 0xff, 0xff, 0xc0)],
    ['a map said to have 4 thousand million entries', Uint8Array.of(0xdf, 0xff, 0xff, 0xff, 0xff, 0xa1, 0x61, 0xc0)],
    ['a text said to be longer than the message', Uint8Array.of(0xdb, 0xff, 0xff, 0xff, 0xff, 0x61)],
    ['a list nested 100,000 deep', new Uint8Array(100_000).fill(0x91)],
    ['a key that is not a text', Uint8Array.of(0x81, 0x01, 0x01)],
    ['an unused type byte', Uint8Array.of(0xc1)],
    ['a key called __proto__', pack({ ['__proto__']: 1, type: 'drain' })],
  ])('message codec - rejects %s', (_, bytes) => {
    expect(() => decodeMessage(bytes)).toThrow(ProtocolError);
  });

  test('message codec - a __proto__ key on the wire changes no prototype and is refused', () => {
    // {"type": "drain", "__proto__": {"x": 1}}, written by hand.
    const bytes = Buffer.concat([
      Uint8Array.of(0x82, 0xa4),
      Buffer.from('type'),
      Uint8Array.of(0xa5),
      Buffer.from('drain'),
      Uint8Array.of(0xa9),
      Buffer.from('__proto__'),
      Uint8Array.of(0x81, 0xa1, 0x78, 0x01),
    ]);
    expect(() => decodeMessage(bytes)).toThrow(ProtocolError);
    expect(({} as { x?: number }).x).toBeUndefined();
  });

  test('message codec - tells workers and coordinators apart', () => {
    expect(decodeWorkerMessage(encodeMessage(samples.join)).type).toBe('join');
    expect(() => decodeWorkerMessage(encodeMessage(samples.drain))).toThrow('workers do not send drain');
    expect(decodeCoordinatorMessage(encodeMessage(samples.drain)).type).toBe('drain');
    expect(() => decodeCoordinatorMessage(encodeMessage(samples.join))).toThrow('coordinators do not send join');
  });

  test('message codec fuzz - 20,000 broken messages give ProtocolError or a message, nothing else', () => {
    const encoded = all.map((message) => encodeMessage(message));
    const seed = 4_711;
    const random = seededRandom(seed);
    let accepted = 0;
    for (let i = 0; i < 20_000; i++) {
      const bytes = mutate(encoded[i % encoded.length] ?? new Uint8Array(0), random);
      try {
        decodeMessage(bytes);
        accepted++;
      } catch (error) {
        if (!(error instanceof ProtocolError)) throw new Error(`seed ${seed}, input ${i}: ${String(error)}`, { cause: error });
      }
    }
    // Most flips of one number give another right number; what matters is that both ends of the range are seen.
    expect(accepted).toBeGreaterThan(100);
    expect(accepted).toBeLessThan(15_000);
  });

  test('message codec fuzz - any packed value is decoded to a known type or refused', () => {
    fc.assert(
      fc.property(fc.anything({ withBigInt: true, withDate: true, withTypedArray: true, withSparseArray: false }), (value) => {
        let bytes: Uint8Array;
        try {
          bytes = pack(value);
        } catch {
          return true;
        }
        try {
          decodeMessage(bytes);
          return false;
        } catch (error) {
          return error instanceof ProtocolError;
        }
      }),
      { numRuns: 500 },
    );
  });
});

describe('protocol handshake', () => {
  test('protocol handshake - takes the highest version both ends speak', () => {
    expect(commonProtocol('worker a', { min: 1, max: 3 }, { min: 2, max: 5 })).toBe(3);
    expect(commonProtocol('worker a', { min: 1, max: 1 })).toBe(1);
  });

  test('protocol handshake - without overlap names both ranges', () => {
    expect(() => commonProtocol('worker a', { min: 3, max: 4 }, { min: 1, max: 2 })).toThrow(
      'worker a speaks protocol 3 to 4, this build 1 to 2',
    );
    expect(() => commonProtocol('worker a', { min: 2, max: 1 }, { min: 1, max: 2 })).toThrow(ShardmeshError);
  });
});
