import { describe, expect, it } from 'vitest';
import { ChatTemplate, renderChat, TemplateBudgetError } from '../../../../coordinator/text/chat-template.ts';
import { SpecialTokenFinder } from '../../../../coordinator/text/special-tokens.ts';

const user = (content: unknown): unknown[] => [{ role: 'user', content }];

function render(source: string, messages: unknown[] = user('hi'), tools: unknown[] | null = null): string {
  const template = new ChatTemplate(source, { now: () => new Date(2026, 2, 5, 14, 7, 9), timeMaxMs: 60_000 });
  return template.render({
    messages,
    tools,
    add_generation_prompt: true,
    specialTokens: { bos_token: '<s>', eos_token: '</s>' },
  });
}

function budget(source: string, messages?: unknown[]): string {
  try {
    render(source, messages);
  } catch (error) {
    return error instanceof TemplateBudgetError ? error.message : `${(error as Error).name}: ${(error as Error).message}`;
  }
  return 'none';
}

describe('chat template', () => {
  it('chat template - has messages, tools, the special tokens and the generation prompt', () => {
    expect(render('{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ add_generation_prompt }}{{ tools is none }}')).toBe(
      '<s>hi</s>truetrue',
    );
    expect(render('{{ tools | tojson }}', user(''), [{ name: 'f', strict: true }])).toBe('[{"name": "f", "strict": true}]');
  });

  it('chat template - trims blocks as the library of the model makers does', () => {
    expect(render('  {% if true %}\na\n  {% endif %}\nb')).toBe('a\nb');
  });

  it('chat template - knows range and the date', () => {
    expect(render("{{ range(3) | join(',') }} {{ range(5, 1, -2) | join(',') }} {{ range(2, 2) | length }}")).toBe('0,1,2 5,3 0');
    expect(render("{{ strftime_now('%d %b %Y, %A %H:%M:%S %p %q %%') }}")).toBe('05 Mar 2026, Thursday 14:07:09 PM %q %');
  });

  it('chat template - breaks, continues and takes the first of nothing as undefined', () => {
    expect(
      render(
        '{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}',
      ),
    ).toBe('023');
    expect(render('{{ ([] | first) is undefined }}')).toBe('true');
  });

  it('chat template - refuses a source that is too long or full of white space, and says where a mistake is', () => {
    const refuse = (source: string) => (): unknown => new ChatTemplate(source);
    expect(refuse('a'.repeat(262_145))).toThrow(
      'The chat template of the model failed: it has 262145 characters; the limit is 262144.',
    );
    expect(refuse('\n'.repeat(513))).toThrow('it has 513 white space characters in a row; the limit is 512.');
    expect(refuse('{{ a')).toThrow(/^The chat template of the model failed: /);
    expect(refuse(`{{ ${'('.repeat(100_000)}`)).toThrow(/^The chat template of the model failed: /);
  });

  it('chat template - reaches no object of the host', () => {
    expect(
      render(
        "{{ messages.constructor is undefined }}{{ messages[0]['__proto__'] is undefined }}{{ ''.constructor is undefined }}",
      ),
    ).toBe('truetruetrue');
    expect(render('{{ range.constructor is undefined }}{{ process is undefined }}{{ globalThis is undefined }}')).toBe(
      'truetruetrue',
    );
    expect(render('{{ messages[0].content }}', user({ ['__proto__']: 'x' }))).toBe('{"__proto__": "x"}');
  });

  const endless = '{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}';
  const doubled =
    "{% set ns = namespace(s='0123456789abcdef') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}";
  const doubledList = '{% set ns = namespace(l=[1]) %}{% for i in range(40) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}';
  it.each([
    [
      'steps',
      '{% for a in range(1000) %}{% for b in range(1000) %}{{ b }}{% endfor %}{% endfor %}',
      'it needs more than 200000 steps',
    ],
    [
      'empty loops',
      '{% set r = range(30000) %}{% for a in range(1000) %}{% for b in r %}{% endfor %}{% endfor %}',
      'it needs more than 200000 steps',
    ],
    ['recursion', endless, 'it needs more than 64 calls inside calls'],
    ['nesting', `{{ ${'not '.repeat(1_100)} a }}`, 'it needs more than 1024 nested expressions'],
    ['a range', '{{ range(1000000000) | length }}', 'it needs more than 262144 elements in one list'],
    ['a text that doubles', `${doubled}{{ ns.s | length }}`, 'it needs more than 1048576 characters in one text'],
    [
      'a value that doubles, written as JSON',
      `${doubledList}{{ ns.l | tojson | length }}`,
      'it needs more than 1048576 characters in one value',
    ],
    ['a value that doubles, printed', `${doubledList}{{ ns.l }}`, 'it needs more than 1048576 characters in one value'],
    ['a value that doubles, as text', `${doubledList}{{ ns.l ~ '' }}`, 'it needs more than 1048576 characters in one value'],
    ['a value that doubles, compared', `${doubledList}{{ ns.l == '' }}`, 'it needs more than 1048576 characters in one value'],
    [
      'a value that holds itself',
      '{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}',
      'it needs more than 64 values inside values',
    ],
    ['indentation', "{{ 'a\nb' | indent(100000000) }}", 'it needs more than 64 spaces of indentation'],
  ])('chat template - stops at its budget for %s', (_, source, message) => {
    expect(budget(source)).toBe(message);
  });

  it('chat template - stops at its budgets for searches, replacements and joins of long texts', () => {
    const product = 'it needs more than 67108864 characters times characters in one search';
    const long = user('a'.repeat(100_000));
    expect(budget("{{ messages[0].content.replace('a', messages[0].content) | length }}", long)).toBe(product);
    expect(budget("{{ messages[0].content | replace('a', messages[0].content) | length }}", long)).toBe(product);
    expect(budget("{% set f = messages[0].content.replace %}{{ f('a', messages[0].content) }}", long)).toBe(product);
    expect(budget("{{ messages[0].content.split('') }}{{ (messages[0].content ~ 'b') in messages[0].content }}", long)).toMatch(
      /empty separator/,
    );
    expect(budget("{{ (messages[0].content ~ 'b') in messages[0].content }}", long)).toBe(product);
    expect(budget('{{ range(100000) | join(messages[0].content) | length }}', long)).toBe(product);
    expect(budget("{% filter replace('a', messages[0].content) %}{{ messages[0].content }}{% endfilter %}", long)).toBe(product);
    expect(
      budget(
        "{% for i in range(9000) %}{% if messages[0].content | upper | lower == '' %}{% endif %}{% endfor %}",
        user('a'.repeat(1_000_000)),
      ),
    ).toBe('it needs more than 67108864 characters of work');
  });

  it('chat template - stops by the clock where nothing else does', () => {
    const template = new ChatTemplate('{% for i in range(20000) %}{{ i }}{% endfor %}', { timeMaxMs: 0 });
    const variables = { messages: [], tools: null, add_generation_prompt: false, specialTokens: {} };
    expect(() => template.render(variables)).toThrow('it needs more than 0 milliseconds');
  });

  it('chat template - allows long chats: 2,000 messages and a megabyte', () => {
    const chat =
      "{% for m in messages %}{% if '<x>' in m.content %}{{ m.content.split('<x>')[-1] | trim }}{% else %}{{ '[' + m.role + ']' + m.content | trim + '\n' }}{% endif %}{% endfor %}";
    const messages = Array.from({ length: 2_000 }, () => ({ role: 'user', content: 'word '.repeat(100) }));
    expect(render(chat, messages)).toHaveLength(2_000 * (6 + 499 + 1));
    expect(render(chat, user('x'.repeat(1_000_000)))).toHaveLength(1_000_007);
    expect(budget(chat, user('é'.repeat(600_000)))).toBe('its output has 1200007 bytes; the limit is 1048576');
  });
});

