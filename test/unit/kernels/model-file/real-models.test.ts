import { gguf } from '@huggingface/gguf';
import { describe, expect, it } from 'vitest';
import { existsSync } from 'node:fs';
import { catalogue } from '../../../../kernels/model-file/catalogue.ts';
import { modelPath } from '../../../../kernels/model-file/download.ts';
import { readGguf } from '../../../../kernels/model-file/gguf-reader.ts';
import { parseModelFacts, readModelFacts } from '../../../../kernels/model-file/model-facts.ts';
import { sliceOf } from '../../../../kernels/model-file/slice.ts';
import { buildProgram, checkModel, cutModel, unitsOfModel } from '../../../../kernels/programs/index.ts';

/** Units and programs of the models of the catalogue; each runs where the model is in the cache. */
const expected: Record<string, { tensors: number; units: number[]; key: string; context: number }> = {
  'smollm2-135m-instruct-q4_1': { tensors: 272, units: [9, 16, 48], key: 'int8', context: 8192 },
  'qwen2.5-coder-0.5b-instruct-q4_k_m': { tensors: 291, units: [14, 10, 149], key: 'f16', context: 32768 },
};

describe.each(catalogue.map((entry) => [entry.name, entry] as const))('%s', (name, entry) => {
  const path = modelPath(entry);
  const known = expected[name];

  it.skipIf(!existsSync(path))(`${name} - header agrees with an independent reader`, async () => {
    const ours = readGguf(path);
    const theirs = await gguf(path, { allowLocalFile: true });
    const metadata = theirs.metadata as unknown as Record<string, unknown>;
    expect(ours.bytes).toBe(entry.bytes);
    expect(ours.tensors).toHaveLength(known?.tensors ?? 0);
    expect(ours.dataOffset).toBe(Number(theirs.tensorDataOffset));
    expect(ours.tensors.map(({ name: tensor, shape, offset }) => [tensor, shape, offset - ours.dataOffset])).toEqual(
      theirs.tensorInfos.map(({ name: tensor, shape, offset }) => [tensor, shape.map(Number), Number(offset)]),
    );
    const tokens = ours.getStringArray('tokenizer.ggml.tokens');
    expect(tokens?.join('\n') === (metadata['tokenizer.ggml.tokens'] as string[]).join('\n')).toBe(true);
    expect(ours.getString('tokenizer.chat_template')).toBe(metadata['tokenizer.chat_template']);
  });

  it.skipIf(!existsSync(path))(`${name} - makes programs whose slices are the file's tensors`, () => {
    const file = readGguf(path);
    const facts = readModelFacts(file, entry.sha256);
    checkModel(facts);
    expect(parseModelFacts(JSON.stringify(facts))).toEqual(facts);
    expect(JSON.stringify(facts).length).toBeLessThan(64 * 1024);
    const units = unitsOfModel(facts);
    expect([units.attention.units, units.feedForward.units, units.vocabulary.units]).toEqual(known?.units);
    const build = (tp: number, rank: number) =>
      buildProgram(facts, cutModel(units, { count: tp, parts: null }, { count: 1, parts: null }), {
        stage: 0,
        rank,
        activations: 'int8',
        kvType: 'auto',
        contextTokensMax: null,
      });
    const whole = build(1, 0);
    expect(whole).toMatchObject({ contextTokensMax: known?.context, kv: { key: known?.key } });
    const all = file.tensors.reduce((sum, tensor) => sum + tensor.bytes, 0);
    expect(sliceOf(whole, facts).bytes).toBe(all);
    const halves = [0, 1].map((rank) => sliceOf(build(2, rank), facts).bytes);
    for (const bytes of halves) expect(bytes / all).toBeGreaterThan(0.45);
    // Both hold norms, and the KV head between them where there is one: a few percent in all.
    expect(halves.reduce((sum, bytes) => sum + bytes, 0) / all).toBeLessThan(1.05);
  });
});
