/** How control messages travel: at most once, in order for each pair of sender and subject, as long as the connection stands. */

export type MessageHandler = (bytes: Uint8Array, subject: string) => void;

export interface TransportSubscription {
  unsubscribe(): void;
}

export type TransportEvent =
  /** For the first time or again. Subscriptions are in force. Messages published by others in between are lost. */
  | { type: 'connected'; server: string; version: string }
  | { type: 'disconnected'; reason: string }
  /** The server goes away soon (lame duck): begin nothing new. */
  | { type: 'server_leaving' }
  /** Fatal for a process: its credentials do not allow what it was built to do. */
  | { type: 'permission_denied'; operation: 'publish' | 'subscribe'; subject: string }
  | { type: 'warning'; message: string }
  /** Ended for good; `error` is null after `close()`. */
  | { type: 'closed'; error: Error | null };

export interface TransportCounters {
  published: number;
  received: number;
  bytesOut: number;
  bytesIn: number;
  /** Publishes refused because the connection was down. */
  publishWhileDown: number;
  /** Publishes refused because the payload was larger than the server allows. */
  oversize: number;
  reconnects: number;
}

/** Two implementations: NATS (`nats-transport.ts`) and in memory, with faults (tests only). */
export interface Transport {
  readonly connected: boolean;
  /** Most bytes of one message. */
  readonly payloadBytesMax: number;
  readonly counters: Readonly<TransportCounters>;
  /**
   * Sends once and forgets. Success is not delivery: who needs an answer waits for one with a deadline.
   * @returns false while the connection is down, or closed (counted, nothing sent)
   * @throws {ShardmeshError} `invalid_message`: larger than `payloadBytesMax`; nothing was sent
   */
  publish(subject: string, bytes: Uint8Array): boolean;
  /**
   * Resolves when the server has confirmed. The handler gets a view that it may keep, and must not throw.
   * @throws {ShardmeshError} `permission_denied`, `broker_lost`
   */
  subscribe(subject: string, handler: MessageHandler): Promise<TransportSubscription>;
  /** Resolves when the server has everything published before. @throws {ShardmeshError} `broker_lost` */
  flush(): Promise<void>;
  /** Calls back on each event from now on, in order. @returns stops it */
  onEvent(listener: (event: TransportEvent) => void): () => void;
  /** Sends what is queued, lets handlers finish, leaves; gives up waiting after a few seconds. Safe to call twice. */
  close(): Promise<void>;
}