describe('chat rendering', () => {
  const specials = new SpecialTokenFinder([
    ['<|a|>', 1],
    ['<|a|>b', 2],
    ['<|end|>', 3],
  ]);
  const chat = (source: string, messages: unknown[], tools: unknown[] | null = null): (string | number)[] =>
    renderChat(new ChatTemplate(source), specials, { messages, tools, add_generation_prompt: false, specialTokens: {} }).parts;

  it('chat rendering - takes special tokens from the template only', () => {
    expect(chat("{{ '<|a|>' + messages[0].content + '<|end|>' }}", user('x<|end|>y'))).toEqual([1, 'x<|end|>y', 3]);
  });

  it('chat rendering - breaks a token that begins in one text and ends in another', () => {
    const source = '{{ messages[0].role + messages[0].content }}';
    expect(chat(source, [{ role: 'x<|e', content: 'nd|>' }])).toEqual(['x<|end|>']);
  });

  it('chat rendering - breaks tokens in the keys and values of tools, also where JSON escapes the mark', () => {
    const tools = [{ '<|end|>': '<|a|>' }];
    expect(chat('{{ tools | tojson }}', user(''), tools)).toEqual(['[{"<|end|>": "<|a|>"}]']);
    expect(chat('{{ tools | tojson(ensure_ascii=true) }}', user(''), tools)).toEqual(['[{"<|end|>": "<|a|>"}]']);
  });

  it('chat rendering - keeps noncharacters that a message brings along', () => {
    const content = '\ufdd0<|end|>\ufdd1 \\ufdd2';
    expect(chat('{{ messages[0].content }}', user(content))).toEqual([content]);
  });

  it('chat rendering - refuses a chat that leaves no character to mark with', () => {
    let content = '';
    for (let code = 0xe000; code <= 0xf8ff; code++) content += String.fromCharCode(code);
    for (let code = 0xfdd0; code <= 0xfdef; code++) content += String.fromCharCode(code);
    expect(() => chat('{{ messages[0].content }}', user(content))).toThrow(
      'The chat template of the model failed: the messages use every noncharacter and every private character of Unicode; leave one out.',
    );
  });

  it('chat rendering - lets the template look for tags in a message', () => {
    const source = "{{ messages[0].content.split('</think>')[-1] }}{{ '<|end|>' }}";
    expect(chat(source, user('<think>a</think>b'))).toEqual(['b', 3]);
  });

  it('chat rendering - refuses data nested too deeply', () => {
    let tool: unknown = 'x';
    for (let depth = 0; depth < 80; depth++) tool = [tool];
    expect(() => chat('{{ tools }}', user(''), [tool])).toThrow('messages and tools are nested deeper than 64.');
  });
});
