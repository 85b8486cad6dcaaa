/**
 * `npm run bench:kernels -- [options of kernel_bench]`: builds test/kernels/kernel_bench.cpp and runs it. Prints microseconds, GB/s, Gop/s and the share of
 * this machine's own memory ceiling, measured in the same run.
 */
import { spawnSync } from 'node:child_process';
import { buildKernelTarget } from '../kernels/build-target.ts';

const binary = await buildKernelTarget('kernel_bench');
const { status } = spawnSync(binary, process.argv.slice(2), { stdio: 'inherit' });
process.exitCode = status ?? 1;
