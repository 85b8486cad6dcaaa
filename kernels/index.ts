/** The face of the kernels: loads the native addon `build/shardmesh.node` and gives it types. */
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type {
  ExecutorCallbacks,
  ExecutorOptions,
  KernelTest,
  NativeAddon,
  NativeExecutor,
  OutputResult,
  OutputRow,
  StepDone,
} from './binding-types.ts';

export type * from './binding-types.ts';

/** An executor that `await using` disposes of. After that every call throws. */
export type Executor = NativeExecutor & AsyncDisposable;

export interface Addon extends NativeAddon {
  createExecutor(options: ExecutorOptions, callbacks: ExecutorCallbacks): Executor;
  /** Single operations, for tests. */
  readonly kernelTest: KernelTest;
}

/** How the addon is built; part of every error that says that it is missing. */
export const buildCommand = 'cmake -S kernels -B build -DCMAKE_BUILD_TYPE=Release && cmake --build build -j2';

let loaded: Addon | undefined;

/**
 * The addon, loaded once a process.
 * @throws {Error} naming file, platform and build command, when it is not built, or built for another machine
 */
export function loadAddon(): Addon {
  loaded ??= loadAddonFrom(join(projectRoot(), 'build', 'shardmesh.node'));
  return loaded;
}

/** Loads the addon from a file of another build. */
export function loadAddonFrom(file: string): Addon {
  const target = `${process.platform}-${process.arch}, Node ${process.version}`;
  if (!existsSync(file)) throw new Error(`the native addon ${file} (${target}) is not built; run: ${buildCommand}`);
  let native: NativeAddon & { kernelTest: KernelTest };
  try {
    native = createRequire(import.meta.url)(file) as typeof native;
  } catch (cause) {
    throw new Error(`the native addon ${file} does not load on ${target}; build it again on this machine: ${buildCommand}`, {
      cause,
    });
  }
  return {
    kernelTest: native.kernelTest,
    buildInfo: () => native.buildInfo(),
    cpuFeatures: () => native.cpuFeatures(),
    cudaFacts: () => native.cudaFacts(),
    kvBytesPerBlock: (program, blockTokens) => native.kvBytesPerBlock(program, blockTokens),
    openTcp: (host, port) => native.openTcp(host, port),
    createExecutor: (options, callbacks) =>
      disposable(
        native.createExecutor(options, {
          ...callbacks,
          onStep: (done: NativeStepDone) => callbacks.onStep({ ...done, outputs: outputResults(done.outputs) }),
        } as never),
      ),
  };
}

/** As the addon gives it: objects are made here, where they cost a tenth of what they cost there. */
type NativeStepDone = Omit<StepDone, 'outputs'> & { outputs: Float64Array };

function outputResults(numbers: Float64Array): OutputResult[] {
  const results: OutputResult[] = [];
  for (let at = 0; at < numbers.length;) {
    const [slot, token, hasLogprob, logprob, candidates] = [
      numbers[at]!,
      numbers[at + 1]!,
      numbers[at + 2]!,
      numbers[at + 3]!,
      numbers[at + 4]!,
    ];
    at += 5;
    const top: OutputResult['top'] = [];
    for (let i = 0; i < candidates; i++, at += 2) top.push({ token: numbers[at]!, logprob: numbers[at + 1]! });
    results.push({ slot, token, logprob: hasLogprob === 0 ? null : logprob, top });
  }
  return results;
}

/** `StepInput.outputs` of these rows. */
export function outputNumbers(rows: readonly OutputRow[]): Int32Array {
  const numbers = new Int32Array(rows.reduce((sum, { banned }) => sum + 3 + banned.length, 0));
  let at = 0;
  for (const { row, score, banned } of rows) {
    numbers[at] = row;
    numbers[at + 1] = score ?? -1;
    numbers[at + 2] = banned.length;
    numbers.set(banned, at + 3);
    at += 3 + banned.length;
  }
  return numbers;
}

function disposable(executor: NativeExecutor): Executor {
  return Object.defineProperty(executor, Symbol.asyncDispose, { value: () => executor.dispose() }) as Executor;
}

/** The nearest folder above this file with a package.json: works from `kernels/` and from `dist/kernels/`. */
function projectRoot(): string {
  let folder = dirname(fileURLToPath(import.meta.url));
  while (!existsSync(join(folder, 'package.json'))) {
    const parent = dirname(folder);
    if (parent === folder) throw new Error(`no package.json above ${fileURLToPath(import.meta.url)}`);
    folder = parent;
  }
  return folder;
}
