/**
 * Request bodies. Every field is named; an unknown one is refused by name. Fields of OpenAI's API fall in three groups: supported (here with limits), harmless
 * (`ignored`: accepted, without effect), and refused because leaving them out would change what the client gets (`unsupported`).
 */
import { z } from 'zod';
import { ShardmeshError } from '../../protocol/errors.ts';
import { httpLimits, stepLimits } from '../../protocol/limits.ts';

const limits = httpLimits;
const tokenId = z
  .int()
  .min(0)
  .max(stepLimits.vocabularyMax - 1);
const optional = <T extends z.ZodType>(type: T) => type.nullish().transform((value) => value ?? undefined);

/**
 * A list or map of at most `max` entries, counted before any entry is looked at: a body of 4 MiB holds two million of them, and checking each (and
 * collecting what is wrong with each) would hold up every other request for seconds.
 */
const bounded = <T extends z.ZodType>(field: string, max: number, schema: T) =>
  z.preprocess((value) => {
    const count = Array.isArray(value)
      ? value.length
      : typeof value === 'object' && value !== null
        ? Object.keys(value).length
        : 0;
    if (count > max)
      throw new ShardmeshError('invalid_value', `${field}: at most ${max} entries are allowed, got ${count}.`, { param: field });
    return value;
  }, schema);

/** A field that is refused unless it has the value that means "off". */
const unsupported = (what: string, off: (value: unknown) => boolean = () => false) =>
  z
    .unknown()
    .refine((value) => value === null || off(value), { message: `${what} is not supported by this server.` })
    .optional();
const ignored = z.unknown().optional();

const streamOptions = z.strictObject({
  include_usage: optional(z.boolean()),
  include_obfuscation: ignored,
  continuous_usage_stats: optional(z.boolean()),
});

/** Parameters that chat and completions share. */
const sampling = {
  model: z.string().max(256),
  temperature: optional(z.number().min(0).max(100)),
  top_p: optional(z.number().gt(0).max(1)),
  top_k: optional(z.int().min(-1).max(stepLimits.vocabularyMax)),
  min_p: optional(z.number().min(0).max(1)),
  seed: optional(z.int()),
  n: optional(z.int().min(1).max(limits.choicesMax)),
  max_tokens: optional(z.int().min(0).max(stepLimits.contextTokensMax)),
  min_tokens: optional(z.int().min(0).max(stepLimits.contextTokensMax)),
  stop: bounded(
    'stop',
    limits.stopStringsMax,
    optional(
      z.union(
        [z.string().min(1).max(limits.stopStringCharactersMax), z.array(z.string().min(1).max(limits.stopStringCharactersMax))],
        {
          message: `a string of 1 to ${limits.stopStringCharactersMax} characters, or a list of at most ${limits.stopStringsMax} such strings is needed`,
        },
      ),
    ),
  ),
  stop_token_ids: bounded('stop_token_ids', limits.stopTokenIdsMax, optional(z.array(tokenId))),
  ignore_eos: optional(z.boolean()),
  presence_penalty: optional(z.number().min(-2).max(2)),
  frequency_penalty: optional(z.number().min(-2).max(2)),
  repetition_penalty: optional(z.number().gt(0).max(10)),
  logit_bias: bounded(
    'logit_bias',
    limits.logitBiasMax,
    optional(z.record(z.string().regex(/^(0|[1-9]\d{0,6})$/, 'keys must be token ids'), z.number().min(-100).max(100))),
  ),
  stream: optional(z.boolean()),
  stream_options: optional(streamOptions),
  user: optional(z.string().max(limits.userCharactersMax)),
  store: ignored,
  metadata: ignored,
  service_tier: ignored,
  safety_identifier: ignored,
  prompt_cache_key: ignored,
  prompt_cache_retention: ignored,
  chat_template: unsupported('chat_template (only the model file decides its template)'),
  chat_template_kwargs: unsupported('chat_template_kwargs'),
  prompt_embeds: unsupported('prompt_embeds'),
  cache_salt: unsupported('cache_salt (the prefix cache is separate for each API key)'),
  guided_json: unsupported('guided_json'),
  guided_regex: unsupported('guided_regex'),
  guided_grammar: unsupported('guided_grammar'),
  guided_choice: unsupported('guided_choice'),
  structured_outputs: unsupported('structured_outputs'),
};

const textPart = z.strictObject({
  type: z.literal('text', { message: 'only parts of type "text" are supported' }),
  text: z.string(),
});
const content = bounded(
  'messages[].content',
  256,
  z
    .union([z.string(), z.array(textPart).min(1)], { message: 'a string or a list of {type: "text", text} parts is needed' })
    .nullish(),
);

const message = z.strictObject({
  role: z.enum(['system', 'developer', 'user', 'assistant', 'tool']),
  content,
  name: optional(z.string().max(256)),
  tool_calls: optional(z.array(z.unknown()).max(128)),
  tool_call_id: optional(z.string().max(256)),
  refusal: ignored,
  audio: unsupported('audio'),
  function_call: unsupported('function_call'),
});

