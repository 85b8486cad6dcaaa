/** The face of the kernels: loads the native addon `build/shardmesh.node` and gives it types. */
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { ExecutorCallbacks, ExecutorOptions, KernelTest, NativeAddon, NativeExecutor } from './binding-types.ts';

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
    kvBytesPerBlock: (program, blockTokens) => native.kvBytesPerBlock(program, blockTokens),
    createExecutor: (options, callbacks) => disposable(native.createExecutor(options, callbacks)),
  };
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
