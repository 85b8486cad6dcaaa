/**
 * `qwen2`: Qwen2 and Qwen2.5. As llama, but q, k and v have biases and rope turns values half a head apart. |K| grows large through the bias (216 was seen in a
 * 0.5B model), so K stays f16 by default (int8 there costs 0.3 in mean log-probability).
 */
import type { Architecture } from './architecture.ts';

export const qwen2: Architecture = {
  name: 'qwen2',
  traits: { ropeStyle: 'half', activation: 'silu', attentionBias: 'required', ropeFactors: 'none' },
};