const messages = bounded('messages', limits.messagesMax, z.array(message).min(1, 'at least one message is needed'));

const isEmptyList = (value: unknown): boolean => Array.isArray(value) && value.length === 0;

export const chatSchema = z.strictObject({
  ...sampling,
  messages,
  max_completion_tokens: optional(z.int().min(0).max(stepLimits.contextTokensMax)),
  logprobs: optional(z.boolean()),
  top_logprobs: optional(z.int().min(0).max(limits.logprobsMax)),
  response_format: unsupported(
    'response_format other than {"type": "text"}',
    (value) => (value as { type?: unknown }).type === 'text',
  ),
  tools: unsupported('tools', isEmptyList),
  tool_choice: unsupported('tool_choice other than "none" or "auto"', (value) => value === 'none' || value === 'auto'),
  functions: unsupported('functions', isEmptyList),
  function_call: unsupported('function_call', (value) => value === 'none' || value === 'auto'),
  parallel_tool_calls: ignored,
  modalities: unsupported(
    'modalities other than ["text"]',
    (value) => Array.isArray(value) && value.length === 1 && value[0] === 'text',
  ),
  audio: unsupported('audio'),
  prediction: ignored,
  reasoning_effort: ignored,
  verbosity: ignored,
  web_search_options: unsupported('web_search_options'),
});

const wrong = (code: 'invalid_type' | 'invalid_value', param: string, message: string): ShardmeshError =>
  new ShardmeshError(code, `${param}: ${message}.`, { param });

/** Token ids of a list: the first wrong one ends it. @throws {ShardmeshError} naming the entry */
function checkIds(ids: readonly unknown[], param: string): number[] {
  if (ids.length > stepLimits.contextTokensMax)
    throw wrong('invalid_value', param, `at most ${stepLimits.contextTokensMax} token ids are allowed, got ${ids.length}`);
  ids.forEach((id, index) => {
    if (typeof id !== 'number') throw wrong('invalid_type', `${param}[${index}]`, 'a token id is needed');
    if (!Number.isInteger(id) || id < 0 || id >= stepLimits.vocabularyMax)
      throw wrong('invalid_value', `${param}[${index}]`, 'a token id is a whole number that is not negative');
  });
  return ids as number[];
}

export type Prompt = string | string[] | number[] | number[][];

/**
 * By hand: a union would try each of its forms on each of up to a million token ids, and collect what is wrong with each.
 * @throws {ShardmeshError} naming the entry
 */
function checkPrompt(value: unknown): Prompt {
  if (typeof value === 'string') return value;
  if (value === undefined) throw new ShardmeshError('missing_field', undefined, { param: 'prompt' });
  const forms = `a string, a list of token ids, or a list of at most ${limits.promptsMax} of these is needed`;
  if (!Array.isArray(value) || value.length === 0) throw wrong('invalid_type', 'prompt', forms);
  const list = value as unknown[];
  if (typeof list[0] === 'number') return checkIds(list, 'prompt');
  if (list.length > limits.promptsMax) throw wrong('invalid_type', 'prompt', forms);
  if (list.every((one) => typeof one === 'string')) return list;
  return list.map((one, index) => {
    if (!Array.isArray(one) || one.length === 0) throw wrong('invalid_type', `prompt[${index}]`, forms);
    return checkIds(one as unknown[], `prompt[${index}]`);
  });
}

export const completionSchema = z.strictObject({
  ...sampling,
  prompt: z.unknown().transform(checkPrompt),
  echo: optional(z.boolean()),
  logprobs: optional(z.int().min(0).max(limits.logprobsMax)),
  best_of: unsupported('best_of other than 1', (value) => value === 1),
  suffix: unsupported('suffix', (value) => value === ''),
});

export const tokenizeSchema = z.strictObject({
  model: z.string().max(256).optional(),
  prompt: z.string().optional(),
  messages: messages.optional(),
  add_special_tokens: optional(z.boolean()),
  add_generation_prompt: optional(z.boolean()),
});

export const detokenizeSchema = z.strictObject({
  model: z.string().max(256).optional(),
  tokens: z.unknown().transform((value) => {
    if (value === undefined) throw new ShardmeshError('missing_field', undefined, { param: 'tokens' });
    if (!Array.isArray(value)) throw wrong('invalid_type', 'tokens', 'a list of token ids is needed');
    return checkIds(value, 'tokens');
  }),
});

export type ChatBody = z.output<typeof chatSchema>;
export type CompletionBody = z.output<typeof completionSchema>;
export type MessageBody = z.output<typeof message>;
type SamplingBody = Pick<ChatBody, keyof typeof sampling & keyof ChatBody>;
export type StreamOptions = z.output<typeof streamOptions>;
export type { SamplingBody };
