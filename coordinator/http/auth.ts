/**
 * Who may call: API keys (only their sha256 is kept, compared in constant time), the Host header (against DNS rebinding) and the Origin header (no web page
 * may call unless configured). Applies to every route, unknown ones too, except `/livez`, `/readyz` and `/health`.
 */
import { createHash, timingSafeEqual } from 'node:crypto';
import { ShardmeshError } from '../../protocol/errors.ts';

const openRoutes = new Set(['/livez', '/readyz', '/health']);
const loopbackNames = new Set(['localhost', '127.0.0.1', '[::1]']);

export interface AuthOptions {
  /** Empty: no key is needed (loopback only). */
  apiKeys: readonly string[];
  /** Host names that are answered besides the loopback ones; null: all (a key is needed, so a page that rebinds a name gains nothing). */
  hosts: readonly string[] | null;
  /** Origins of web pages that may call. */
  origins: readonly string[];
}

const digest = (key: string): Buffer => createHash('sha256').update(key).digest();

export class Auth {
  readonly #keys: { id: string; sha256: Buffer }[];
  readonly #hosts: Set<string> | null;
  readonly #origins: Set<string>;

  constructor({ apiKeys, hosts, origins }: AuthOptions) {
    this.#keys = apiKeys.map((key) => {
      const sha256 = digest(key);
      return { id: sha256.toString('hex').slice(0, 16), sha256 };
    });
    this.#hosts = hosts && new Set([...loopbackNames, ...hosts.map((host) => host.toLowerCase())]);
    this.#origins = new Set(origins);
  }

  /**
   * The tenant of a request: an id of its key, `local` where no key is needed.
   * @param route the route that the router found, so that no second reading of the path can differ from the first; undefined: none
   * @throws {ShardmeshError} `forbidden` (Host, Origin), `unauthorized`
   */
  check(route: string | undefined, headers: Record<string, string | string[] | undefined>): string {
    const host = String(headers['host'] ?? '').toLowerCase();
    if (this.#hosts && !this.#hosts.has(host.replace(/:\d+$/, '')))
      throw new ShardmeshError('forbidden', 'This Host is not served here.');
    const origin = headers['origin'];
    if (origin !== undefined && !this.#origins.has(String(origin)))
      throw new ShardmeshError('forbidden', 'Requests from this Origin are not allowed.');
    if ((route !== undefined && openRoutes.has(route)) || this.#keys.length === 0) return 'local';
    const [scheme, key] = String(headers['authorization'] ?? '').split(' ', 2);
    const offered = digest(scheme?.toLowerCase() === 'bearer' && key ? key : '');
    let tenant: string | null = null;
    // All keys are compared, so the time says nothing about which one matched.
    for (const one of this.#keys) if (timingSafeEqual(one.sha256, offered)) tenant = one.id;
    if (tenant === null) throw new ShardmeshError('unauthorized');
    return tenant;
  }
}
