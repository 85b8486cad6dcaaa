/**
 * A worker that computes nothing: it joins the mesh as a real one does, over real NATS, and answers every plan with tokens that cost it nothing, at once or one
 * step after the other at a fixed pace. What is measured with it is the coordinator, or a load tool against another.
 */
import { readCredentials } from '../../dist/protocol/credentials.js';
import { decodeCoordinatorMessage, encodeMessage } from '../../dist/protocol/message-codec.js';
import { connectNats } from '../../dist/protocol/nats-transport.js';
import { meshSubjects } from '../../dist/protocol/subjects.js';

const [credentialsFile, kvBlocks, stepMs = '0'] = process.argv.slice(2);
const credentials = readCredentials(credentialsFile);
const worker = credentials.worker;
const subjects = meshSubjects(credentials.mesh);
const transport = await connectNats({ credentials, name: `worker-${worker}`, patienceMs: 10_000 });
const stats = {
  steps: 0,
  busyUs: 0,
  idleUs: 0,
  collectiveUs: 0,
  receiveUs: 0,
  framesOut: 0,
  bytesOut: 0,
  staleFrames: 0,
  corruptFrames: 0,
};
// What a step is said to take: the coordinator plans ahead by it.
const timings = { totalUs: Math.max(1, Number(stepMs) * 1_000), collectiveUs: 0, receiveUs: 0, sampleUs: 0, idleUs: 0 };
let state = 'idle';
let epoch = 0;
let plans = null;

const subjectOf = { heartbeat: 'heartbeat', join: 'register', step_result: 'result' };
const send = (message) => transport.publish(subjects[subjectOf[message.type] ?? 'event'](worker), encodeMessage(message));

/** Ordinary words of the vocabulary, a few hundred of them. */
const tokenOf = (slot, position) => 1_000 + ((slot * 31 + position * 7) % 500);

/** Behind a draft that is not what the row before it samples, nothing is sampled. */
function outputsOf({ slot, position, tokens, outputs: wanted }) {
  const outputs = [];
  for (const [i, { row, score }] of wanted.entries()) {
    if (score === null && i > 0 && wanted[i - 1].score === null && outputs.at(-1).token !== tokens[row]) break;
    outputs.push({ slot, token: score ?? tokenOf(slot, position + row), logprob: null, top: [] });
  }
  return outputs;
}

function answer({ placement, epoch: ofEpoch, step, sequences }) {
  const outputs = sequences.flatMap(outputsOf);
  stats.steps++;
  send({ type: 'step_result', placement, epoch: ofEpoch, step, outputs, ...timings });
}

/** When the last step that was taken in ends; steps run one after the other. */
let lastEnd = 0;
function take(plan) {
  if (Number(stepMs) === 0) return answer(plan);
  lastEnd = Math.max(lastEnd, performance.now()) + Number(stepMs);
  setTimeout(() => answer(plan), lastEnd - performance.now());
}

async function receive(bytes) {
  const message = decodeCoordinatorMessage(bytes);
  switch (message.type) {
    case 'step_plans':
      return message.plans.forEach(take);
    case 'assign': {
      const { placement, sliceSha256 } = message;
      if (placement.epoch < epoch || (placement.epoch === epoch && state !== 'idle')) return;
      epoch = placement.epoch;
      plans ??= await transport.subscribe(subjects.plan(placement.id), (data) => void receive(data));
      state = 'ready';
      return send({
        type: 'shard_ready',
        worker,
        epoch,
        sliceSha256,
        tablesChecksum: 'none',
        kvBlocks: Number(kvBlocks),
        bytesFetched: 0,
        loadMs: 0,
        segment: null,
        peerMemory: null,
      });
    }
    case 'connect':
      state = 'connected';
      return send({ type: 'connected', worker, epoch });
    case 'rejoin':
      return join();
    default:
  }
}

function join() {
  const facts = {
    hostId: 'stand-in',
    pid: process.pid,
    cpuModel: 'none',
    isa: 'portable',
    cores: 1,
    memoryBytes: 1,
    executor: 'auto',
    device: null,
    arithmetic: 'none',
    grpcAddress: '',
    tcpAddress: '',
    weightBytesPerSecond: 0,
  };
  send({ type: 'join', worker, protocolMin: 1, protocolMax: 1, epochSeen: epoch, facts });
}

await transport.subscribe(subjects.controls(worker), (bytes) => void receive(bytes));
join();
setInterval(
  () =>
    send({ type: 'heartbeat', worker, state, epoch, stepDone: 0, plansQueued: 0, rssBytes: process.memoryUsage.rss(), stats }),
  500,
);
