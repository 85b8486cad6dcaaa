/**
 * Server-sent events out of a byte stream, as cheaply as it can be done: the client shares its cores with the server it measures. Only `data` lines matter
 * here; a line may be cut anywhere by the network, inside a character as well, so bytes are kept and text is made of whole lines only.
 */
const newline = 0x0a;
const carriageReturn = 0x0d;
const space = 0x20;
/** An event of a chat stream has some hundred bytes; a server that never ends a line would fill the memory. */
export const lineBytesMax = 4 * 1024 ** 2;

export class SseParser {
  #rest: Buffer | null = null;
  readonly #onData: (data: string) => void;

  /** @param onData  called for each `data:` line with what follows */
  constructor(onData: (data: string) => void) {
    this.#onData = onData;
  }

  /** @throws {RangeError} a line is longer than `lineBytesMax` */
  push(bytes: Buffer): void {
    const all = this.#rest ? Buffer.concat([this.#rest, bytes]) : bytes;
    let begin = 0;
    for (let end = all.indexOf(newline, begin); end >= 0; end = all.indexOf(newline, begin)) {
      this.#line(all, begin, end > begin && all[end - 1] === carriageReturn ? end - 1 : end);
      begin = end + 1;
    }
    if (all.length - begin > lineBytesMax) throw new RangeError(`a line of the stream is longer than ${lineBytesMax} bytes`);
    this.#rest = begin < all.length ? all.subarray(begin) : null;
  }

  #line(all: Buffer, begin: number, end: number): void {
    if (end - begin < 5 || all.toString('latin1', begin, begin + 5) !== 'data:') return;
    this.#onData(all.toString('utf8', all[begin + 5] === space ? begin + 6 : begin + 5, end));
  }
}
