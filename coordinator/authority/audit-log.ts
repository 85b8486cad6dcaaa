import { appendFileSync } from 'node:fs';

/** Who was let in, turned away and thrown out, as JSON lines that are only ever appended to (0600). No secrets. */
export class AuditLog {
  readonly #path: string;

  constructor(path: string) {
    this.#path = path;
  }

  write(event: string, fields: Record<string, string | number | null>): void {
    appendFileSync(this.#path, `${JSON.stringify({ time: new Date().toISOString(), event, ...fields })}\n`, { mode: 0o600 });
  }
}
