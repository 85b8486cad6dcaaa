import { afterEach, describe, expect, test } from 'vitest';
import { loadAddon, type SlotSampling } from '../../kernels/index.ts';
import {
  greedy,
  plainForward,
  plainLogprob,
  randomTokens,
  threeRankTwoStageCut,
  tiny,
  TinyMesh,
  tinyProgram,
  tinyWeights,
  twoRankCut,
  wholeCut,
  type StepFailedError,
  type TinyMeshOptions,
  type TinyRows,
  type TinyTypes,
} from './tiny-model.ts';

const weights = tinyWeights();
const meshes: TinyMesh[] = [];

async function start(options: TinyMeshOptions = {}): Promise<TinyMesh> {
  const mesh = await TinyMesh.start({ weights, ...options });
  meshes.push(mesh);
  return mesh;
}

async function scoreOn(
  options: TinyMeshOptions,
  tokens: number[],
  how: Parameters<TinyMesh['score']>[1] = {},
): Promise<number[]> {
  const mesh = await start(options);
  mesh.open(how.slot ?? 0);
  const scores = await mesh.score(tokens, how);
  await mesh.stop();
  return scores;
}

afterEach(async () => {
  await Promise.all(meshes.splice(0).map((mesh) => mesh.stop()));
});

const prompt = randomTokens(100);
const precise: TinyTypes = { activations: 'int16', key: 'f16', value: 'f16' };

describe('step runner, against double precision', () => {
  const tokens = prompt.slice(0, 60);
  const expected = plainForward(weights, tokens)
    .slice(0, -1)
    .map((logits, i) => plainLogprob(logits, tokens[i + 1]!));

  const differences = async (kind: 'reference' | 'reference-f32', types: TinyTypes) => {
    const mesh = await start({ kind, ...types });
    mesh.open(0, { logprobs: 0 });
    const scores = (await mesh.score(tokens)).slice(0, tokens.length - 1);
    return scores.map((score, i) => Math.abs(score - expected[i]!));
  };

  test('step runner - fp32 reference agrees with a plain forward pass to 1e-4', async () => {
    expect(Math.max(...(await differences('reference-f32', {})))).toBeLessThan(1e-4);
  });

  test('step runner - int8 reference stays near a plain forward pass, and is not the fp32 one', async () => {
    const all = await differences('reference', {});
    const mean = all.reduce((a, b) => a + b, 0) / all.length;
    expect(mean).toBeLessThan(0.12);
    expect(mean).toBeGreaterThan(1e-3);
  });

  test('step runner - f16 keys stay near a plain forward pass', async () => {
    const all = await differences('reference', { key: 'f16' });
    expect(all.reduce((a, b) => a + b, 0) / all.length).toBeLessThan(0.12);
  });

  test('step runner - int16 activations with f16 K and V are thirty times nearer', async () => {
    const all = await differences('reference', precise);
    expect(all.reduce((a, b) => a + b, 0) / all.length).toBeLessThan(0.002);
  });
});

