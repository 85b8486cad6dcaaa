/** The memory table of kernels/cuda/README.md: what gpu_bench --memory says of real shapes in several formats. */
import { execFile } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { quantType } from '../../kernels/model-file/quant-types.ts';
import type { TensorType } from '../../kernels/programs/program.ts';
import { benchModels, exportModel, type ExportedModel } from './exported-models.ts';
import { typesOf } from '../kernels/small-model.ts';

const run = promisify(execFile);

export const cudaReadme = fileURLToPath(new URL('../../kernels/cuda/README.md', import.meta.url));
const formats: TensorType[] = ['Q4_0', 'Q4_1', 'Q4_K', 'Q5_K', 'Q8_0', 'BF16'];
const titles: Record<string, string> = { 'step-135m': 'SmolLM2 135M', 'step-1.5b': 'Qwen2.5 1.5B', 'step-8b': 'Llama 8B' };

/** A row of the model's matrices is whole blocks of the format. */
const fits = ({ shape }: ExportedModel, type: TensorType): boolean =>
  [shape.hidden, shape.feedForward].every((columns) => columns % quantType(type).blockValues === 0);

interface Memory {
  name: string;
  weightBytes: number;
  kvBytesPerToken: number;
}

/** @param gpuBench  the program to ask, of a card or emulated */
export async function memoryTable(gpuBench: string): Promise<string> {
  const folder = mkdtempSync(join(tmpdir(), 'shardmesh-memory-'));
  try {
    const files = benchModels.flatMap((model) =>
      formats
        .filter((type) => fits(model, type))
        .map((type) => {
          // Types but that of the head: a head of its own keeps having one.
          const { head } = model.shape.types;
          const types = { ...typesOf(type), ...(head ? { head: type } : {}) };
          const variant: ExportedModel = { ...model, name: `${model.name} ${type}`, shape: { ...model.shape, types } };
          const file = join(folder, `${variant.name}.jsonl`);
          writeFileSync(file, exportModel(variant));
          return file;
        }),
    );
    const { stdout } = await run(gpuBench, ['--memory', ...files]);
    const found = stdout
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line) as Memory);
    const of = (model: string, type: string): Memory | undefined => found.find(({ name }) => name === `${model} ${type}`);
    const gigabytes = (bytes: number): string => (bytes / 1e9).toPrecision(3);
    const rows = benchModels.map(({ name }) => {
      const kv = (of(name, 'Q4_0')!.kvBytesPerToken * 1_000) / 1e6;
      const cell = (memory: Memory | undefined): string => (memory ? gigabytes(memory.weightBytes) : '-');
      return [titles[name]!, ...formats.map((type) => cell(of(name, type))), kv.toPrecision(3)];
    });
    const head = ['model', ...formats, 'MB of K and V for 1,000 tokens'];
    return [head, head.map(() => '---'), ...rows].map((cells) => `| ${cells.join(' | ')} |\n`).join('');
  } finally {
    rmSync(folder, { recursive: true });
  }
}
