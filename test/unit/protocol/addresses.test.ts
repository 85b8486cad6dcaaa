import { describe, expect, test } from 'vitest';
import { addressText, isLoopback, listenHost, ownAddressTowards, parseAddress } from '../../../protocol/addresses.ts';

describe('addresses', () => {
  test('addresses - are read with and without a scheme, IPv6 in brackets only, and written back', () => {
    expect(parseAddress('nats://127.0.0.1:4222')).toEqual({ host: '127.0.0.1', port: 4222 });
    expect(parseAddress('tls://[2001:db8::1]:7422')).toEqual({ host: '2001:db8::1', port: 7422 });
    for (const text of ['node-1.example:7422', '[::1]:1']) expect(addressText(parseAddress(text)!)).toBe(text);
    for (const text of ['', 'host', 'host:', 'host:65536', '::1:7422', '[zz]:1', 'a b:1', 'host:1/x', '[127.0.0.1]:5'])
      expect(parseAddress(text)).toBeNull();
  });

  test('addresses - leave this host unless they are loopback ones, whatever a name looks like', () => {
    for (const host of ['localhost', '127.0.0.1', '127.9.9.9', '::1']) expect(isLoopback(host)).toBe(true);
    for (const host of ['127.evil.example', '10.0.0.1', '0.0.0.0', '::', 'localhost.example', ''])
      expect(isLoopback(host)).toBe(false);
  });

  test('addresses - of this host are listened on as they are, all others on every address', async () => {
    expect(listenHost('localhost')).toBe('127.0.0.1');
    expect(listenHost('127.0.0.5')).toBe('127.0.0.5');
    expect(listenHost('192.0.2.77')).toBe('0.0.0.0');
    expect(listenHost('2001:db8::77')).toBe('::');
    expect(await ownAddressTowards({ host: '127.0.0.1', port: 9 })).toBe('127.0.0.1');
  });
});
