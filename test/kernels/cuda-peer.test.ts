/**
 * Runs simt/cuda_peer_test.cpp: the reductions between cards of one host (kernels/cuda/peer_reduce.cu), several emulated cards at once, against the reference with memcmp;
 * and simt/cuda_peer_processes_test.cpp: their driver in several processes, some of which are killed. Each of their cases is a test here; those that find something run the
 * same kernels with one line broken. Not shown: speed, and what a link between cards does.
 */
import { beforeAll, describe, expect, it } from 'vitest';
import { buildKernelTarget } from './build-target.ts';
import { linesOf } from './test-program.ts';

const cases = [
  "two ranks and more, 3:2:1 too, have the reference's bits in one go",
  'they have them in two goes, with fewer rows than ranks too',
  'with the norm of the residual in the same launch they have its bits too, in one go',
  'so they have in two goes, with fewer rows than ranks too',
  'sixteen ranks of one unit each',
  "counters of an earlier epoch are not taken for this one's",
  'a peer that never comes is named when the deadline is over, and the next epoch works',
  'a host that gives up ends the wait',
  'refuse shapes by name before any launch',
  'finds a stamp without release',
  'finds a second stamp without release',
  'finds a poll without acquire',
  'finds a single block',
  'finds stamps that are compared without their epoch',
  'with the norm, finds a stamp without release',
  'with the norm, finds a second stamp without release',
  'with the norm, finds a poll without acquire',
  'with the norm, finds a second poll without acquire',
  'with the norm, finds a single block',
  'with the norm, finds stamps that are compared without their epoch',
  'with the norm, finds a norm that a block has not added to yet',
  'with the norm, finds shares that are published a block too early',
  'finds a stamp that is published before the wait for the product',
];

const ofEachPlace = [
  "two ranks have the reference's bits, in two epochs",
  'three uneven ranks have them too',
  'a rank killed in mid-step is named by the others at the deadline',
  'a host that gives up ends the wait',
];
const programs = {
  cuda_peer_test: cases.map((name) => `cuda peers - ${name}`),
  cuda_peer_processes_test: ['card', 'host'].flatMap((place) =>
    ofEachPlace.map((name) => `cuda peer processes - ${place} memory: ${name}`),
  ),
};

describe.skipIf(process.platform !== 'linux' || process.arch !== 'x64')('cuda peers on emulated cards', () => {
  for (const [target, names] of Object.entries(programs)) {
    describe(target, () => {
      let lines: string[] = [];
      beforeAll(async () => {
        const binary = await buildKernelTarget(target);
        lines = await linesOf(binary, [], 60_000);
      }, 600_000);

      it.each(names)('%s', (name) => {
        expect(lines.find((line) => line === `ok ${name}` || line.startsWith(`FAIL ${name}:`))).toBe(`ok ${name}`);
      });

      it('every case is listed here', () => {
        expect(lines.filter((line) => !/^(emulated |# )/.test(line))).toHaveLength(names.length);
      });
    });
  }
});
