/** Builds the `TextModel` of a model file: its tokenizer, its chat template, its detokenizer. */
import { ShardmeshError } from '../../protocol/errors.ts';
import { ChatTemplate, renderChat, TemplateBudgetError } from './chat-template.ts';
import type { TemplateVariables } from './chat-template.ts';
import { decodeUtf8, Detokenizer, TokenBytes } from './detokenizer.ts';
import { SpecialTokenFinder } from './special-tokens.ts';
import type { ChatMessage, TextModel } from './text-types.ts';
import { Tokenizer } from './tokenizer.ts';
import { readVocabulary, tokenTypes } from './vocabulary.ts';
import type { Vocabulary, VocabularySource } from './vocabulary.ts';

export interface TextModelOptions {
  /** Instead of the file's own template; null = none. */
  chatTemplate?: string | null;
  /** Clock of the templates' `strftime_now`. */
  now?: () => Date;
}

export interface LoadedTextModel extends TextModel {
  /** Why the template of the file is not used; null when it is, or when there is none. For the log. */
  readonly templateProblem: string | null;
}

/**
 * @param source metadata of the model file: a `GgufFile`
 * @throws {ShardmeshError} `model_invalid`: the vocabulary is broken or of an unknown kind
 */
export function createTextModel(source: VocabularySource, options: TextModelOptions = {}): LoadedTextModel {
  const vocabulary = readVocabulary(source);
  const templateSource = options.chatTemplate === undefined ? source.getString('tokenizer.chat_template') : options.chatTemplate;
  const chat = new Chat(vocabulary, templateSource === '' ? null : templateSource, options.now);
  const tokenizer = new Tokenizer(vocabulary);
  const table = new TokenBytes(vocabulary);
  const { tokens, bosToken, endTokens, addSpacePrefix } = vocabulary;
  return {
    vocabularySize: tokens.length,
    bosToken,
    endTokens,
    hasChatTemplate: chat.template !== null,
    templateProblem: chat.problem?.message ?? null,
    encode: (text, encodeOptions) => tokenizer.encode(text, encodeOptions),
    decode: (list, decodeOptions) => {
      const text = decodeUtf8(table.join(list, decodeOptions?.special ?? false));
      // Encoding put this space there.
      return addSpacePrefix && text.startsWith(' ') ? text.slice(1) : text;
    },
    tokenBytes: (token) => table.of(token),
    isSpecial: (token) => table.isSpecial(token),
    encodeChat: async (messages, chatOptions) => {
      const { parts, prompt } = chat.render(messages, chatOptions);
      return { tokens: await tokenizer.encodeParts(parts, chatOptions.tokensMax), prompt };
    },
    detokenizer: () => new Detokenizer(table),
  };
}

class Chat {
  readonly template: ChatTemplate | null = null;
  /** The template cannot be used at all. */
  readonly problem: ShardmeshError | null = null;
  readonly #specials: SpecialTokenFinder;
  readonly #specialTokens: Readonly<Record<string, string>>;

  constructor(vocabulary: Vocabulary, source: string | null, now: (() => Date) | undefined) {
    this.#specials = new SpecialTokenFinder(controlTokens(vocabulary));
    this.#specialTokens = spelledTokens(vocabulary);
    if (source === null) return;
    try {
      const template = new ChatTemplate(source, now === undefined ? {} : { now });
      this.#probe(template);
      this.template = template;
    } catch (error) {
      if (!(error instanceof ShardmeshError)) throw error;
      this.problem = error;
    }
  }

  render(messages: ChatMessage[], options: { addGenerationPrompt: boolean; tools?: unknown[] }): ReturnType<typeof renderChat> {
    if (this.problem !== null) throw this.problem;
    if (this.template === null) throw new ShardmeshError('template_missing', undefined, { param: 'messages' });
    const tools = options.tools === undefined || options.tools.length === 0 ? null : options.tools;
    return renderChat(
      this.template,
      this.#specials,
      this.#variables(messages.map(withParsedArguments), tools, options.addGenerationPrompt),
    );
  }

  /** A template that exceeds its budgets for one word is broken or hostile. One that refuses this chat may still take others. */
  #probe(template: ChatTemplate): void {
    try {
      renderChat(template, this.#specials, this.#variables([{ role: 'user', content: 'Hello' }], null, true));
    } catch (error) {
      if (error instanceof ShardmeshError && error.cause instanceof TemplateBudgetError) throw error;
    }
  }

  #variables(messages: unknown[], tools: unknown[] | null, addGenerationPrompt: boolean): TemplateVariables {
    return { messages, tools, add_generation_prompt: addGenerationPrompt, specialTokens: this.#specialTokens };
  }
}

/** Tokens that a template may spell. One of a single character would take that character from every message, so it is no border token. */
function* controlTokens({ tokens, types }: Vocabulary): Generator<[string, number]> {
  for (const [id, token] of tokens.entries()) {
    if ((types[id] === tokenTypes.control || types[id] === tokenTypes.unknown) && token.length > 1) yield [token, id];
  }
}

function spelledTokens(vocabulary: Vocabulary): Record<string, string> {
  const { tokens, bosToken, eosToken, unknownToken, paddingToken } = vocabulary;
  const spelled: Record<string, string> = {};
  const given = { bos_token: bosToken, eos_token: eosToken, unk_token: unknownToken, pad_token: paddingToken };
  for (const [name, id] of Object.entries(given)) if (id !== null) spelled[name] = tokens[id] ?? '';
  return spelled;
}

/** Clients send the arguments of a tool call as JSON text; templates expect what it means. Text that is not an object stays text. */
function withParsedArguments(message: ChatMessage): unknown {
  if (!Array.isArray(message.tool_calls)) return message;
  return { ...message, tool_calls: message.tool_calls.map(parseArguments) };
}

function parseArguments(call: unknown): unknown {
  if (!isRecord(call) || !isRecord(call.function) || typeof call.function.arguments !== 'string') return call;
  try {
    const parsed: unknown = JSON.parse(call.function.arguments);
    return isRecord(parsed) ? { ...call, function: { ...call.function, arguments: parsed } } : call;
  } catch {
    return call;
  }
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}
