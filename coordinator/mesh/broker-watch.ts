/**
 * Deaths of workers, as the broker sees them: when a process dies its connection ends, and the broker tells its system account within milliseconds.
 * Freezes do not show here; heartbeats are for those.
 */
import type { Credentials } from '../../protocol/credentials.ts';
import type { WorkerId } from '../../protocol/ids.ts';
import { connectNats } from '../../protocol/nats-transport.ts';
import { accountDisconnectSubject } from '../../protocol/subjects.ts';

export interface WorkerDisconnect {
  worker: WorkerId;
  /** The broker's word: `Client Closed`, `Stale Connection`, `Slow Consumer (Write Deadline)`. */
  reason: string;
}

/**
 * Calls back for each connection of a worker that ends. A worker may have more than one connection, or be back already: the caller asks it.
 * @param workerOf  the worker of a public nkey, null for others
 * @returns stops the watch
 */
export async function watchDisconnects(
  credentials: Credentials,
  workerOf: (nkey: string) => WorkerId | null,
  onDisconnect: (disconnect: WorkerDisconnect) => void,
): Promise<() => Promise<void>> {
  const transport = await connectNats({ credentials, name: 'coordinator-watch', patienceMs: 5_000 });
  await transport.subscribe(accountDisconnectSubject, (bytes) => {
    const event = parseDisconnect(bytes);
    const worker = event && workerOf(event.nkey);
    if (event && worker) onDisconnect({ worker, reason: event.reason });
  });
  return () => transport.close();
}

function parseDisconnect(bytes: Uint8Array): { nkey: string; reason: string } | null {
  try {
    const { client, reason } = JSON.parse(new TextDecoder().decode(bytes)) as {
      client?: Record<string, unknown>;
      reason?: unknown;
    };
    const nkey = client?.['nkey'] ?? client?.['user'];
    return typeof nkey === 'string' ? { nkey, reason: typeof reason === 'string' ? reason : 'unknown' } : null;
  } catch {
    return null;
  }
}
