/**
 * Prometheus metrics, the only file that knows prom-client. Names as vLLM's users know them where the meaning is the same, under `shardmesh_`.
 * Values that others own (queues, blocks, workers) are read when the page is asked for.
 */
import { Counter, Gauge, Histogram, Registry } from 'prom-client';

export interface MetricsSources {
  /** Plain numbers by metric name (without prefix), with help. */
  gauges(): Record<string, number>;
  /** Sums that only grow. */
  counters(): Record<string, number>;
  /** Labelled numbers of each worker that is here now. `counters` begin at zero again when a worker starts anew. */
  workers(): WorkerNumbers[];
}

export interface WorkerNumbers {
  worker: string;
  stage: number;
  rank: number;
  gauges: Record<string, number>;
  counters: Record<string, number>;
}

const workerLabels = ['worker', 'stage', 'rank'];
const secondsBuckets = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30];
const tokenGapBuckets = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1];

export class Metrics {
  readonly #registry = new Registry();
  readonly #sources: MetricsSources;
  readonly #requests: Counter;
  readonly #requestSeconds: Histogram;
  readonly #ttft: Histogram;
  readonly #itl: Histogram;
  readonly #gauges = new Map<string, Gauge>();
  readonly #counters = new Map<string, Counter>();
  readonly contentType: string;

  constructor(sources: MetricsSources) {
    this.#sources = sources;
    this.contentType = this.#registry.contentType;
    const registers = [this.#registry];
    this.#requests = new Counter({
      name: 'shardmesh_http_requests_total',
      help: 'HTTP requests',
      labelNames: ['route', 'status'],
      registers,
    });
    this.#requestSeconds = new Histogram({
      name: 'shardmesh_http_request_seconds',
      help: 'HTTP request time',
      labelNames: ['route'],
      buckets: secondsBuckets,
      registers,
    });
    this.#ttft = new Histogram({
      name: 'shardmesh_time_to_first_token_seconds',
      help: 'Request received to first output token',
      buckets: secondsBuckets,
      registers,
    });
    this.#itl = new Histogram({
      name: 'shardmesh_inter_token_latency_seconds',
      help: 'Gap between two tokens of one sequence',
      buckets: tokenGapBuckets,
      registers,
    });
  }

  observeRequest(route: string, status: number, milliseconds: number): void {
    this.#requests.inc({ route, status: String(status) });
    this.#requestSeconds.observe({ route }, milliseconds / 1000);
  }

  observeFirstToken(milliseconds: number): void {
    this.#ttft.observe(milliseconds / 1000);
  }

  observeTokenGap(milliseconds: number): void {
    this.#itl.observe(milliseconds / 1000);
  }

  /** Everything that `/metrics` says. Without an `await` between reading the sources and setting the metrics, two readers at once see whole sets. */
  async text(): Promise<string> {
    const sources = this.#sources;
    // Workers that have left are forgotten, so the page does not grow with each that ever was.
    for (const metric of [...this.#gauges.values(), ...this.#counters.values()]) metric.reset();
    for (const [name, value] of Object.entries(sources.gauges())) this.#gauge(name, []).set(value);
    for (const [name, value] of Object.entries(sources.counters())) this.#counter(name, []).inc(positive(value));
    for (const { worker, stage, rank, ...numbers } of sources.workers()) {
      const labels = { worker, stage: String(stage), rank: String(rank) };
      for (const [name, value] of Object.entries(numbers.gauges)) this.#gauge(`worker_${name}`, workerLabels).set(labels, value);
      for (const [name, value] of Object.entries(numbers.counters))
        this.#counter(`worker_${name}`, workerLabels).inc(labels, positive(value));
    }
    return this.#registry.metrics();
  }

  #gauge(name: string, labelNames: string[]): Gauge {
    let gauge = this.#gauges.get(name);
    if (!gauge) {
      gauge = new Gauge({ name: `shardmesh_${name}`, help: name.replaceAll('_', ' '), labelNames, registers: [this.#registry] });
      this.#gauges.set(name, gauge);
    }
    return gauge;
  }

  /** A sum that its owner keeps: reset and set to the owner's value at each reading. */
  #counter(name: string, labelNames: string[]): Counter {
    let counter = this.#counters.get(name);
    if (!counter) {
      counter = new Counter({
        name: `shardmesh_${name}_total`,
        help: name.replaceAll('_', ' '),
        labelNames,
        registers: [this.#registry],
      });
      this.#counters.set(name, counter);
    }
    return counter;
  }
}

/** prom-client throws at a negative sum, and one odd number of a worker must not take the whole page down. */
const positive = (value: number): number => (value > 0 && Number.isFinite(value) ? value : 0);
