/**
 * The few pieces of DER (ITU-T X.690) that an X.509 certificate is made of, written and never read: reading is left to OpenSSL and Go, which check what comes
 * out of here. Each function returns one complete value: tag, length, content.
 */
type Bytes = Uint8Array;

const value = (tag: number, content: Bytes): Bytes => Buffer.concat([Buffer.from([tag, ...lengthOf(content.length)]), content]);

function lengthOf(bytes: number): number[] {
  if (bytes < 0x80) return [bytes];
  const digits: number[] = [];
  for (let rest = bytes; rest > 0; rest >>>= 8) digits.unshift(rest & 0xff);
  return [0x80 | digits.length, ...digits];
}

export const sequence = (...parts: Bytes[]): Bytes => value(0x30, Buffer.concat(parts));
export const set = (...parts: Bytes[]): Bytes => value(0x31, Buffer.concat(parts));
export const boolean = (on: boolean): Bytes => value(0x01, Buffer.from([on ? 0xff : 0]));
export const octets = (content: Bytes): Bytes => value(0x04, content);
export const utf8 = (text: string): Bytes => value(0x0c, Buffer.from(text, 'utf8'));

/** `[number]` around whole values. */
export const explicit = (number: number, ...parts: Bytes[]): Bytes => value(0xa0 | number, Buffer.concat(parts));
/** `[number]` in place of the tag that a value of bytes would have. */
export const implicit = (number: number, content: Bytes): Bytes => value(0x80 | number, content);

/** A non-negative integer, most significant byte first, in as few bytes as it needs. */
export function integer(bytes: Bytes): Bytes {
  let start = 0;
  while (start < bytes.length - 1 && bytes[start] === 0) start++;
  const digits = bytes.subarray(start);
  // A leading bit of 1 would mean a negative number.
  return value(0x02, (digits[0] ?? 0) & 0x80 ? Buffer.concat([Buffer.from([0]), digits]) : digits);
}

/** `unused`: bits at the end that do not count. */
export const bits = (content: Bytes, unused = 0): Bytes => value(0x03, Buffer.concat([Buffer.from([unused]), content]));

/** `1.3.101.112` */
export function objectId(dotted: string): Bytes {
  const [first = 0, second = 0, ...rest] = dotted.split('.').map(Number);
  const content = [first * 40 + second];
  for (const arc of rest) {
    const digits = [arc & 0x7f];
    for (let left = arc >>> 7; left > 0; left >>>= 7) digits.unshift((left & 0x7f) | 0x80);
    content.push(...digits);
  }
  return value(0x06, Buffer.from(content));
}

/** Two-digit years up to 2049, four digits from then on, as X.509 wants it (RFC 5280, 4.1.2.5). Whole seconds. */
export function time(date: Date): Bytes {
  const digits = date.toISOString().replaceAll(/[-:T]|\.\d+/g, '');
  return date.getUTCFullYear() < 2050
    ? value(0x17, Buffer.from(digits.slice(2), 'ascii'))
    : value(0x18, Buffer.from(digits, 'ascii'));
}
