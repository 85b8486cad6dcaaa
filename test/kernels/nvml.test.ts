/** Facts that only the driver's management library tells (kernels/cuda/nvml.cpp), beside a stand-in for that library. */
import { execFile } from 'node:child_process';
import { dirname, join } from 'node:path';
import { promisify } from 'node:util';
import { describe, expect, it } from 'vitest';
import { buildKernelTarget } from './build-target.ts';

const run = promisify(execFile);

describe.skipIf(process.platform !== 'linux' || process.arch !== 'x64')('management library', () => {
  it('nvml - tells driver and power limit of a card, and no limit of one that is not there', async () => {
    const binary = await buildKernelTarget('nvml_test');
    const lines = async (libraries: string): Promise<string[]> => {
      const { stdout } = await run(binary, ['0000:65:00.0', '0000:99:00.0', '0000:65:00.0'], {
        env: { LD_LIBRARY_PATH: libraries },
      });
      return stdout.trim().split('\n');
    };
    const known = '580.95.05, 700 W';
    expect(await lines(join(dirname(binary), 'nvml'))).toEqual([known, '580.95.05, 0 W', known]);
  });
});
