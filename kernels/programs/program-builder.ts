/** Collects weights, buffers and operations of a program. A weight slice that is named twice is held once. */
import type { ModelFacts, TensorFacts } from '../model-file/model-facts.ts';
import { ModelFileError } from '../model-file/model-file-error.ts';
import type { BufferSpec, Operation, Range, WeightSlice } from './program.ts';

export class ProgramBuilder {
  readonly weights: WeightSlice[] = [];
  readonly buffers: BufferSpec[] = [];
  readonly operations: Operation[] = [];
  readonly #tensors: ReadonlyMap<string, TensorFacts>;
  readonly #weightIndexes = new Map<string, number>();
  readonly #bufferNames = new Set<string>();

  constructor(facts: ModelFacts) {
    this.#tensors = new Map(facts.tensors.map((tensor) => [tensor.name, tensor]));
  }

  has(name: string): boolean {
    return this.#tensors.has(name);
  }

  tensor(name: string): TensorFacts {
    const tensor = this.#tensors.get(name);
    if (!tensor) throw new ModelFileError('missing_tensor', `tensor ${name} is missing`, { key: name });
    return tensor;
  }

  /** Rows of a matrix, all columns. */
  rows(name: string, rows: Range, use: 'matrix' | 'embedding' = 'matrix'): number {
    return this.#weight(name, rows, { from: 0, to: this.tensor(name).shape[0] ?? 0 }, use);
  }

  /** Columns of a matrix, all rows. */
  columns(name: string, columns: Range): number {
    return this.#weight(name, { from: 0, to: this.tensor(name).shape[1] ?? 1 }, columns, 'matrix');
  }

  /** Values of a vector; all of them without `values`. */
  vector(name: string, values?: Range): number {
    return this.#weight(name, { from: 0, to: 1 }, values ?? { from: 0, to: this.tensor(name).shape[0] ?? 0 }, 'vector');
  }

  /** As `vector`, null when the file has no such tensor. */
  optionalVector(name: string, values?: Range): number | null {
    return this.has(name) ? this.vector(name, values) : null;
  }

  /** Declares a buffer once; later calls with the same name give it again. */
  buffer(name: string, width: number, per: BufferSpec['per'] = 'token'): string {
    if (!this.#bufferNames.has(name)) {
      this.#bufferNames.add(name);
      this.buffers.push({ name, width, per });
    }
    return name;
  }

  add(...operations: Operation[]): void {
    this.operations.push(...operations);
  }

  #weight(tensor: string, rows: Range, columns: Range, use: WeightSlice['use']): number {
    const key = [tensor, rows.from, rows.to, columns.from, columns.to, use].join(' ');
    const known = this.#weightIndexes.get(key);
    if (known !== undefined) return known;
    const index = this.weights.length;
    this.weights.push({ tensor, type: this.tensor(tensor).type, rows: { ...rows }, columns: { ...columns }, use });
    this.#weightIndexes.set(key, index);
    return index;
  }
}
