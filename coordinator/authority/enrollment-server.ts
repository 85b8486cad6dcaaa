/**
 * Takes workers of other hosts in. An HTTPS listener of its own, with one route, small limits and no client certificate: who calls has none yet. What it trusts is
 * a token that an operator of this host made (`shardmesh enroll`).
 */
import { createServer, type Server } from 'node:https';
import type { IncomingMessage, ServerResponse } from 'node:http';
import { addressText, listenHost, type Address } from '../../protocol/addresses.ts';
import {
  enrollmentPath,
  parseEnrollmentRequest,
  tokenText,
  type EnrollmentReply,
  type EnrollmentRequest,
} from '../../protocol/enrollment.ts';
import { ShardmeshError, toShardmeshError } from '../../protocol/errors.ts';
import type { WorkerId } from '../../protocol/ids.ts';
import { enrollmentLimits } from '../../protocol/limits.ts';
import { coordinatorName, tlsVersionMin } from '../../protocol/tls.ts';
import { EnrollmentTokens } from './enrollment-tokens.ts';
import type { MeshAuthority } from './mesh-authority.ts';

export interface EnrollmentServerOptions {
  authority: MeshAuthority;
  /** As workers on other hosts reach it. */
  address: Address;
  /** Lets the new worker in on the broker. */
  onEnrolled(worker: WorkerId, nkey: string): Promise<void>;
  /** The rest of the reply: how to reach the broker. */
  broker(): Pick<EnrollmentReply, 'url' | 'serverName'>;
  event(name: string, fields: Record<string, unknown>): void;
}

export class EnrollmentServer {
  readonly #options: EnrollmentServerOptions;
  readonly #tokens = new EnrollmentTokens();
  readonly #server: Server;

  private constructor(options: EnrollmentServerOptions) {
    this.#options = options;
    const { authority } = options;
    const { certificate, key } = authority.identityOf(coordinatorName(authority.mesh));
    // The authority's certificate goes along: a worker knows its sha256 only.
    const cert = certificate + authority.certificate;
    const { timeoutMs, connectionsMax } = enrollmentLimits;
    this.#server = createServer(
      {
        cert,
        key,
        minVersion: tlsVersionMin,
        handshakeTimeout: timeoutMs,
        headersTimeout: timeoutMs,
        requestTimeout: timeoutMs,
        maxHeaderSize: 4_096,
      },
      (request, response) => void this.#answer(request, response),
    );
    this.#server.maxConnections = connectionsMax;
    this.#server.keepAliveTimeout = 1;
    this.#server.on('tlsClientError', () => undefined);
  }

  /** @throws {ShardmeshError} `config_invalid`: the port is taken */
  static async listen(options: EnrollmentServerOptions): Promise<EnrollmentServer> {
    const enrollment = new EnrollmentServer(options);
    const { host, port } = options.address;
    await new Promise<void>((resolve, reject) => {
      enrollment.#server.once('error', (cause) =>
        reject(
          new ShardmeshError(
            'config_invalid',
            `cannot listen on ${addressText(options.address)} for enrollment: ${cause.message}`,
            { cause },
          ),
        ),
      );
      enrollment.#server.listen(port, listenHost(host), resolve);
    });
    return enrollment;
  }

  /** @throws {ShardmeshError} `config_invalid`: too many are open */
  issueToken(minutes: number): { token: string; id: string; expiresAt: string } {
    const issued = this.#tokens.issue(Date.now(), minutes);
    if (!issued)
      throw new ShardmeshError(
        'config_invalid',
        `${enrollmentLimits.openTokensMax} tokens are open already; wait until they are used or over`,
      );
    const { authority, address } = this.#options;
    const { id, secret, expiresAtMs } = issued;
    const expiresAt = new Date(expiresAtMs).toISOString();
    this.#log('token_issued', { token: id, expiresAt });
    return {
      token: tokenText({ address, authoritySha256: authority.sha256(), mesh: authority.mesh, id, secret }),
      id,
      expiresAt,
    };
  }

  close(): void {
    this.#server.closeAllConnections();
    this.#server.close();
  }

  async #answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const say = (status: number, body: object): void =>
      void response.writeHead(status, { 'content-type': 'application/json', connection: 'close' }).end(JSON.stringify(body));
    const address = request.socket.remoteAddress ?? 'unknown';
    try {
      // A HEAD tells what time it is here.
      if (request.method === 'HEAD') return say(200, {});
      if (request.method !== 'POST' || request.url !== enrollmentPath) return say(404, { error: 'no such route' });
      if (!this.#tokens.admits(address, Date.now())) return say(429, { error: 'too many requests; try again in a minute' });
      const text = await bodyOf(request);
      const asked = text === null ? null : parseEnrollmentRequest(text);
      if (asked === null) return say(400, { error: 'not a request for enrollment' });
      const refusal = this.#tokens.redeem(asked.id, asked.secret, Date.now());
      if (refusal !== null) {
        this.#log('enrollment_refused', { token: asked.id, address, reason: refusal });
        return say(403, { error: refusal });
      }
      say(200, await this.#enroll(asked, address));
    } catch (error) {
      const { code, message } = toShardmeshError(error);
      if (code !== 'internal') this.#log('enrollment_refused', { address, reason: message });
      if (!response.headersSent) say(code === 'invalid_message' ? 400 : 500, { error: message });
    }
  }

  async #enroll({ id, nkey, publicKey, host }: EnrollmentRequest, address: string): Promise<EnrollmentReply> {
    const { authority } = this.#options;
    const { worker, certificate } = authority.enroll({ nkey, publicKey, host, address });
    await this.#options.onEnrolled(worker, nkey);
    const broker = this.#options.broker();
    this.#options.event('worker_enrolled', { worker, host, address, token: id });
    const { mesh, placement, secret } = authority;
    return { worker, mesh, placement, secret, certificate, ...broker };
  }

  #log(name: string, fields: Record<string, string>): void {
    this.#options.authority.audit.write(name, fields);
    this.#options.event(name, fields);
  }
}

/** null: too long. */
async function bodyOf(request: IncomingMessage): Promise<string | null> {
  const parts: Buffer[] = [];
  let bytes = 0;
  for await (const part of request as AsyncIterable<Buffer>) {
    bytes += part.length;
    if (bytes > enrollmentLimits.bodyBytesMax) return null;
    parts.push(part);
  }
  return Buffer.concat(parts).toString('utf8');
}
