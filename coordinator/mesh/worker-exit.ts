/** How a worker process says with its exit code why it ended. */

/** Exit codes of a worker that say more than 1 (failed) and 2 (wrong configuration). */
export const workerExit = { lostParent: 70, cardLost: 71, cardAbsent: 72 } as const;

/** What an exit code says, for the one line that the coordinator gives. */
export function exitReason(code: number | null): string {
  switch (code) {
    case workerExit.lostParent:
      return ' (its coordinator was gone)';
    case workerExit.cardLost:
      return " (its card answered no more: a fault of the card or its driver, see the host's kernel log for Xid)";
    case workerExit.cardAbsent:
      return ' (there is no card that it can use)';
    default:
      return '';
  }
}
