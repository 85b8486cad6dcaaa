import { describe, expect, test } from 'vitest';
import { EnrollmentTokens } from '../../../../coordinator/authority/enrollment-tokens.ts';
import { parseToken, tokenText } from '../../../../protocol/enrollment.ts';
import { newMeshId } from '../../../../protocol/ids.ts';

const minute = 60_000;
const issued = (tokens: EnrollmentTokens, nowMs = 0, minutes = 15): { id: string; secret: string; expiresAtMs: number } => {
  const token = tokens.issue(nowMs, minutes);
  if (!token) throw new Error('too many are open');
  return token;
};
const wrong = 'A'.repeat(43);

describe('enrollment tokens', () => {
  test('enrollment tokens - are good once', () => {
    const tokens = new EnrollmentTokens();
    const { id, secret } = issued(tokens);
    expect(tokens.redeem(id, secret, 1)).toBeNull();
    expect(tokens.redeem(id, secret, 2)).toMatch(/used already/);
  });

  test('enrollment tokens - end when their minutes are over, and never later than 15', () => {
    const tokens = new EnrollmentTokens();
    const short = issued(tokens, 0, 1);
    const long = issued(tokens, 0, 600);
    expect(tokens.redeem(short.id, short.secret, minute)).toMatch(/expired at 1970-01-01T00:01:00/);
    expect(tokens.redeem(long.id, long.secret, 15 * minute)).toMatch(/expired/);
    const kept = issued(tokens, 0);
    expect(tokens.redeem(kept.id, kept.secret, 15 * minute - 1)).toBeNull();
  });

  test('enrollment tokens - say nothing of themselves to who does not know the secret, and are void after five wrong ones', () => {
    const tokens = new EnrollmentTokens();
    const { id, secret } = issued(tokens);
    const unknown = tokens.redeem('nobody', wrong, 1);
    for (let attempt = 0; attempt < 5; attempt++) expect(tokens.redeem(id, wrong, 1)).toBe(unknown);
    expect(tokens.redeem(id, secret, 2)).toMatch(/void after 5 wrong secrets/);
  });

  test('enrollment tokens - are looked at 20 times a minute for each address, and for 256 addresses', () => {
    const tokens = new EnrollmentTokens();
    for (let i = 0; i < 20; i++) expect(tokens.admits('192.0.2.1', 1)).toBe(true);
    expect(tokens.admits('192.0.2.1', 2)).toBe(false);
    expect(tokens.admits('192.0.2.2', 2)).toBe(true);
    for (let i = 0; i < 254; i++) expect(tokens.admits(`198.51.100.${i}`, 3)).toBe(true);
    expect(tokens.admits('203.0.113.1', 4)).toBe(false);
    expect(tokens.admits('192.0.2.2', 4)).toBe(true);
    expect(tokens.admits('192.0.2.1', 60_001)).toBe(true);
  });

  test('enrollment tokens - are not made without end', () => {
    const tokens = new EnrollmentTokens();
    for (let i = 0; i < 64; i++) issued(tokens);
    expect(tokens.issue(1, 15)).toBeNull();
    expect(tokens.issue(15 * minute + 1, 15)).not.toBeNull();
  });
});

describe('token text', () => {
  const token = {
    address: { host: '192.0.2.1', port: 7423 },
    authoritySha256: Buffer.alloc(32, 7),
    mesh: newMeshId(),
    ...issued(new EnrollmentTokens()),
  };

  test('token text - comes back whole, with IPv6 addresses too', () => {
    for (const host of ['192.0.2.1', 'node-1.example', '2001:db8::1']) {
      const { expiresAtMs: _, ...fields } = { ...token, address: { host, port: 7423 } };
      expect(parseToken(tokenText(fields))).toEqual(fields);
    }
  });

  test('token text - that was cut off or is something else is none', () => {
    const text = tokenText(token);
    for (let length = 0; length < text.length - 8; length += 7) expect(parseToken(text.slice(0, length))).toBeNull();
    expect(parseToken(`x${text}`)).toBeNull();
    expect(parseToken('')).toBeNull();
  });
});
