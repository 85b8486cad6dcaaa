import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { MeshService } from '../../../../coordinator/mesh/mesh-service.ts';
import { defaultMeshTimers } from '../../../../coordinator/mesh/mesh.ts';
import { newMeshId } from '../../../../protocol/ids.ts';
import { MemoryBus, type MemoryTransport } from '../../../mesh/memory-transport.ts';

/** The transport of a coordinator whose broker answers pings only while `answers`. */
function transportWith(broker: { answers: boolean }): MemoryTransport {
  const transport = new MemoryBus({ seed: 1 }).connect('coordinator');
  transport.flush = () => (broker.answers ? Promise.resolve() : new Promise(() => undefined));
  return transport;
}

async function start(transport: MemoryTransport): Promise<{ service: MeshService; silences: () => number }> {
  let silences = 0;
  const service = await MeshService.start({
    transport,
    meshId: newMeshId(),
    onFatal: (error) => expect.unreachable(error.message),
    onBrokerSilent: () => silences++,
    event: () => undefined,
    mesh: {
      model: 'smollm2',
      link: 'auto',
      wire: 'f32',
      bits: 'exact',
      seats: [{ stage: 0, rank: 0 }],
      placementTemplate: { stages: [] },
      protocol: { min: 1, max: 1 },
      placementId: 'bbbbbbbbbbbbbbbbbbbbbbbbbb',
      newLinkKey: () => '00',
      sliceSha256For: () => '',
      timers: defaultMeshTimers,
      assignFor: () => expect.unreachable('no worker joins'),
    },
  });
  return { service, silences: () => silences };
}

describe('a broker that answers no ping', () => {
  beforeEach(() => vi.useFakeTimers({ toFake: ['setInterval', 'clearInterval', 'performance'] }));
  afterEach(() => vi.useRealTimers());

  it('mesh service - reports a ping that has waited a second for its answer, once, while the connection still stands', async () => {
    const broker = { answers: true };
    const { service, silences } = await start(transportWith(broker));
    await vi.advanceTimersByTimeAsync(5_000);
    expect(silences()).toBe(0);
    broker.answers = false;
    await vi.advanceTimersByTimeAsync(900);
    expect(silences()).toBe(0);
    await vi.advanceTimersByTimeAsync(700);
    expect(silences()).toBe(1);
    await vi.advanceTimersByTimeAsync(10_000);
    expect(silences()).toBe(1);
    service.stop();
  });
});
