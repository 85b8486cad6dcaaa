/**
 * The local workers of `shardmesh serve`: child processes, restarted with backoff when they die. A child notices the death of its parent by its IPC channel and
 * exits, so that nothing is left behind by a SIGKILL of the coordinator.
 *
 * Ctrl-C, or a `kill` of the whole process group, is meant for the coordinator, which drains first: a child has a session of its own, ignores SIGINT and
 * SIGTERM while its parent lives (`deploy/cli/worker.ts`), and ends when it is told so over the IPC channel.
 */
import { fork, type ChildProcess } from 'node:child_process';
import { exitReason } from './worker-exit.ts';

export interface WorkerProcessesOptions {
  /** Compiled main module of the worker. */
  module: string;
  /** A process is one worker, or several that share a card. */
  processes: { workers: string[]; args: string[] }[];
  /** A worker's process is gone: how, in one line. Called before it is started again. */
  onExit(worker: string, cause: string): void;
  event(name: string, fields: Record<string, unknown>): void;
  backoffBaseMs?: number;
  backoffMaxMs?: number;
}

/** What a local worker is told over its IPC channel; it says good-bye and ends. */
export const stopMessage = 'stop';

interface Slot {
  workers: string[];
  args: string[];
  child: ChildProcess | null;
  failures: number;
  startedAt: number;
  timer: NodeJS.Timeout | null;
}

export class WorkerProcesses {
  readonly #options: WorkerProcessesOptions;
  readonly #slots: Slot[];
  #stopping = false;

  constructor(options: WorkerProcessesOptions) {
    this.#options = options;
    this.#slots = options.processes.map(({ workers, args }) => ({
      workers,
      args,
      child: null,
      failures: 0,
      startedAt: 0,
      timer: null,
    }));
  }

  start(): void {
    for (const slot of this.#slots) this.#spawn(slot);
  }

  /** Process ids by worker, for `doctor`, tests and logs. */
  pids(): Map<string, number> {
    return new Map(
      this.#slots.flatMap(({ workers, child }) => (child?.pid ? workers.map((worker) => [worker, child.pid!] as const) : [])),
    );
  }

  /** Asks all workers to end, kills what is left after `graceMs`. */
  async stop(graceMs: number): Promise<void> {
    this.#stopping = true;
    await Promise.all(
      this.#slots.map(async (slot) => {
        if (slot.timer) clearTimeout(slot.timer);
        const { child } = slot;
        if (!child || child.exitCode !== null || child.signalCode !== null) return;
        const ended = new Promise<void>((resolve) => child.once('exit', () => resolve()));
        // One that is ending already has no channel any more.
        if (child.connected) child.send(stopMessage, () => undefined);
        // A stopped process reads nothing until it is continued.
        child.kill('SIGCONT');
        const timer = setTimeout(() => child.kill('SIGKILL'), graceMs);
        await ended;
        clearTimeout(timer);
      }),
    );
  }

  #spawn(slot: Slot): void {
    slot.timer = null;
    slot.startedAt = performance.now();
    const child = fork(this.#options.module, slot.args, {
      stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
      execArgv: ['--enable-source-maps'],
      detached: true,
    });
    slot.child = child;
    const forEach = (use: (worker: string) => void): void => slot.workers.forEach(use);
    forEach((worker) => this.#options.event('worker_started', { worker, pid: child.pid }));
    child.once('error', ({ message }) => forEach((worker) => this.#options.event('worker_start_failed', { worker, message })));
    child.once('exit', (code, signal) => {
      slot.child = null;
      if (this.#stopping) return;
      const livedMs = performance.now() - slot.startedAt;
      slot.failures = livedMs > 10_000 ? 0 : slot.failures + 1;
      const cause = `process ${child.pid} of worker ${slot.workers.join(', ')} ended with ${signal ? `signal ${signal}` : `exit code ${code}${exitReason(code)}`} after ${(livedMs / 1000).toFixed(1)} s`;
      const delay = Math.min(this.#options.backoffMaxMs ?? 10_000, (this.#options.backoffBaseMs ?? 100) * 2 ** slot.failures);
      forEach((worker) => {
        this.#options.onExit(worker, cause);
        this.#options.event('worker_restarting', { worker, cause, delayMs: delay });
      });
      slot.timer = setTimeout(() => this.#spawn(slot), delay);
    });
  }
}
