/** Asks a running server one question over its own HTTP API and shows the answer as it streams. */
export async function ask(url: string, model: string, question: string, apiKey: string | undefined): Promise<void> {
  const response = await fetch(`${url}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', ...(apiKey ? { authorization: `Bearer ${apiKey}` } : {}) },
    body: JSON.stringify({
      model,
      messages: [{ role: 'user', content: question }],
      temperature: 0,
      max_tokens: 64,
      stream: true,
    }),
  });
  if (!response.ok || !response.body)
    throw new Error(`the question was answered with HTTP ${response.status}: ${await response.text()}`);
  process.stdout.write(`\n> ${question}\n`);
  const decoder = new TextDecoder();
  let rest = '';
  for await (const part of response.body) {
    rest += decoder.decode(part as Uint8Array, { stream: true });
    const lines = rest.split('\n');
    rest = lines.pop() ?? '';
    for (const line of lines) {
      if (!line.startsWith('data: {')) continue;
      const event = JSON.parse(line.slice(6)) as { choices?: { delta: { content?: string } }[]; error?: { message: string } };
      if (event.error) throw new Error(event.error.message);
      process.stdout.write(event.choices?.[0]?.delta.content ?? '');
    }
  }
  process.stdout.write('\n\n');
}
