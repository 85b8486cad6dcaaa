/** The C++ test programs of this folder: one line a case, `ok NAME` or `FAIL NAME: what`, and exit status 1 when a case failed. */
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';

const run = promisify(execFile);

/** What `binary` prints, line by line. Exit status 1 is no error here: which case failed is in a line, for the caller to assert. */
export async function linesOf(binary: string, args: string[], timeoutMs: number): Promise<string[]> {
  const { stdout } = await run(binary, args, { timeout: timeoutMs }).catch((error: unknown) => {
    if (error instanceof Error && 'code' in error && error.code === 1 && 'stdout' in error)
      return { stdout: String(error.stdout) };
    throw error;
  });
  return stdout.trim().split('\n');
}
