/** Runs each test of links_test.cpp, in processes of their own. SHARDMESH_BENCH=1 prints the latency of one exchange as well. */
import { execFile, execFileSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { beforeAll, describe, expect, it } from 'vitest';

const run = promisify(execFile);
const source = fileURLToPath(new URL('.', import.meta.url));
// A folder of its own: other test files configure and build at the same time.
const build = join(source, '../../build/links-test');
const binary = join(build, 'links_test');

const names = [
  'exchange - 2 ranks that spin read 100000 blocks right',
  'exchange - 2 ranks that sleep read 100000 blocks right',
  'exchange - 3 ranks on few cores read 30000 blocks right',
  'exchange - 5 ranks on few cores read 100000 blocks right',
  'exchange - 5 ranks that spin on few cores still come through',
  'exchange - a block of another length or key is a mismatch that names the rank',
  'exchange - a killed rank ends the wait at its deadline',
  'exchange - a frozen rank ends the wait at its deadline, and thawed goes on',
  'exchange - a group of shared-memory and host ranks reads the same blocks',
  'exchange - a group of host ranks only reads the same blocks',
  'tcp exchange - 2 ranks that spin read 5000 blocks right',
  'tcp exchange - 3 ranks on few cores read 3000 blocks right',
  'tcp exchange - 5 ranks on few cores read 1000 blocks right',
  'tcp exchange - 3 ranks send each other more than sockets hold',
  'tcp link - a fast writer waits for a slow reader and loses nothing',
  'tcp link - a flipped byte ends the connection and is counted',
  'tcp link - a repeated frame ends the connection and is counted',
  'tcp link - a frame left out ends the connection and is counted',
  'tcp link - a frame cut short ends the connection',
  'tcp link - a slow peer or network ends the wait at its deadline',
  'tcp link - a wrong key, a wrong epoch and strangers are refused and counted',
  'tcp link - a killed rank is noticed at once and named',
  'tcp link - abort wakes a wait within 50 ms',
  'tensor link - hidden states and sampled ids go round 20000 times',
  'tensor link - a fast writer waits for a slow reader and loses nothing',
  'tensor link - frames of other keys stay queued',
  'tensor link - a full ring ends the send at its deadline',
  'tensor link - host frames reach the rank that is served, and no other',
  'tensor link - pieces of one step arrive one after the other, shared memory and host',
  'tensor link - sampled ids travel inside a single stage',
  'links - abort wakes every kind of wait within 50 ms',
  'links - no descriptor, mapping or shared memory object is left',
  'links - a source that floods is refused and counted',
  'links - late and duplicate frames change nothing and are counted',
  "links - a segment that is not the peer's is refused by name",
];

describe.skipIf(process.platform !== 'linux')('native links', () => {
  beforeAll(() => {
    const configured = existsSync(join(build, 'CMakeCache.txt'));
    if (!configured) execFileSync('cmake', ['-S', source, '-B', build, '-DCMAKE_BUILD_TYPE=Release'], { stdio: 'pipe' });
    execFileSync('cmake', ['--build', build, '--target', 'links_test', '-j', '2'], { stdio: 'pipe' });
  }, 240_000);

  it('native links - every test of links_test.cpp is run here', async () => {
    const { stdout } = await run(binary, ['--list']);
    expect(stdout.trim().split('\n')).toEqual(names);
  });

  it.for(names)('%s', async (name, { skip }) => {
    // What a failing test prints is in the message of the error. 77: the test cannot run here, and says why.
    await run(binary, [name], { timeout: 110_000, killSignal: 'SIGKILL' }).catch((error: { code: unknown; stderr: string }) => {
      if (error.code === 77) skip(error.stderr);
      throw error;
    });
  });

  it.runIf(process.env['SHARDMESH_BENCH'] === '1')('native links - latency of one exchange', async () => {
    const { stdout } = await run(binary, ['--bench']);
    console.log(stdout);
    expect(stdout).toMatch(/2304 bytes, spin: p50 [\d.]+ us/);
  });
});