describe('step runner, the same bits', () => {
  const cpu = loadAddon().cpuFeatures().isas;

  test.each([1, 7, 16, 33, 64])('step runner - chunks of %i tokens equal one chunk', async (chunk) => {
    const mesh = await start();
    mesh.open(0);
    const whole = await mesh.score(prompt);
    expect(whole).toHaveLength(100 * (1 + 6) + 1);
    expect(await mesh.score(prompt, { chunk, blocks: [20, 21, 22, 23, 24, 25, 26] })).toEqual(whole);
  });

  // So many values of gate and up that a thread takes its columns in several blocks.
  test.each([300, 600])('step runner - a step of %i tokens equals steps of 50', async (tokens) => {
    const mesh = await start({ kind: 'cpu', stepTokensMax: 600, kvBlocks: 80 });
    mesh.open(0);
    const long = randomTokens(tokens);
    const blocks = Array.from({ length: 38 }, (_, i) => i);
    const whole = await mesh.score(long, { blocks });
    expect(await mesh.score(long, { chunk: 50, blocks: blocks.map((i) => i + 40) })).toEqual(whole);
  });

  test('step runner - a permuted block table equals the identity', async () => {
    expect(await scoreOn({}, prompt, { blocks: [9, 3, 0, 14, 6, 2, 11] })).toEqual(await scoreOn({}, prompt));
  });

  test('step runner - blocks of 64 tokens equal blocks of 16', async () => {
    expect(await scoreOn({ blockTokens: 64 }, prompt, { blocks: [5, 1] })).toEqual(await scoreOn({}, prompt));
  });

  test.each([2, 3])('step runner - %i threads equal one', async (threads) => {
    expect(await scoreOn({ threads }, prompt)).toEqual(await scoreOn({}, prompt));
  });

  test.each(cpu)('step runner - kernel set %s equals the reference', async (isa) => {
    expect(await scoreOn({ kind: 'cpu', isa, threads: 2 }, prompt)).toEqual(await scoreOn({}, prompt));
    for (const types of [{ key: 'f16' }, precise, { activations: 'int16' }] satisfies TinyTypes[])
      expect(await scoreOn({ kind: 'cpu', isa, ...types }, prompt, { chunk: 9 })).toEqual(await scoreOn(types, prompt));
  });

  test.each([
    ['two ranks over shared memory', twoRankCut, false],
    ['two ranks over the host driver', twoRankCut, true],
    ['three uneven ranks, two stages, shared memory', threeRankTwoStageCut, false],
    ['three uneven ranks, two stages, host driver', threeRankTwoStageCut, true],
  ] as const)('step runner - %s equal one worker', async (_, cut, host) => {
    for (const types of [{}, precise])
      expect(await scoreOn({ ...types, cut, host }, prompt, { chunk: 41 })).toEqual(await scoreOn(types, prompt));
  });

  test('step runner - frames leave with room for a header in front of them, which may be written', async () => {
    const whole = await scoreOn({}, prompt);
    expect(await scoreOn({ cut: threeRankTwoStageCut, host: true, frameGap: 80 }, prompt, { chunk: 7 })).toEqual(whole);
  });

  test.each([
    ['bf16', 0.05],
    ['q8', 0.1],
  ] as const)('step runner - %s on the wire is near f32, whatever carries it and whatever the chunks', async (wire, most) => {
    const exact = await scoreOn({}, prompt);
    const shm = await scoreOn({ cut: threeRankTwoStageCut, wire }, prompt, { chunk: 41 });
    expect(await scoreOn({ cut: threeRankTwoStageCut, wire, host: true }, prompt, { chunk: 7 })).toEqual(shm);
    expect(shm).not.toEqual(exact);
    // Seven numbers a row, the first one its log-probability.
    const difference =
      prompt.slice(1).reduce((sum, _, row) => sum + Math.abs(shm[7 * row]! - exact[7 * row]!), 0) / prompt.length;
    expect(difference).toBeGreaterThan(0);
    expect(difference).toBeLessThan(most);
  });

  test('step runner - nothing is rounded where nothing travels', async () => {
    expect(await scoreOn({ wire: 'q8' }, prompt)).toEqual(await scoreOn({}, prompt));
  });

  test('step runner - a sequence among others equals the sequence alone', async () => {
    const alone = await scoreOn({}, prompt.slice(0, 40));
    const mesh = await start();
    const sequences = [0, 1, 2, 3].map((slot): TinyRows => {
      const tokens = slot === 2 ? prompt.slice(0, 40) : randomTokens(11 + 17 * slot, slot);
      const outputs = tokens.map((_t, row) => ({ row, score: tokens[row + 1] ?? null }));
      const blocks = Array.from({ length: 5 }, (_b, i) => slot * 5 + i);
      return { slot, position: 0, tokens, blocks, outputs };
    });
    for (const { slot } of sequences) mesh.open(slot);
    const results = (await mesh.run(sequences)).filter((r) => r.slot === 2);
    const together = results.flatMap((r) => [r.logprob!, ...r.top.flatMap((t) => [t.token, t.logprob])]);
    expect([...together, results.at(-1)!.token]).toEqual(alone);
  });

  test('step runner - more output rows than one pass of the head holds keep their order', async () => {
    const scores = await scoreOn({}, prompt); // 100 rows, 64 a pass
    expect(scores.slice(0, 7 * 30)).toEqual((await scoreOn({}, prompt.slice(0, 31))).slice(0, 7 * 30));
  });
});

