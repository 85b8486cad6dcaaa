import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { ProtocolError } from '../../../protocol/errors.ts';
import { checkId, idFromBytes, isId, isRequestId, newRequestId, newWorkerId, writeIdBytes } from '../../../protocol/ids.ts';

describe('ids', () => {
  test('ids - are 26 characters of lower-case base32', () => {
    expect(idFromBytes(new Uint8Array(16))).toBe('aaaaaaaaaaaaaaaaaaaaaaaaaa');
    expect(idFromBytes(new Uint8Array(16).fill(255))).toBe('77777777777777777777777774');
    expect(idFromBytes(new TextEncoder().encode('0123456789abcdef'))).toBe('gaytemzugu3doobzmfrggzdfmy');
    expect(() => idFromBytes(new Uint8Array(15))).toThrow('16 bytes, got 15');
  });

  test('ids - go to 16 bytes and back', () => {
    fc.assert(
      fc.property(fc.uint8Array({ minLength: 16, maxLength: 16 }), (bytes) => {
        const id = idFromBytes(bytes);
        expect(isId(id)).toBe(true);
        const back = new Uint8Array(20);
        writeIdBytes(id, back, 3);
        expect([...back.subarray(3, 19)]).toEqual([...bytes]);
      }),
    );
  });

  test('ids - differ each time', () => {
    expect(new Set(Array.from({ length: 1_000 }, newWorkerId)).size).toBe(1_000);
  });

  test.each([
    '',
    'a',
    'a'.repeat(25),
    'a'.repeat(27),
    'A'.repeat(26),
    `${'a'.repeat(25)}b`,
    `${'a'.repeat(25)}.`,
    `${'a'.repeat(24)}.*`,
    7,
    null,
  ])('ids - %j is none', (value) => {
    expect(isId(value)).toBe(false);
    expect(() => checkId('worker', value)).toThrow(ProtocolError);
  });

  test('ids - of requests begin with req_', () => {
    expect(isRequestId(newRequestId())).toBe(true);
    expect(isRequestId(newWorkerId())).toBe(false);
  });
});
