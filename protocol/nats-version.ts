/** What is known about versions of nats-server. */

/** Oldest that has what the mesh needs. */
export const natsServerFloor = '2.9.10';

/** First versions with every published advisory (June 2026) fixed, one for each line that still gets fixes. */
const advisoriesFixed = ['2.12.12', '2.14.3'] as const;

/** Three numbers of `2.15.1`, `v2.15.1` or `2.15.1-RC.2`; null when there are none. */
export function parseVersion(text: string): [number, number, number] | null {
  const match = /(\d{1,6})\.(\d{1,6})\.(\d{1,6})/.exec(text);
  return match ? [Number(match[1]), Number(match[2]), Number(match[3])] : null;
}

/** Below, at or above zero as `a` is older than, the same as or newer than `b`. A text without a version is oldest. */
export function compareVersions(a: string, b: string): number {
  const left = parseVersion(a) ?? [0, 0, 0];
  const right = parseVersion(b) ?? [0, 0, 0];
  for (const i of [0, 1, 2] as const) if (left[i] !== right[i]) return left[i] - right[i];
  return 0;
}

/** A warning for an operator when this version has published security holes, else null. */
export function serverAdvice(version: string): string | null {
  const [line212, line214] = advisoriesFixed;
  const fixed =
    compareVersions(version, line214) >= 0 || (compareVersions(version, line212) >= 0 && compareVersions(version, '2.13.0') < 0);
  return fixed
    ? null
    : `nats-server ${version} has published security holes; use ${line214} or later (or ${line212} of the 2.12 line)`;
}
