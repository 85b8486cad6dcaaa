/**
 * How `shardmesh enroll` talks to the coordinator that runs: a Unix socket in the mesh's folder (0700), so that the file system says who may. One line of JSON
 * each way, then it is closed.
 */
import { chmodSync, rmSync } from 'node:fs';
import { createConnection, createServer, type Server } from 'node:net';
import { join } from 'node:path';
import { ShardmeshError, toShardmeshError } from '../../protocol/errors.ts';
import type { EnrolledWorker } from './mesh-authority.ts';

export type ControlRequest = { command: 'token'; minutes: number } | { command: 'list' } | { command: 'revoke'; worker: string };

export interface ControlReplies {
  token: { token: string; expiresAt: string };
  /** `state`: what the coordinator sees of it now. */
  list: { workers: (EnrolledWorker & { state: string })[] };
  revoke: { worker: string };
}

export type ControlHandlers = {
  [C in ControlRequest['command']]: (
    request: Extract<ControlRequest, { command: C }>,
  ) => Promise<ControlReplies[C]> | ControlReplies[C];
};

const lineBytesMax = 1 << 20;
const timeoutMs = 10_000;
/** The kernel takes no longer paths. */
const pathBytesMax = 107;

const socketPath = (folder: string): string => join(folder, 'control.sock');

/** @throws {ShardmeshError} `config_invalid`: another coordinator has this folder, or its name is too long for a socket */
export async function checkFolderIsFree(folder: string): Promise<void> {
  const path = socketPath(folder);
  if (Buffer.byteLength(path) > pathBytesMax)
    throw new ShardmeshError(
      'config_invalid',
      `--mesh ${folder}: a path of at most ${pathBytesMax - '/control.sock'.length} bytes is needed`,
    );
  if (await answers(path))
    throw new ShardmeshError('config_invalid', `another shardmesh serve runs with --mesh ${folder}; one coordinator a mesh`);
}

/** Call `checkFolderIsFree` before anything is started. @returns closes it */
export async function openControlSocket(folder: string, handlers: ControlHandlers): Promise<() => void> {
  const path = socketPath(folder);
  // Left behind by one that was killed.
  rmSync(path, { force: true });
  const server = createServer({ allowHalfOpen: true }, (socket) => {
    socket.setTimeout(timeoutMs, () => socket.destroy());
    socket.on('error', () => undefined);
    let text = '';
    socket.setEncoding('utf8').on('data', (part: string) => {
      text += part;
      if (text.length > lineBytesMax) return socket.destroy();
      if (!text.endsWith('\n')) return;
      void reply(text, handlers).then((answer) => socket.end(`${JSON.stringify(answer)}\n`));
    });
  });
  await listen(server, path);
  chmodSync(path, 0o600);
  return () => {
    server.close();
    rmSync(path, { force: true });
  };
}

/** @throws {ShardmeshError} `config_invalid`: no coordinator runs with this folder, or what it answered */
export async function askCoordinator<R extends ControlRequest>(
  folder: string,
  request: R,
): Promise<ControlReplies[R['command']]> {
  const line = await new Promise<string>((resolve, reject) => {
    const socket = createConnection(socketPath(folder));
    let text = '';
    socket.setTimeout(timeoutMs, () => socket.destroy(new Error(`no answer within ${timeoutMs} ms`)));
    socket.on('connect', () => socket.write(`${JSON.stringify(request)}\n`));
    socket.setEncoding('utf8').on('data', (part: string) => (text += part));
    socket.on('end', () => resolve(text));
    socket.on('error', (cause) =>
      reject(
        new ShardmeshError(
          'config_invalid',
          `no coordinator runs with --mesh ${folder} (${cause.message}); start it first: shardmesh serve --advertise ADDRESS`,
          { cause },
        ),
      ),
    );
  });
  const answer = JSON.parse(line) as { error?: string; reply?: ControlReplies[R['command']] };
  if (answer.reply === undefined) throw new ShardmeshError('config_invalid', answer.error ?? 'the coordinator gave no answer');
  return answer.reply;
}

async function reply(text: string, handlers: ControlHandlers): Promise<{ reply: unknown } | { error: string }> {
  try {
    const request = JSON.parse(text) as ControlRequest;
    switch (request.command) {
      case 'token':
        return { reply: await handlers.token(request) };
      case 'list':
        return { reply: await handlers.list(request) };
      case 'revoke':
        return { reply: await handlers.revoke(request) };
      default:
        request satisfies never;
        return { error: 'no such command' };
    }
  } catch (error) {
    return { error: toShardmeshError(error).message };
  }
}

const listen = (server: Server, path: string): Promise<void> =>
  new Promise((resolve, reject) => {
    server.once('error', reject);
    server.listen(path, resolve);
  });

const answers = (path: string): Promise<boolean> =>
  new Promise((resolve) => {
    const socket = createConnection(path);
    socket.on('connect', () => (socket.destroy(), resolve(true)));
    socket.on('error', () => resolve(false));
  });
