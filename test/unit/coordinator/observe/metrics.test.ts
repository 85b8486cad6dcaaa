import { describe, expect, it } from 'vitest';
import { Metrics, type WorkerNumbers } from '../../../../coordinator/observe/metrics.ts';

const worker = (name: string, steps: number): WorkerNumbers => ({
  worker: name,
  stage: 0,
  rank: 1,
  gauges: { rss_bytes: 5 },
  counters: { steps },
});

describe('metrics', () => {
  it('metrics - sums are counters, states are gauges, each with its value of now', async () => {
    let steps = 3;
    const metrics = new Metrics({
      gauges: () => ({ mesh_ready: 1 }),
      counters: () => ({ steps }),
      workers: () => [worker('w1', 7)],
    });
    await metrics.text();
    steps = 4;
    const lines = (await metrics.text()).split('\n');
    expect(lines).toEqual(
      expect.arrayContaining([
        '# TYPE shardmesh_mesh_ready gauge',
        'shardmesh_mesh_ready 1',
        '# TYPE shardmesh_steps_total counter',
        'shardmesh_steps_total 4',
        '# TYPE shardmesh_worker_rss_bytes gauge',
        'shardmesh_worker_rss_bytes{worker="w1",stage="0",rank="1"} 5',
        '# TYPE shardmesh_worker_steps_total counter',
        'shardmesh_worker_steps_total{worker="w1",stage="0",rank="1"} 7',
      ]),
    );
  });

  it('metrics - a worker that has left is no longer on the page, one that began anew counts from zero', async () => {
    let workers = [worker('w1', 7), worker('w2', 9)];
    const metrics = new Metrics({ gauges: () => ({}), counters: () => ({}), workers: () => workers });
    expect(await metrics.text()).toContain('w1');
    workers = [worker('w2', 2)];
    const page = await metrics.text();
    expect(page).not.toContain('w1');
    expect(page).toContain('shardmesh_worker_steps_total{worker="w2",stage="0",rank="1"} 2');
  });

  it('metrics - an odd number of one source does not take the page down', async () => {
    const metrics = new Metrics({
      gauges: () => ({ mesh_ready: 1 }),
      counters: () => ({ steps: -1, epochs: NaN, frames: 5 }),
      workers: () => [],
    });
    const page = await metrics.text();
    expect(page).toContain('shardmesh_steps_total 0');
    expect(page).toContain('shardmesh_epochs_total 0');
    expect(page).toContain('shardmesh_frames_total 5');
  });

  it('metrics - requests, first tokens and gaps are counted in seconds', async () => {
    const metrics = new Metrics({ gauges: () => ({}), counters: () => ({}), workers: () => [] });
    metrics.observeRequest('/v1/models/:id', 200, 250);
    metrics.observeFirstToken(40);
    metrics.observeTokenGap(4);
    const page = await metrics.text();
    expect(page).toContain('shardmesh_http_requests_total{route="/v1/models/:id",status="200"} 1');
    expect(page).toContain('shardmesh_http_request_seconds_sum{route="/v1/models/:id"} 0.25');
    expect(page).toContain('shardmesh_time_to_first_token_seconds_bucket{le="0.05"} 1');
    expect(page).toContain('shardmesh_inter_token_latency_seconds_sum 0.004');
  });
});
