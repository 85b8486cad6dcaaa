/** What a mesh of several hosts stands on, for `doctor`: certificates that last, and clocks that agree. */
import { request } from 'node:https';
import { MeshAuthority } from '../../coordinator/authority/mesh-authority.ts';
import { addressText, parseAddress, type Address } from '../../protocol/addresses.ts';
import type { Credentials } from '../../protocol/credentials.ts';
import { enrollmentPath } from '../../protocol/enrollment.ts';
import type { MeshId } from '../../protocol/ids.ts';
import { coordinatorName, daysLeft, expiryWarningDays, tlsVersionMin, type TlsIdentity } from '../../protocol/tls.ts';
import type { Check, Finding } from './doctor-checks.ts';

const timeoutMs = 3_000;
/** The answer says whole seconds. */
const skewWarnMs = 5_000;
/** Certificates are good from an hour before they were made. */
const skewFailMs = 50 * 60_000;

/** Of the credentials of this host. */
export function certificateChecks({ url, mesh, tls, role }: Credentials): Check[] {
  if (!tls) return [];
  const broker = parseAddress(url);
  const enrollment = broker && { host: broker.host, port: broker.port + 1 };
  return [
    { what: `${role} certificate`, run: () => checkDays(daysLeft(tls.certificate, Date.now())) },
    ...(enrollment ? [{ what: 'clock skew', run: async () => checkSkew(await clockAhead(enrollment, mesh, tls)) }] : []),
  ];
}

/** Of the mesh that the coordinator of this host remembers; none when it has none. */
export function authorityChecks(meshFolder: string): Check[] {
  const authority = MeshAuthority.read(meshFolder);
  if (!authority) return [];
  return [
    {
      what: 'mesh certificates',
      run: () => {
        const [first, ...others] = authority.expiring(Date.now());
        const enrolled = authority.workers.filter(({ revokedAt }) => revokedAt === null).length;
        if (first === undefined)
          return {
            status: 'ok',
            value: `of ${enrolled} enrolled workers and their authority: none ends within ${expiryWarningDays} days`,
          };
        return {
          status: 'warn',
          value: others.length ? `${first} (and ${others.length} more)` : first,
          remedy: 'shardmesh enroll',
        };
      },
    },
  ];
}

export function checkDays(days: number): Finding {
  const remedy = "shardmesh enroll, on the coordinator's host";
  if (days < 0) return { status: 'fail', value: 'it has expired', remedy };
  return days < expiryWarningDays
    ? { status: 'warn', value: `ends in ${days} days`, remedy }
    : { status: 'ok', value: `good for ${days} days` };
}

/** @param aheadMs  of the coordinator's clock */
export function checkSkew(aheadMs: number): Finding {
  const value = `the coordinator's clock is ${Math.abs(aheadMs / 1000).toFixed(0)} s ${aheadMs < 0 ? 'behind' : 'ahead'}`;
  const remedy = 'run a time service (chrony, systemd-timesyncd) on both hosts';
  if (Math.abs(aheadMs) >= skewFailMs) return { status: 'fail', value: `${value}: certificates will be refused`, remedy };
  return Math.abs(aheadMs) >= skewWarnMs ? { status: 'warn', value, remedy } : { status: 'ok', value };
}

/** Asks the enrollment listener what time it is there. */
function clockAhead(address: Address, mesh: MeshId, { authority }: TlsIdentity): Promise<number> {
  return new Promise((resolve, reject) => {
    const sentAt = Date.now();
    const options = {
      method: 'HEAD',
      path: enrollmentPath,
      ca: authority,
      servername: coordinatorName(mesh),
      minVersion: tlsVersionMin,
    } as const;
    const asking = request({ ...address, ...options, agent: false, timeout: timeoutMs }, (response) => {
      response.resume();
      // It says the second that had begun there, half of one ago on average.
      resolve(Date.parse(response.headers.date ?? '') + 500 - (sentAt + Date.now()) / 2);
    });
    asking.on('timeout', () => asking.destroy(new Error(`no answer within ${timeoutMs} ms`)));
    asking.on('error', (error) => reject(new Error(`${addressText(address)} (shardmesh serve --advertise): ${error.message}`)));
    asking.end();
  });
}
