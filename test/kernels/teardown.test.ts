import { execFile } from 'node:child_process';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { expect, test } from 'vitest';
import { sliceBlocks, tinyProgram, tinyWeights, twoRankCut } from './tiny-model.ts';

/** Makes rank 0 of two and submits a step that waits for rank 1, which does not exist; then says so. */
const waitForever = `
  const { createRequire } = await import('node:module');
  const { workerData } = await import('node:worker_threads');
  const { addonFile, program, bytes } = workerData ?? JSON.parse(process.env.SETUP);
  const addon = createRequire(addonFile)(addonFile);
  const callbacks = { onStep() {}, onFrame() { say('waiting'); }, onStepFailed() {} };
  const options = { kind: 'cpu', isa: null, program, cores: [], threads: 2, spin: false, blockTokens: 16, kvBlocks: 4, stepTokensMax: 16, sequencesMax: 2 };
  const executor = addon.createExecutor(options, callbacks);
  await Promise.all(bytes.map((length, i) => executor.loadWeight(i, new Uint8Array(length))));
  executor.connect([{ peer: { stage: 0, rank: 1 }, driver: 'host' }]);
  const sampling = { temperature: 0, topP: 1, topK: 0, minP: 0, seed: 0n, choice: 0, repetitionPenalty: 1, presencePenalty: 0, frequencyPenalty: 0, logitBias: [], logprobs: null };
  executor.openSlots([{ slot: 0, sampling, promptTokens: new Int32Array(), outputTokens: new Int32Array() }]);
  const one = (value) => Int32Array.of(value);
  executor.submit({ step: 1, tokenIds: one(3), tokenSteps: one(0), positions: one(0), rowSequence: one(0), slots: one(0),
    blockTableOffsets: Int32Array.of(0, 1), blockTables: one(0), outputs: new Int32Array(0), waitTimeoutMs: 600000 });
`;

const program = tinyProgram(tinyWeights(), twoRankCut, 0, 0);
const weights = tinyWeights();
const setup = {
  addonFile: join(import.meta.dirname, '../../build/shardmesh.node'),
  program,
  bytes: program.weights.map((slice) => sliceBlocks(weights.get(slice.tensor)!, slice).length),
};

async function runNode(code: string): Promise<{ stdout: string; ms: number }> {
  const began = performance.now();
  const args = ['--input-type=module', '--eval', code];
  const { stdout } = await promisify(execFile)(process.execPath, args, {
    env: { SETUP: JSON.stringify(setup) },
    timeout: 20_000,
  });
  return { stdout, ms: performance.now() - began };
}

test('executor - a process may exit while a step waits for a peer', async () => {
  const { stdout, ms } = await runNode(`const say = (text) => { console.log(text); process.exit(0); }; ${waitForever}`);
  expect(stdout).toBe('waiting\n');
  expect(ms).toBeLessThan(10_000);
});

test('executor - a worker thread may be terminated while a step waits, and the process lives on', async () => {
  const { stdout } = await runNode(`
    import { Worker } from 'node:worker_threads';
    const code = ${JSON.stringify(`(async () => { const { parentPort } = await import('node:worker_threads'); const say = (text) => parentPort.postMessage(text); ${waitForever} })()`)};
    for (let round = 0; round < 3; round++) {
      const worker = new Worker(code, { eval: true, workerData: JSON.parse(process.env.SETUP) });
      await new Promise((resolve, reject) => { worker.once('message', resolve); worker.once('error', reject); });
      await worker.terminate();
      console.log('terminated');
    }
  `);
  expect(stdout).toBe('terminated\nterminated\nterminated\n');
});

test('executor - does not keep a process alive after dispose', async () => {
  const { stdout } = await runNode(`
    const say = () => executor.dispose().then(() => console.log('disposed'));
    ${waitForever}
  `);
  expect(stdout).toBe('disposed\n');
});
