/**
 * Request bodies. Every field is named; an unknown one is refused by name. Fields of OpenAI's API fall in three groups: supported (here with limits), harmless
 * (`ignored`: accepted, without effect), and refused because leaving them out would change what the client gets (`unsupported`).
 */
import { z } from 'zod';
import { httpLimits, stepLimits } from '../../protocol/limits.ts';

const limits = httpLimits;
const tokenId = z
  .int()
  .min(0)
  .max(stepLimits.vocabularyMax - 1);
const optional = <T extends z.ZodType>(type: T) => type.nullish().transform((value) => value ?? undefined);

/** A field that is refused unless it has the value that means "off". */
const unsupported = (what: string, off: (value: unknown) => boolean = () => false) =>
  z
    .unknown()
    .refine((value) => value === null || off(value), { message: `${what} is not supported by this server.` })
    .optional();
const ignored = z.unknown().optional();

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
  stop: optional(
    z.union([
      z.string().min(1).max(limits.stopStringCharactersMax),
      z.array(z.string().min(1).max(limits.stopStringCharactersMax)).max(limits.stopStringsMax),
    ]),
  ),
  stop_token_ids: optional(z.array(tokenId).max(limits.stopTokenIdsMax)),
  ignore_eos: optional(z.boolean()),
  presence_penalty: optional(z.number().min(-2).max(2)),
  frequency_penalty: optional(z.number().min(-2).max(2)),
  repetition_penalty: optional(z.number().gt(0).max(10)),
  logit_bias: optional(
    z
      .record(z.string().regex(/^\d{1,7}$/, 'keys must be token ids'), z.number().min(-100).max(100))
      .refine((map) => Object.keys(map).length <= limits.logitBiasMax, `at most ${limits.logitBiasMax} entries are allowed`),
  ),
  stream: optional(z.boolean()),
  stream_options: optional(
    z.strictObject({
      include_usage: optional(z.boolean()),
      include_obfuscation: ignored,
      continuous_usage_stats: unsupported('continuous_usage_stats', (value) => value === false),
    }),
  ),
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
const content = z.union([z.string(), z.array(textPart).min(1).max(256)], {
  message: 'a string or a list of {type: "text", text} parts is needed',
});

const message = z.strictObject({
  role: z.enum(['system', 'developer', 'user', 'assistant', 'tool']),
  content: content.nullish(),
  name: optional(z.string().max(256)),
  tool_calls: optional(z.array(z.unknown()).max(128)),
  tool_call_id: optional(z.string().max(256)),
  refusal: ignored,
  audio: unsupported('audio'),
  function_call: unsupported('function_call'),
});

const isEmptyList = (value: unknown): boolean => Array.isArray(value) && value.length === 0;

export const chatSchema = z.strictObject({
  ...sampling,
  messages: z.array(message).min(1, 'at least one message is needed').max(limits.messagesMax),
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

export const completionSchema = z.strictObject({
  ...sampling,
  prompt: z.union(
    [
      z.string(),
      z.array(z.string()).min(1).max(limits.promptsMax),
      z.array(tokenId).min(1).max(stepLimits.contextTokensMax),
      z.array(z.array(tokenId).min(1).max(stepLimits.contextTokensMax)).min(1).max(limits.promptsMax),
    ],
    { message: `a string, a list of token ids, or a list of at most ${limits.promptsMax} of these is needed` },
  ),
  echo: optional(z.boolean()),
  logprobs: optional(z.int().min(0).max(limits.logprobsMax)),
  best_of: unsupported('best_of other than 1', (value) => value === 1),
  suffix: unsupported('suffix', (value) => value === ''),
});

export const tokenizeSchema = z.strictObject({
  model: z.string().max(256).optional(),
  prompt: z.string().optional(),
  messages: z.array(message).min(1).max(limits.messagesMax).optional(),
  add_special_tokens: optional(z.boolean()),
  add_generation_prompt: optional(z.boolean()),
});

export const detokenizeSchema = z.strictObject({
  model: z.string().max(256).optional(),
  tokens: z.array(tokenId).max(stepLimits.contextTokensMax),
});

export type ChatBody = z.output<typeof chatSchema>;
export type CompletionBody = z.output<typeof completionSchema>;
export type MessageBody = z.output<typeof message>;
type SamplingBody = Pick<ChatBody, keyof typeof sampling & keyof ChatBody>;
export type { SamplingBody };
