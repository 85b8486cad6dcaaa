/**
 * `llama`: Llama 2 and 3, SmolLM2, Mistral and everything else that converts to this name. GGUF files hold q and k permuted, so that rope turns adjacent values;
 * Llama 3.1 and later bring their frequency factors as a tensor. The head is tied to the embedding where the file has no `output.weight`.
 */
import type { Architecture } from './architecture.ts';

export const llama: Architecture = {
  name: 'llama',
  traits: { ropeStyle: 'adjacent', activation: 'silu', attentionBias: 'optional', ropeFactors: 'optional' },
};
