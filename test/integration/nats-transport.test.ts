import { afterAll, beforeAll, describe } from 'vitest';
import { transportCases } from '../conformance/transport-cases.ts';
import { startTestBroker, type TestBroker } from './helpers/nats.ts';
import type { WorkerId } from '../../protocol/ids.ts';

let nats: TestBroker;
beforeAll(async () => {
  nats = await startTestBroker({ workers: 1 });
});
afterAll(() => nats.stop());

describe('nats transport', () => {
  transportCases('nats transport', async () => {
    const [from, to] = await Promise.all([nats.connectWorker(0), nats.connectCoordinator()]);
    return {
      from,
      to,
      subject: nats.subjects.result(nats.workers[0] as WorkerId),
      wildcard: nats.subjects.results(),
      close: async () => {
        await Promise.all([from.close(), to.close()]);
      },
    };
  });
});
