/** Addresses as `host:port`, IPv6 hosts in brackets; and which of them leave this machine. */
import { isIP, isIPv6 } from 'node:net';
import { networkInterfaces } from 'node:os';
import { createSocket } from 'node:dgram';

export interface Address {
  /** Without brackets. */
  host: string;
  port: number;
}

/** `host:port`, `[::1]:port` or `nats://host:port`; null when it is none. */
export function parseAddress(text: string): Address | null {
  const match = /^(?:[a-z]+:\/\/)?(?:\[([0-9a-f:.]{2,45})\]|([A-Za-z0-9._-]{1,253})):(\d{1,5})$/i.exec(text);
  const host = match?.[1] ?? match?.[2];
  const port = Number(match?.[3]);
  if (host === undefined || port > 65_535 || (match?.[1] !== undefined && !isIPv6(host))) return null;
  return { host, port };
}

export const addressText = ({ host, port }: Address): string => (isIPv6(host) ? `[${host}]:${port}` : `${host}:${port}`);

/** Only the processes of this host reach it. */
export const isLoopback = (host: string): boolean =>
  host === 'localhost' || host === '::1' || (isIP(host) === 4 && host.startsWith('127.'));

/**
 * Where to listen so that peers reach `host`: there, when it is an address of this host; else (a name, an address that a router translates) on every address.
 */
export function listenHost(host: string): string {
  if (host === 'localhost') return '127.0.0.1';
  if (isLoopback(host)) return host;
  const own = Object.values(networkInterfaces()).some((addresses) => addresses?.some(({ address }) => address === host));
  return own ? host : isIPv6(host) ? '::' : '0.0.0.0';
}

/** The own address that packets to `host` leave from. Sends nothing. @throws {Error} no route, or no such name */
export function ownAddressTowards({ host, port }: Address): Promise<string> {
  return new Promise((resolve, reject) => {
    const socket = createSocket(isIPv6(host) ? 'udp6' : 'udp4');
    const end = (error: Error | null): void => {
      const address = error ? '' : socket.address().address;
      socket.close();
      if (error) reject(error);
      else resolve(address);
    };
    socket.once('error', (error) => end(error));
    socket.connect(port, host, () => end(null));
  });
}