describe('step runner, decoding', () => {
  const generate = async (options: TinyMeshOptions, sampling: Partial<SlotSampling>, count = 24) => {
    const mesh = await start(options);
    const outputs = await mesh.generate(prompt.slice(0, 30), sampling, count);
    await mesh.stop();
    return outputs;
  };

  const sampled = { temperature: 0.9, topP: 0.95, seed: 1234567890123456789n };

  test('step runner - queued steps read the token that the step before sampled', async () => {
    const outputs = await generate({}, {});
    const tokens = [...prompt.slice(0, 30), ...outputs.map(([token]) => token)];
    // Greedy decoding in one step each equals one prefill of the same text.
    const scores = await scoreOn({}, tokens);
    const scoredAt = (row: number) => scores[row * 7];
    expect(outputs.map(([, logprob]) => logprob)).toEqual(outputs.map((_, i) => scoredAt(29 + i)));
  });

  test.each([
    ['two ranks', { cut: twoRankCut }],
    ['two ranks, host driver', { cut: twoRankCut, host: true }],
    ['two stages of three ranks', { cut: threeRankTwoStageCut }],
    ['two stages of three ranks, host driver', { cut: threeRankTwoStageCut, host: true }],
    ['the best kernel set, two threads', { kind: 'cpu', threads: 2 }],
  ] as const)('step runner - the same seed gives the same text on %s', async (_, options) => {
    expect(await generate(options, sampled)).toEqual(await generate({}, sampled));
  });

  test('step runner - a result that may wait is told of together with the next one, or before a step that fails', async () => {
    const mesh = await start();
    mesh.open(0);
    mesh.open(1);
    const ended = async (step: number): Promise<void> => {
      while (mesh.members[0]!.executor.totals().lastStep < step) await new Promise((resolve) => setTimeout(resolve, 1));
      await new Promise((resolve) => setTimeout(resolve, 20));
    };
    const told: number[] = [];
    const tell = ({ step, done }: ReturnType<TinyMesh['submit']>) =>
      done.then(
        () => told.push(step),
        () => told.push(-step),
      );
    const rows = (position: number, after: number): TinyRows[] => [
      { slot: 0, position, tokens: null, after, blocks: [0], outputs: [{ row: 0, score: null }] },
    ];
    void tell(mesh.submit([{ slot: 0, position: 0, tokens: [1, 2, 3], blocks: [0], outputs: [{ row: 2, score: null }] }]));
    await ended(1);
    void tell(mesh.submit(rows(3, 1), 10_000, mesh.members, true));
    void tell(mesh.submit(rows(4, 2), 10_000, mesh.members, true));
    await ended(3);
    expect(told).toEqual([1]);
    await tell(mesh.submit(rows(5, 3)));
    expect(told).toEqual([1, 2, 3, 4]);
    void tell(mesh.submit(rows(6, 4), 10_000, mesh.members, true));
    await ended(5);
    expect(told).toEqual([1, 2, 3, 4]);
    // A token of slot 1, which has none.
    await tell(mesh.submit([{ ...rows(0, 5)[0]!, slot: 1, blocks: [1] }]));
    expect(told).toEqual([1, 2, 3, 4, 5, -6]);
  });

  test('step runner - another seed or choice gives another text', async () => {
    const [one, seed, choice] = await Promise.all([
      generate({}, sampled),
      generate({}, { ...sampled, seed: 5n }),
      generate({}, { ...sampled, choice: 1 }),
    ]);
    expect(seed).not.toEqual(one);
    expect(choice).not.toEqual(one);
    expect(choice).not.toEqual(seed);
  });

  const penalties: Partial<SlotSampling> = {
    ...sampled,
    repetitionPenalty: 1.3,
    presencePenalty: 0.4,
    frequencyPenalty: 0.3,
    logitBias: [[7, 1.5]],
  };

  const generateWithDrafts = async (
    options: TinyMeshOptions,
    sampling: Partial<SlotSampling>,
    want: number[],
    drafts: number,
  ) => {
    const mesh = await start(options);
    const outputs = await mesh.generateWithDrafts(prompt.slice(0, 30), sampling, want, drafts);
    await mesh.stop();
    return outputs;
  };

  test.each([
    ['one worker', {}],
    ['two ranks', { cut: twoRankCut }],
    ['two stages of three ranks', { cut: threeRankTwoStageCut }],
    ['two stages of three ranks, host driver', { cut: threeRankTwoStageCut, host: true }],
    ['the best kernel set, two threads', { kind: 'cpu', threads: 2 }],
  ] as [string, TinyMeshOptions][])(
    'step runner - drafts are kept as far as they are what one row a step samples, on %s',
    async (_, options) => {
      for (const sampling of [{}, { logprobs: null, temperature: 0.9, seed: 4n }, penalties]) {
        const plain = await generate({}, sampling);
        const tokens = plain.map(([token]) => token);
        for (const drafts of [0, 3]) expect(await generateWithDrafts(options, sampling, tokens, drafts)).toEqual(plain);
      }
    },
  );

  test('step runner - drafts go on from one pass of the head to the next', async () => {
    const plain = await generate({}, penalties, 76);
    const tokens = plain.map(([token]) => token);
    expect(await generateWithDrafts({ kind: 'cpu', threads: 2 }, penalties, tokens, 70)).toEqual(plain); // 64 rows a pass
  });

  test.each([
    ['two ranks', { cut: twoRankCut }],
    ['two ranks of the best kernel set, two threads', { cut: twoRankCut, kind: 'cpu', threads: 2 }],
    ['two stages of three ranks', { cut: threeRankTwoStageCut }],
    ['two stages of three ranks, host driver', { cut: threeRankTwoStageCut, host: true }],
  ] as [string, TinyMeshOptions][])(
    'step runner - the best candidates of the ranks give the tokens that all logits give, on %s',
    async (_, options) => {
      for (const sampling of [{}, { temperature: 0.9, seed: 99n }, { temperature: 2, seed: 7n, choice: 3 }, sampled, penalties]) {
        const tokens = async (on: TinyMeshOptions, logprobs: number | null): Promise<number[]> =>
          (await generate(on, { ...sampling, logprobs }, 40)).map(([token]) => token);
        const fromAllLogits = await tokens({}, 0);
        expect(new Set(fromAllLogits).size).toBeGreaterThan(5);
        expect(await tokens(options, null)).toEqual(fromAllLogits);
        expect(await tokens({}, null)).toEqual(fromAllLogits);
      }
    },
  );

  test('step runner - only rows that need more than candidates send their logits', async () => {
    const others = tiny.vocabulary - (twoRankCut.vocabulary[0]!.to - twoRankCut.vocabulary[0]!.from);
    const bytesOf = async (sampling: Partial<SlotSampling>[], output: Partial<TinyRows['outputs'][0]> = {}): Promise<number> => {
      const mesh = await start({ cut: twoRankCut, host: true });
      sampling.forEach((one, slot) => mesh.open(slot, one, [1, 2]));
      await mesh.run(
        sampling.map((_, slot) => ({
          slot,
          position: 0,
          tokens: [1, 2],
          blocks: [slot],
          outputs: [{ row: 1, score: null, ...output }],
        })),
      );
      return mesh.frameBytes.get('logits')!;
    };
    const plain = { logprobs: null };
    // Rank 0 publishes four bytes to say that it is there.
    expect(await bytesOf([plain])).toBe(4 + 8);
    expect(await bytesOf([{ ...plain, temperature: 1, seed: 3n }])).toBe(4 + 8);
    const whole = 4 + 4 * others;
    expect(await bytesOf([{ logprobs: 0 }])).toBe(whole);
    expect(await bytesOf([plain], { score: 5 })).toBe(whole);
    expect(await bytesOf([plain], { banned: [5] })).toBe(whole);
    expect(await bytesOf([{ ...plain, presencePenalty: 0.5 }])).toBe(whole);
    expect(await bytesOf([{ ...plain, logitBias: [[3, 1]] }])).toBe(whole);
    for (const cut of [{ topP: 0.9 }, { topK: 10 }, { minP: 0.1 }]) {
      expect(await bytesOf([{ ...plain, ...cut, temperature: 1 }])).toBe(whole);
      expect(await bytesOf([{ ...plain, ...cut }])).toBe(4 + 8);
    }
    expect(await bytesOf([plain, { logprobs: 2 }, plain])).toBe(whole + 16);
  });

  test('step runner - a banned token is not sampled', async () => {
    const mesh = await start();
    mesh.open(0);
    const rows = (banned: number[]): TinyRows[] => [
      { slot: 0, position: 0, tokens: prompt.slice(0, 8), blocks: [0], outputs: [{ row: 7, score: null, banned }] },
    ];
    const [free] = await mesh.run(rows([]));
    const [second] = await mesh.run(rows([free!.token]));
    expect(second!.token).toBe(free!.top[1]!.token);
  });

  test('step runner - log-probabilities come only when asked for', async () => {
    const mesh = await start();
    mesh.open(0, { logprobs: null });
    const [output] = await mesh.run([{ slot: 0, position: 0, tokens: [1, 2], blocks: [0], outputs: [{ row: 1, score: null }] }]);
    expect(output).toMatchObject({ slot: 0, logprob: null, top: [] });
  });
});

