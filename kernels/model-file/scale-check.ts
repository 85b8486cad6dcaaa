/** Every scale and every float of a weight must be finite: one NaN would silently spoil all that is computed after it. Scanned once, where weights are read. */
import { endianness } from 'node:os';
import type { TensorType } from '../programs/program.ts';
import { ModelFileError } from './model-file-error.ts';
import { quantType } from './quant-types.ts';

const halfExponent = 0x7c00;
const bf16Exponent = 0x7f80;
const singleExponent = 0x7f800000;
const littleEndian = endianness() === 'LE';

/**
 * @param data whole blocks of the tensor
 * @throws {ModelFileError} `bad_scale`, naming tensor and block
 */
export function checkScales(tensor: string, type: TensorType, data: Buffer): void {
  const { blockBytes, scaleOffsets } = quantType(type);
  const bad = findBad(type, data, blockBytes, scaleOffsets);
  if (bad === null) return;
  const block = Math.floor(bad / blockBytes);
  const what = scaleOffsets.length > 0 ? 'a scale' : 'a value';
  throw new ModelFileError(
    'bad_scale',
    `tensor ${tensor} (${type}) has ${what} that is not finite, in block ${block} of what was read`,
    {
      key: tensor,
      value: block,
    },
  );
}

/** Byte offset of the first infinity or NaN, null when there is none. */
function findBad(type: TensorType, data: Buffer, blockBytes: number, scaleOffsets: readonly number[]): number | null {
  if (type === 'F32') return findFloat(data, 4, singleExponent);
  if (type === 'F16') return findFloat(data, 2, halfExponent);
  if (type === 'BF16') return findFloat(data, 2, bf16Exponent);
  for (const offset of scaleOffsets)
    // The exponent is in the high byte alone: bits 2 to 6 all set mean infinity or NaN.
    for (let at = offset + 1; at < data.length; at += blockBytes) if (((data[at] ?? 0) & 0x7c) === 0x7c) return at - 1;
  return null;
}

function findFloat(data: Buffer, width: 2 | 4, exponent: number): number | null {
  const aligned = littleEndian && data.byteOffset % width === 0;
  const count = Math.floor(data.length / width);
  if (aligned) {
    const values =
      width === 4 ? new Uint32Array(data.buffer, data.byteOffset, count) : new Uint16Array(data.buffer, data.byteOffset, count);
    for (let i = 0; i < count; i++) if (((values[i] ?? 0) & exponent) === exponent) return i * width;
    return null;
  }
  for (let at = 0; at + width <= data.length; at += width) {
    const bits = width === 4 ? data.readUInt32LE(at) : data.readUInt16LE(at);
    if ((bits & exponent) === exponent) return at;
  }
  return null;
}
