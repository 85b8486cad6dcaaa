/**
 * Tells when the client of a request has gone. Asked of the socket, not of the response: a response that waits behind another one of the same connection
 * (HTTP pipelining) has no socket yet and never says that it was closed.
 */
import type { Socket } from 'node:net';

const watchers = new WeakMap<Socket, Set<() => void>>();

/** Calls `left` once when the socket closes, at once when it is closed already. @returns takes the watch back */
export function onDisconnect(socket: Socket, left: () => void): () => void {
  if (socket.destroyed) {
    left();
    return () => undefined;
  }
  let watching = watchers.get(socket);
  if (!watching) {
    const all = (watching = new Set<() => void>());
    watchers.set(socket, all);
    socket.once('close', () => {
      watchers.delete(socket);
      for (const one of all) one();
    });
  }
  const set = watching.add(left);
  return () => void set.delete(left);
}
