/** A small model (small-model.ts) as a GGUF file that whole meshes serve: its vocabulary is the 256 bytes, an end token, and words that no text becomes but a model may say. */
import { byteAlphabet } from '../unit/coordinator/text/small-vocabulary.ts';
import { writeGguf, type Field } from '../unit/kernels/model-file/gguf-writer.ts';
import { quantType } from '../../kernels/model-file/quant-types.ts';
import { smallModel, type SmallShape } from './small-model.ts';

/** @param shape  hidden: heads * headSize; vocabulary: 257 or more. @returns the file's path */
export function writeSmallModel(directory: string, shape: SmallShape): string {
  const model = smallModel(shape);
  const { facts } = model;
  const { architecture } = shape;
  const number = (name: string, value: number): Field => ({ key: `${architecture}.${name}`, type: 'u32', value });
  const words = Array.from({ length: shape.vocabulary - 257 }, (_, i) => `Ġw${i}`);
  const fields: Field[] = [
    { key: 'general.architecture', type: 'string', value: architecture },
    { key: 'general.name', type: 'string', value: facts.name },
    number('block_count', facts.layers),
    number('context_length', facts.contextTokensMax),
    number('embedding_length', facts.hiddenSize),
    number('feed_forward_length', facts.feedForwardSize),
    number('attention.head_count', facts.heads),
    number('attention.head_count_kv', facts.kvHeads),
    { key: `${architecture}.attention.layer_norm_rms_epsilon`, type: 'f32', value: facts.normEpsilon },
    { key: `${architecture}.rope.freq_base`, type: 'f32', value: facts.rope.base },
    { key: 'tokenizer.ggml.model', type: 'string', value: 'gpt2' },
    { key: 'tokenizer.ggml.pre', type: 'string', value: 'gpt-2' },
    { key: 'tokenizer.ggml.tokens', type: 'array', elements: 'string', value: [...byteAlphabet, ...words, '<|endoftext|>'] },
    {
      key: 'tokenizer.ggml.token_type',
      type: 'array',
      elements: 'i32',
      value: [...Array<number>(shape.vocabulary - 1).fill(1), 3],
    },
    { key: 'tokenizer.ggml.merges', type: 'array', elements: 'string', value: [] },
    { key: 'tokenizer.ggml.eos_token_id', type: 'u32', value: shape.vocabulary - 1 },
  ];
  const tensors = facts.tensors.map(({ name, type, shape: dimensions }) => {
    const [columns = 1, rows = 1] = dimensions;
    const slice = { tensor: name, type, use: 'matrix', rows: { from: 0, to: rows }, columns: { from: 0, to: columns } } as const;
    return { name, type: quantType(type).id, shape: dimensions, data: Buffer.from(model.blocksOf(slice)) };
  });
  return writeGguf(directory, { fields, tensors }, 'small.gguf');
}