describe('step runner, failures', () => {
  const rows: TinyRows[] = [{ slot: 0, position: 0, tokens: [1, 2, 3], blocks: [0], outputs: [{ row: 2, score: null }] }];

  test('step runner - a peer that does not answer fails the step at its deadline and is named', async () => {
    const mesh = await start({ cut: twoRankCut });
    mesh.open(0);
    const began = performance.now();
    const { done } = mesh.submit(rows, 300, [mesh.members[0]!]);
    const error = await done.then(
      () => expect.unreachable(),
      (e: StepFailedError) => e,
    );
    expect(error).toMatchObject({ code: 'wait_timeout', peer: { stage: 0, rank: 1 } });
    expect(error.message).toMatch(/step 1, operation 1 \(gather_rows\): waited 300 ms for the block of stage 0 rank 1/);
    expect(performance.now() - began).toBeLessThan(2_000);
    // It takes no further step until a new epoch.
    const after = mesh.submit(rows, 300, [mesh.members[0]!]);
    await expect(after.done).rejects.toMatchObject({
      code: 'aborted',
      message: expect.stringContaining('step 1 failed before it') as string,
    });
    await Promise.all(mesh.members.map((member) => member.executor.abort('a new epoch begins')));
    mesh.connect(false);
    mesh.open(0);
    expect(await mesh.run(rows)).toHaveLength(1);
  });

  test('step runner - abort ends a wait at once and fails what is queued', async () => {
    const mesh = await start({ cut: twoRankCut });
    mesh.open(0);
    const only = [mesh.members[1]!];
    const first = mesh.submit(rows, 60_000, only);
    const second = mesh.submit(rows, 60_000, only);
    await new Promise((resolve) => setTimeout(resolve, 50));
    const began = performance.now();
    await mesh.members[1]!.executor.abort('epoch 2 begins');
    expect(performance.now() - began).toBeLessThan(500);
    await expect(first.done).rejects.toMatchObject({
      code: 'aborted',
      message: expect.stringContaining('epoch 2 begins') as string,
    });
    await expect(second.done).rejects.toMatchObject({
      code: 'aborted',
      message: expect.stringContaining('epoch 2 begins') as string,
    });
  });

  test('executor - refuses a norm weight that is not finite', async () => {
    const broken = tinyWeights();
    new Float32Array(broken.get('1.ffn_norm')!.blocks.buffer)[5] = Number.NaN;
    await expect(start({ weights: broken })).rejects.toThrow("'1.ffn_norm' holds a value that is not finite");
  });

  test('step runner - a value that overflows on the way fails the step as non_finite', async () => {
    const broken = tinyWeights();
    new Float32Array(broken.get('1.ffn_norm')!.blocks.buffer).fill(3e38);
    const mesh = await start({ weights: broken });
    mesh.open(0);
    await expect(mesh.run(rows)).rejects.toMatchObject({
      code: 'non_finite',
      message: expect.stringContaining('not finite') as string,
    });
  });

  test('step runner - wrong steps are refused before they run', async () => {
    const mesh = await start();
    mesh.open(0);
    const submit = (change: Partial<TinyRows>) => () => mesh.submit([{ ...rows[0]!, ...change }]).done;
    await expect(submit({ slot: 3 })()).rejects.toThrow('slot 3 is not open');
    await expect(submit({ slot: 16 })()).rejects.toThrow('slot 16 is not in 0..15');
    await expect(submit({ tokens: [1, 600, 2] })()).rejects.toThrow('token id 600 is not in 0..599');
    await expect(submit({ position: 1199, blocks: Array.from({ length: 76 }, () => 0) })()).rejects.toThrow(
      'position 1200 is not in 0..1199',
    );
    await expect(submit({ position: 16 })()).rejects.toThrow('needs block 1 of a table of 1');
    await expect(submit({ blocks: [96] })()).rejects.toThrow('block 96 is not in 0..95');
    await expect(submit({ outputs: [{ row: 3, score: null }] })()).rejects.toThrow('output row 3 is not in 0..2');
    await expect(submit({ tokens: null, outputs: [{ row: 0, score: null }] })()).rejects.toThrow('is not a step before');
    const apart = [0, 2].map((row) => ({ row, score: null }));
    await expect(submit({ outputs: apart })()).rejects.toThrow('samples again at row 2, which does not follow');
    expect(await mesh.run(rows)).toHaveLength(1);
  });

  test('step runner - a token that no step sampled fails the step', async () => {
    const mesh = await start();
    mesh.open(0);
    const scored: TinyRows = { ...rows[0]!, outputs: [{ row: 2, score: 4 }] };
    const { step } = mesh.submit([scored]);
    const next = { slot: 0, position: 3, tokens: null, after: step, blocks: [0], outputs: [{ row: 0, score: null }] };
    await expect(mesh.run([next])).rejects.toMatchObject({
      code: 'internal',
      message: expect.stringContaining('sampled none') as string,
    });
  });

  test('step runner - a program that does not fit together is refused by name', () => {
    const create = (change: (program: ReturnType<typeof tinyProgram>) => void) => () => {
      const program = tinyProgram(weights, wholeCut, 0, 0);
      change(program);
      loadAddon().kvBytesPerBlock(program, 16);
    };
    expect(create(() => undefined)).not.toThrow();
    expect(create((p) => p.operations.splice(10, 1))).toThrow('a partial product must be followed by its all_reduce');
    expect(create((p) => (p.buffers[1]!.width = 96))).toThrow("buffer 'n' is 96 wide");
    expect(create((p) => (p.weights[0]!.type = 'Q2_K' as never))).toThrow("unknown type 'Q2_K'");
    expect(create((p) => Object.assign(p.operations[1]!, { weight: 99 }))).toThrow(
      'program.operations[1].weight: 99 is not an integer in 0..',
    );
    expect(create((p) => Object.assign(p.operations[0]!, { op: 'dream' }))).toThrow("unknown operation 'dream'");
  });

  test('executor - says what is missing, and nothing works after dispose', async () => {
    const program = tinyProgram(weights, wholeCut, 0, 0);
    const callbacks = { onStep: () => undefined, onFrame: () => undefined, onStepFailed: () => undefined };
    const options = {
      kind: 'reference' as const,
      isa: null,
      program,
      cores: [],
      threads: 1,
      spin: false,
      blockTokens: 16,
      kvBlocks: 4,
      stepTokensMax: 16,
      sequencesMax: 2,
    };
    const executor = loadAddon().createExecutor(options, callbacks);
    expect(() => executor.connect([])).toThrow("weight 'token_embd' is not loaded yet");
    expect(() => executor.openSlots([])).toThrow('call connect first');
    await expect(executor.loadWeight(0, new Uint8Array(10))).rejects.toThrow('has 10 bytes, its slice 183600');
    await expect(executor.loadWeight(99, new Uint8Array(10))).rejects.toThrow('weight 99 is not in 0..');
    expect(executor.isa).toBe('reference');
    await executor.dispose();
    await executor.dispose();
    expect(() => executor.connect([])).toThrow('disposed');
    expect(() => loadAddon().createExecutor({ ...options, blockTokens: 24 }, callbacks)).toThrow('blockTokens 24');
    expect(() => loadAddon().createExecutor({ ...options, kvBlocks: 1 << 24, blockTokens: 4096 }, callbacks)).toThrow(
      'the KV cache (kvBlocks) needs',
    );
    expect(() => loadAddon().createExecutor({ ...options, threads: 'two' as never }, callbacks)).toThrow(
      'options.threads must be a number, got a string',
    );
    expect(loadAddon().kvBytesPerBlock(program, 16)).toBe(2 * 3 * (16 * 32 * 2 + 128));
  });

  test('executor - rope tables have the same checksum on every rank', async () => {
    const mesh = await start({ cut: twoRankCut });
    const [a, b] = mesh.members.map((m) => m.executor.tablesChecksum());
    expect(a).toMatch(/^[0-9a-f]{16}$/);
    expect(b).toBe(a);
    expect(tiny.context).toBe(1_200);
    expect(greedy.temperature).toBe(0);
  });
});
