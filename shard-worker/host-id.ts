import { readFileSync, readlinkSync } from 'node:fs';
import { hostname } from 'node:os';

/**
 * Equal for two processes exactly when each can open the other's anonymous memory through /proc: same boot of one machine, same process namespace, same user.
 */
export function hostId(): string {
  const user = process.getuid?.() ?? 0;
  try {
    const boot = readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim();
    return `${boot}/${readlinkSync('/proc/self/ns/pid')}/${user}`;
  } catch {
    return `${hostname()}/${process.platform}/${user}`;
  }
}
