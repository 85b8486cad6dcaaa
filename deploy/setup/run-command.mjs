import { spawn } from 'node:child_process';

/** A step that cannot go on: what is missing, and the command that fixes it. */
export class SetupError extends Error {
  constructor(message, remedy) {
    super(remedy ? `${message}\n  try: ${remedy}` : message);
    this.name = 'SetupError';
  }
}

/**
 * Runs a program to its end. Resolves to { code, stdout, output }; a program that cannot be started resolves to code 127.
 * `onLine` gets each line of output for progress.
 */
export function runCommand(command, args, { cwd, env, onLine } = {}) {
  return new Promise((resolve) => {
    const child = spawn(command, args, { cwd, env: { ...process.env, ...env }, stdio: ['ignore', 'pipe', 'pipe'] });
    let stdout = '';
    let output = '';
    const take = (chunk, isStdout) => {
      const text = chunk.toString();
      if (isStdout) stdout += text;
      output = (output + text).slice(-20_000);
      if (onLine) for (const one of text.split('\n')) if (one.trim()) onLine(one.trim());
    };
    child.stdout.on('data', (chunk) => take(chunk, true));
    child.stderr.on('data', (chunk) => take(chunk, false));
    child.on('error', (error) => resolve({ code: 127, stdout, output: String(error) }));
    child.on('close', (code) => resolve({ code: code ?? 1, stdout, output }));
  });
}

/** First of the commands that runs, as [command, ...args], or null. */
export async function firstThatRuns(candidates) {
  for (const candidate of candidates) {
    const [command, ...args] = candidate;
    const { code } = await runCommand(command, [...args, '--version']);
    if (code === 0) return candidate;
  }
  return null;
}
