/** Text side of a model: tokens, templates, detokenising. One `TextModel` is built from a model file's own vocabulary and template. */

export interface ChatMessage {
  role: string;
  content: string;
  name?: string;
  tool_calls?: unknown;
  tool_call_id?: string;
}

export interface TextModel {
  readonly vocabularySize: number;
  readonly bosToken: number | null;
  /** eos, eot and the template's end tokens: generation stops on any of them. */
  readonly endTokens: readonly number[];
  readonly hasChatTemplate: boolean;
  /**
   * Token ids of a text. Off the event loop for long texts.
   * @param special 'parse': text that spells a special token becomes that token (/v1/completions prompts); 'plain': it stays text.
   * @param addBos add the model's BOS token where the model file asks for it
   * @param tokensMax most tokens: a longer text is refused before it costs more. Give it for whatever a client sends
   * @throws {ShardmeshError} `context_length_exceeded`: more than `tokensMax`
   */
  encode(text: string, options: { special: 'parse' | 'plain'; addBos: boolean; tokensMax?: number }): Promise<number[]>;
  /** Whole text of a list of tokens. Special tokens are left out unless `special`. */
  decode(tokens: readonly number[], options?: { special?: boolean }): string;
  /** Bytes of one token, for log-probability entries (`bytes`) and the detokenizer. */
  tokenBytes(token: number): Uint8Array;
  isSpecial(token: number): boolean;
  /**
   * Renders the model's chat template and tokenises it. Special tokens come from the template only; text in `content` that spells one stays text.
   * @param tokensMax as for `encode`
   * @throws {ShardmeshError} `template_failed`, `template_missing`, `context_length_exceeded`
   */
  encodeChat(
    messages: ChatMessage[],
    options: { addGenerationPrompt: boolean; tools?: unknown[]; tokensMax?: number },
  ): Promise<{ tokens: number[]; prompt: string }>;
  /** A new incremental detokenizer: `push` gives the text that is certain now, `flush` the rest (replacement characters for a broken tail). */
  detokenizer(): { push(token: number): string; flush(): string };
}
