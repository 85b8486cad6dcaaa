import type { ModelFacts, TensorFacts } from '../../../../kernels/model-file/model-facts.ts';
import { rowBytes } from '../../../../kernels/model-file/quant-types.ts';
import type { TensorType } from '../../../../kernels/programs/program.ts';

/** Facts of a llama model with a tied head. Without changes: the shapes and types of the default model. */
export function makeFacts(
  change: Partial<ModelFacts> = {},
  matrix: TensorType = 'Q4_1',
  embedding: TensorType = 'Q8_0',
): ModelFacts {
  const facts: ModelFacts = {
    version: 1,
    architecture: 'llama',
    name: 'Test 135M',
    sourceSha256: '0'.repeat(64),
    sourceBytes: 100_000_000,
    layers: 30,
    hiddenSize: 576,
    heads: 9,
    kvHeads: 3,
    headSize: 64,
    feedForwardSize: 1_536,
    vocabularySize: 49_152,
    contextTokensMax: 8_192,
    normEpsilon: 1e-5,
    rope: { base: 10_000, dimensions: 64, scale: 1 },
    slidingWindow: null,
    tensors: [],
    ...change,
  };
  const { hiddenSize: H, headSize: D, heads: N, kvHeads: G, feedForwardSize: F } = facts;
  let offset = 0;
  const tensors: TensorFacts[] = [];
  const add = (name: string, type: TensorType, shape: number[]): void => {
    const bytes = rowBytes(type, shape[0] ?? 0) * (shape[1] ?? 1);
    tensors.push({ name, type, shape, offset, bytes });
    offset += bytes;
  };
  add('token_embd.weight', embedding, [H, facts.vocabularySize]);
  for (let layer = 0; layer < facts.layers; layer++) {
    const at = `blk.${layer}.`;
    add(`${at}attn_norm.weight`, 'F32', [H]);
    add(`${at}attn_q.weight`, matrix, [H, N * D]);
    add(`${at}attn_k.weight`, matrix, [H, G * D]);
    add(`${at}attn_v.weight`, matrix, [H, G * D]);
    add(`${at}attn_output.weight`, matrix, [N * D, H]);
    add(`${at}ffn_norm.weight`, 'F32', [H]);
    add(`${at}ffn_gate.weight`, matrix, [H, F]);
    add(`${at}ffn_up.weight`, matrix, [H, F]);
    add(`${at}ffn_down.weight`, matrix, [F, H]);
  }
  add('output_norm.weight', 'F32', [H]);
  return { ...facts, tensors };
}
