/**
 * The tensor types of a GGUF file that programs may name: how many values a block holds, how many bytes it takes, and where in it the half-precision
 * scales lie. A row is whole blocks, one after the other. Source of the layouts: ggml's block definitions.
 */
import type { TensorType } from '../programs/program.ts';

export interface QuantType {
  name: TensorType;
  /** Number of this type in a tensor's directory entry. */
  id: number;
  blockValues: number;
  blockBytes: number;
  /** Byte offsets, inside a block, of its IEEE half scales and minima. Empty for float types. */
  scaleOffsets: readonly number[];
}

const table: readonly QuantType[] = [
  { name: 'F32', id: 0, blockValues: 1, blockBytes: 4, scaleOffsets: [] },
  { name: 'F16', id: 1, blockValues: 1, blockBytes: 2, scaleOffsets: [] },
  { name: 'Q4_0', id: 2, blockValues: 32, blockBytes: 18, scaleOffsets: [0] },
  { name: 'Q4_1', id: 3, blockValues: 32, blockBytes: 20, scaleOffsets: [0, 2] },
  { name: 'Q5_0', id: 6, blockValues: 32, blockBytes: 22, scaleOffsets: [0] },
  { name: 'Q5_1', id: 7, blockValues: 32, blockBytes: 24, scaleOffsets: [0, 2] },
  { name: 'Q8_0', id: 8, blockValues: 32, blockBytes: 34, scaleOffsets: [0] },
  { name: 'Q4_K', id: 12, blockValues: 256, blockBytes: 144, scaleOffsets: [0, 2] },
  { name: 'Q5_K', id: 13, blockValues: 256, blockBytes: 176, scaleOffsets: [0, 2] },
  { name: 'Q6_K', id: 14, blockValues: 256, blockBytes: 210, scaleOffsets: [208] },
  { name: 'BF16', id: 30, blockValues: 1, blockBytes: 2, scaleOffsets: [] },
];

/** ggml types that exist but are not computed here; named in the error so that a user knows what the file holds. */
const otherNames: Readonly<Record<number, string>> = {
  9: 'Q8_1',
  10: 'Q2_K',
  11: 'Q3_K',
  15: 'Q8_K',
  16: 'IQ2_XXS',
  17: 'IQ2_XS',
  18: 'IQ3_XXS',
  19: 'IQ1_S',
  20: 'IQ4_NL',
  21: 'IQ3_S',
  22: 'IQ2_S',
  23: 'IQ4_XS',
  24: 'I8',
  25: 'I16',
  26: 'I32',
  27: 'I64',
  28: 'F64',
  29: 'IQ1_M',
  34: 'TQ1_0',
  35: 'TQ2_0',
  39: 'MXFP4',
};

const byName = new Map(table.map((type) => [type.name, type]));
const byId = new Map(table.map((type) => [type.id, type]));

export const tensorTypeNames: readonly TensorType[] = table.map((type) => type.name);

export const isTensorType = (value: unknown): value is TensorType => byName.has(value as TensorType);

export function quantType(name: TensorType): QuantType {
  const type = byName.get(name);
  if (!type) throw new RangeError(`unknown tensor type ${String(name)}`);
  return type;
}

/** The type with this number in a file, null when it is not supported. */
export const quantTypeById = (id: number): QuantType | null => byId.get(id) ?? null;

/** `10 (Q2_K)`: an unsupported number, with the name where it is known. */
export const describeTypeId = (id: number): string => (otherNames[id] ? `${id} (${otherNames[id]})` : String(id));

/** Bytes of one row. @param values a multiple of the type's block */
export const rowBytes = (name: TensorType, values: number): number => {
  const { blockValues, blockBytes } = quantType(name);
  return (values / blockValues) * blockBytes;
};
