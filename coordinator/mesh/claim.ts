/**
 * One coordinator a mesh. Each says twice a second that it leads; one that starts listens first and goes when it hears another. One that was frozen for so
 * long that a second has taken over goes too, when it thaws: of two claims the later one holds.
 */
import { hostname } from 'node:os';
import { ShardmeshError } from '../../protocol/errors.ts';
import type { Transport } from '../../protocol/transport.ts';

interface Claim {
  id: string;
  /** Unix milliseconds: when it began to lead. */
  since: number;
  pid: number;
  host: string;
}

export interface ClaimOptions {
  transport: Transport;
  /** `meshSubjects(mesh).lead()` */
  subject: string;
  /** Of this process; random. */
  id: string;
  /** Another coordinator leads now: this one must stop. */
  onLost: (error: ShardmeshError) => void;
  /** How long it listens before it leads. */
  listenMs?: number;
  everyMs?: number;
}

/**
 * Listens, then leads until the returned function is called.
 * @throws {ShardmeshError} `config_invalid`: another coordinator leads this mesh
 */
export async function claimMesh(options: ClaimOptions): Promise<() => void> {
  const { transport, subject, id, onLost, listenMs = 1_300, everyMs = 500 } = options;
  const own: Claim = { id, since: 0, pid: process.pid, host: hostname() };
  let other: Claim | null = null;
  const subscription = await transport.subscribe(subject, (bytes) => {
    const claim = parseClaim(bytes);
    if (!claim || claim.id === id) return;
    other = claim;
    const later = claim.since > own.since || (claim.since === own.since && claim.id > own.id);
    if (own.since > 0 && later) onLost(refusal(claim));
  });
  await new Promise((resolve) => setTimeout(resolve, listenMs));
  if (other) {
    subscription.unsubscribe();
    throw refusal(other);
  }
  own.since = Date.now();
  const say = (): void => void transport.publish(subject, new TextEncoder().encode(JSON.stringify(own)));
  say();
  const timer = setInterval(say, everyMs);
  return () => {
    clearInterval(timer);
    subscription.unsubscribe();
  };
}

const refusal = ({ pid, host }: Claim): ShardmeshError =>
  new ShardmeshError(
    'config_invalid',
    `another coordinator (process ${pid} on ${host}) serves this mesh already; stop it first, or make another mesh with \`shardmesh keys\``,
  );

const claimBytesMax = 512;

function parseClaim(bytes: Uint8Array): Claim | null {
  if (bytes.length > claimBytesMax) return null;
  try {
    const { id, since, pid, host } = JSON.parse(new TextDecoder().decode(bytes)) as Record<string, unknown>;
    const valid = typeof id === 'string' && typeof since === 'number' && typeof pid === 'number' && typeof host === 'string';
    return valid ? { id, since, pid, host } : null;
  } catch {
    return null;
  }
}
