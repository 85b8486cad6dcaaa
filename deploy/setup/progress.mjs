/** Progress of the set-up: a live line on a terminal, plain lines otherwise. Everything goes to stderr: stdout belongs to the program. */
const live = process.stderr.isTTY === true;

export function seconds(ms) {
  return `${(ms / 1000).toFixed(1)} s`;
}

export function mebibytes(bytes) {
  return `${(bytes / 1048576).toFixed(1)} MiB`;
}

/** Prints one whole line. */
export function line(text) {
  if (live) process.stderr.write('\r\x1b[K');
  process.stderr.write(`${text}\n`);
}

/** Shows a passing state: replaced by the next one on a terminal, left out elsewhere. */
export function passing(text) {
  if (live) process.stderr.write(`\r\x1b[K${text.slice(0, 118)}`);
}

/**
 * Runs the steps of the set-up and says "step k of n" for each: `{ name, run(note) }`, where run resolves to a short result.
 * Steps of one group run at the same time; groups run one after the other.
 */
export async function runSteps(groups) {
  const count = groups.flat().length;
  let number = 0;
  for (const group of groups) {
    const results = await Promise.allSettled(
      group.map(async (step) => {
        const k = ++number;
        const started = Date.now();
        const result = await step.run((text) => passing(`step ${k} of ${count}: ${step.name}: ${text}`));
        line(`step ${k} of ${count}: ${step.name}: ${result} (${seconds(Date.now() - started)})`);
      }),
    );
    const failed = results.find((result) => result.status === 'rejected');
    if (failed) throw failed.reason;
  }
}
