/** One-time tokens for workers of other hosts: made here, good once and for minutes. Pure: the clock is a parameter. They live in memory only, so a restart voids them. */
import { createHash, randomBytes, timingSafeEqual } from 'node:crypto';
import { tokenBytes } from '../../protocol/enrollment.ts';
import { enrollmentLimits } from '../../protocol/limits.ts';

interface Token {
  secretSha256: Buffer;
  expiresAtMs: number;
  attempts: number;
  state: 'open' | 'used' | 'void';
}

const sha256 = (text: string): Buffer => createHash('sha256').update(text).digest();
const minuteMs = 60_000;

export class EnrollmentTokens {
  /** Oldest first. */
  readonly #tokens = new Map<string, Token>();
  #minuteBegan = Number.NEGATIVE_INFINITY;
  /** In this minute, by address. */
  readonly #requests = new Map<string, number>();

  /** @returns what the token must carry; null: too many are open already */
  issue(nowMs: number, minutes: number): { id: string; secret: string; expiresAtMs: number } | null {
    const open = [...this.#tokens.values()].filter(({ state, expiresAtMs }) => state === 'open' && expiresAtMs > nowMs);
    if (open.length >= enrollmentLimits.openTokensMax) return null;
    const id = randomBytes(tokenBytes.id).toString('base64url');
    const secret = randomBytes(tokenBytes.secret).toString('base64url');
    const expiresAtMs = nowMs + Math.min(minutes, enrollmentLimits.minutesMax) * minuteMs;
    this.#tokens.set(id, { secretSha256: sha256(secret), expiresAtMs, attempts: 0, state: 'open' });
    for (const oldest of this.#tokens.keys()) {
      if (this.#tokens.size <= enrollmentLimits.rememberedTokensMax) break;
      this.#tokens.delete(oldest);
    }
    return { id, secret, expiresAtMs };
  }

  /** Whether one more request of this address is looked at; a stranger's flood leaves room for others, and no lines in the audit log. */
  admits(address: string, nowMs: number): boolean {
    if (nowMs - this.#minuteBegan >= minuteMs) {
      this.#minuteBegan = nowMs;
      this.#requests.clear();
    }
    const count = (this.#requests.get(address) ?? 0) + 1;
    if (count > enrollmentLimits.requestsPerMinuteMax) return false;
    if (count === 1 && this.#requests.size >= enrollmentLimits.addressesPerMinuteMax) return false;
    this.#requests.set(address, count);
    return true;
  }

  /**
   * Uses the token up. Only who knows the secret learns more than that it was wrong.
   * @returns null when it was good; else why not
   */
  redeem(id: string, secret: string, nowMs: number): string | null {
    const token = this.#tokens.get(id);
    const right = timingSafeEqual(token?.secretSha256 ?? Buffer.alloc(32), sha256(secret));
    if (!token || !right) {
      if (token?.state === 'open' && ++token.attempts >= enrollmentLimits.attemptsMax) token.state = 'void';
      return 'this token is not known here: it is not of this run of `shardmesh serve`, or not whole';
    }
    if (token.state === 'used') return 'this token was used already; it is good once';
    if (token.state === 'void') return `this token is void after ${enrollmentLimits.attemptsMax} wrong secrets`;
    if (nowMs >= token.expiresAtMs) return `this token expired at ${new Date(token.expiresAtMs).toISOString()}`;
    token.state = 'used';
    return null;
  }
}
