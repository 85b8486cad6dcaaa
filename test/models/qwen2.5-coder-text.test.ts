import { describe, expect, it } from 'vitest';
import { findModelFile, loadTextModel, readReference } from '../unit/coordinator/text/reference-model.ts';

const name = 'qwen2.5-coder-0.5b-instruct-q4_k_m';
const path = findModelFile(name);
if (path === null)
  console.warn(
    `${name} is not in the model cache: its tokenizer tests are skipped. \`shardmesh models pull ${name}\` fetches it`,
  );

describe.skipIf(path === null)('text model of Qwen2.5-Coder-0.5B-Instruct', () => {
  const model = path === null ? null : loadTextModel(path);
  const figures = readReference(name);

  it('text model - tokenises every text of the reference figures', async () => {
    expect(figures.tokenize.length).toBeGreaterThan(20);
    for (const { text, ids } of figures.tokenize) {
      expect({ text, ids: await model?.encode(text, { special: 'parse', addBos: true }) }).toEqual({ text, ids });
      expect(model?.decode(ids, { special: true })).toBe(text);
    }
  });

  it('text model - renders and tokenises every chat of the reference figures', async () => {
    expect(figures.chat.length).toBeGreaterThan(2);
    for (const { messages, prompt, ids } of figures.chat) {
      expect(await model?.encodeChat(messages, { addGenerationPrompt: true })).toEqual({ prompt, tokens: ids });
    }
    expect(model?.endTokens).toEqual([151643, 151645]);
  });

  it('text model - writes tools and tool calls as the template says', async () => {
    const tool = { type: 'function', function: { name: 'time', parameters: { type: 'object', properties: {} } } };
    const chat = await model?.encodeChat(
      [
        { role: 'user', content: 'What time is it?' },
        {
          role: 'assistant',
          content: '',
          tool_calls: [{ type: 'function', function: { name: 'time', arguments: '{"zone": "UTC"}' } }],
        },
        { role: 'tool', content: '12:00<|im_end|>' },
      ],
      { addGenerationPrompt: true, tools: [tool] },
    );
    expect(chat?.prompt).toContain('\n<tool_call>\n{"name": "time", "arguments": {"zone": "UTC"}}\n</tool_call><|im_end|>\n');
    expect(chat?.prompt).toContain(
      '{"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}',
    );
    // System, user, assistant and the tool's turn end; the text of the tool does not.
    expect(chat?.tokens.filter((token) => token === 151645)).toHaveLength(4);
  });
});
