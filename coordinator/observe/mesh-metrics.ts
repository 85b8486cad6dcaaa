/** Where the numbers of `/metrics` come from: engine, mesh, transport. Names in `deploy/README.md`. */
import type { Transport } from '../../protocol/transport.ts';
import type { ShardmeshEngine } from '../engine/engine.ts';
import type { MeshService } from '../mesh/mesh-service.ts';
import type { MetricsSources } from './metrics.ts';

export function meshMetrics(engine: ShardmeshEngine, service: MeshService, transport: Transport): MetricsSources {
  return {
    gauges: () => {
      const numbers = engine.numbers();
      const status = engine.status();
      return {
        mesh_ready: status.meshReady ? 1 : 0,
        mesh_epoch: service.mesh.epoch,
        num_requests_waiting: status.waiting,
        num_requests_running: status.running,
        kv_cache_blocks: numbers.kvBlocksTotal,
        kv_cache_blocks_used: numbers.kvBlocksUsed,
        kv_cache_usage_ratio: numbers.kvBlocksTotal ? numbers.kvBlocksUsed / numbers.kvBlocksTotal : 0,
        steps_in_flight: numbers.stepsInFlight,
        bubble_ratio: numbers.bubbleRatio,
        step_seconds: numbers.stepMs / 1000,
        output_tokens_per_second: numbers.outputTokensPerSecond,
        prompt_tokens_per_second: numbers.prefillTokensPerSecond,
      };
    },
    counters: () => {
      const numbers = engine.numbers();
      return {
        steps: numbers.steps,
        generation_tokens: numbers.outputTokens,
        prompt_tokens: numbers.prefillTokens,
        prompt_tokens_cached: numbers.cachedTokens,
        preemptions: numbers.preemptions,
        spec_decode_num_drafts: numbers.drafts,
        spec_decode_num_draft_tokens: numbers.draftTokens,
        spec_decode_num_accepted_tokens: numbers.draftTokensAccepted,
        step_busy_seconds: numbers.stepSeconds,
        bubble_seconds: numbers.bubbleSeconds,
        collective_seconds: numbers.collectiveSeconds,
        link_wait_seconds: numbers.receiveSeconds,
        sample_seconds: numbers.sampleSeconds,
        requests_finished: numbers.requestsFinished,
        requests_failed: numbers.requestsFailed,
        requests_cancelled: numbers.requestsCancelled,
        stale_results: numbers.staleResults,
        epochs: numbers.epochs,
        stale_messages: service.mesh.staleMessages,
        refused_messages: service.refusedMessages,
        nats_reconnects: transport.counters.reconnects,
        publish_while_down: transport.counters.publishWhileDown,
      };
    },
    workers: () =>
      service.mesh.members().flatMap(({ worker, seat, heartbeat, seenAt }) => {
        if (!seat || !heartbeat) return [];
        const { stats, rssBytes, plansQueued } = heartbeat;
        const busy = stats.busyUs + stats.idleUs;
        return [
          {
            worker,
            stage: seat.stage,
            rank: seat.rank,
            gauges: {
              heartbeat_age_seconds: Math.max(0, performance.now() - seenAt) / 1000,
              rss_bytes: rssBytes,
              plans_queued: plansQueued,
              bubble_ratio: busy ? stats.idleUs / busy : 0,
            },
            counters: {
              steps: stats.steps,
              busy_seconds: stats.busyUs / 1e6,
              idle_seconds: stats.idleUs / 1e6,
              collective_seconds: stats.collectiveUs / 1e6,
              link_wait_seconds: stats.receiveUs / 1e6,
              frames_out: stats.framesOut,
              bytes_out: stats.bytesOut,
              stale_frames: stats.staleFrames,
              corrupt_frames: stats.corruptFrames,
            },
          },
        ];
      }),
  };
}
