/**
 * Many SSE clients in one process, on plain sockets, so that the clients cost as little as they can. Each asks for one stream after the other. Commands and
 * figures travel over the IPC channel: `count` answers with the tokens read so far and the CPU time used.
 */
import { connect } from 'node:net';

const { port, model, streams, promptTokens, outputTokens } = JSON.parse(process.argv[2]);
const event = Buffer.from('data: {');
let tokens = 0;
let finished = 0;
let refused = 0;

function stream(index) {
  const prompt = Array.from({ length: promptTokens }, (_, i) => 2_000 + ((index * 131 + i) % 4_000));
  const body = JSON.stringify({ model, prompt, max_tokens: outputTokens, ignore_eos: true, temperature: 0, stream: true });
  const request = `POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: ${Buffer.byteLength(body)}\r\n\r\n${body}`;
  const socket = connect(port, '127.0.0.1');
  let head = true;
  const ask = () => {
    head = true;
    socket.write(request);
  };
  socket.on('connect', ask);
  socket.on('data', (data) => {
    if (head) {
      head = false;
      if (!data.subarray(0, 12).equals(Buffer.from('HTTP/1.1 200'))) {
        refused++;
        setTimeout(ask, 50);
        return;
      }
    }
    for (let at = data.indexOf(event); at >= 0; at = data.indexOf(event, at + event.length)) tokens++;
    // The last chunk of a chunked answer.
    if (data.length >= 5 && data.subarray(-5).equals(Buffer.from('0\r\n\r\n'))) {
      finished++;
      ask();
    }
  });
  socket.on('error', (error) => process.send({ error: String(error) }));
}

for (let index = 0; index < streams; index++) setTimeout(stream, index * 2, index);
process.on('message', () => {
  const { user, system } = process.cpuUsage();
  process.send({ tokens, finished, refused, cpuSeconds: (user + system) / 1e6 });
});
