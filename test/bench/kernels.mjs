/**
 * `npm run bench:kernels -- [--json] [options of kernel_bench]`: builds test/kernels/kernel_bench.cpp into build/kernel-tests and runs it. Before each kernel it
 * measures this machine's ceilings on the same threads in the same second: reading memory, reading a second-level cache, int8 multiply-adds from registers. Each
 * product is shown with its share of memory and of multiply-adds, the larger of which limits it; each other operation with its share of what limits it. `--json`
 * prints one object instead of lines.
 */
import { spawn, spawnSync } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const sourceDir = fileURLToPath(new URL('../kernels', import.meta.url));
const buildDir = fileURLToPath(new URL('../../build/kernel-tests', import.meta.url));

/** Runs one build command under the lock of test/kernels/build-target.ts; ends this process with the command's output when it fails. */
function build(command) {
  const { status, stdout, stderr, error } = spawnSync('flock', [`${buildDir}.lock`, ...command], { encoding: 'utf8' });
  if (status === 0) return;
  console.error(`bench:kernels: ${command.join(' ')} failed${error ? `: ${error.message}` : ''}\n${stdout ?? ''}${stderr ?? ''}`);
  process.exit(1);
}

const options = process.argv.slice(2);
if (options[0] === '--step' && !options.includes('--help')) {
  const { benchSteps } = await import('./step.mjs');
  await benchSteps(options.slice(1));
  process.exit(0);
}
if (options.includes('--help')) {
  console.log(`npm run bench:kernels -- [options]

  --json              one JSON object: cpu, threads, ceilings, products, operations
  --only WHAT         products, or operations (norms, activations, attention); default: both
  --set NAME          amx, avx512, avx2, portable (default: the best of this machine)
  --type NAME         one weight type, such as Q4_1 (default: Q4_1 Q8_0 Q4_K Q6_K)
  --threads N         compute threads, pinned to the first cores (default 1)
  --quick             fewer copies and rounds: minutes become seconds, figures less steady
  --strips-one 1|4  --strips-few 1|2  --prefetch BYTES  --panel TOKENS    tuning in place of this processor's own

Example: npm run bench:kernels -- --quick --type Q4_1 --threads 2 --json

With --step first, whole steps of the default model instead (build the project first):
  --engines LIST      ranks x threads of a rank (default 1x1,1x2,2x1), /int16 behind it for int16 activations, @avx512 and so on for another kernel set
  --sequences LIST    sequences decoded together (default 1,4,8,16,32); --context N tokens before them (128), --steps N (48)
  --prefill N         tokens of one prompt (512; 0: none);  --rounds N (5);  --model FILE;  --json
  --profile                where the time of a step goes, by action: a prompt, then each number of sequences
  --rival FOLDER      with llama-bench and llama-batched-bench of llama.cpp or ik_llama.cpp; again for another; --threads LIST for them (2)

Example: npm run bench:kernels -- --step --rival /opt/llama.cpp/bin --rival /opt/ik_llama.cpp/bin`);
  process.exit(0);
}

mkdirSync(buildDir, { recursive: true });
build(['cmake', '-S', sourceDir, '-B', buildDir, '-DCMAKE_BUILD_TYPE=Release']);
build(['cmake', '--build', buildDir, '--target', 'kernel_bench', '-j', '2']);
const bench = spawn(`${buildDir}/kernel_bench`, options, { stdio: 'inherit' });
bench.on('exit', (code, signal) => {
  if (signal) console.error(`bench:kernels: kernel_bench ended by ${signal}`);
  process.exitCode = code ?? 1;
});
