/**
 * What whole programs on the CUDA executor must give: the tokens and log-probabilities of the scalar reference, as exact numbers, whatever the cut, and whoever computes
 * the other ranks. On the emulated machine for every `npm test`, on a card for `npm run test:gpu`.
 */
import { beforeAll, describe, expect, it } from 'vitest';
import { loadAddon, type Addon, type OutputResult, type SlotSampling } from '../../kernels/index.ts';
import { cachedModelPath, loadScoringModel } from './score-model.ts';
import { kQuantShape, qwen2Shape, smallModel, typesOf, type SmallShape } from './small-model.ts';
import {
  randomTokens,
  threeRankTwoStageCut,
  TinyMesh,
  tinyWeights,
  twoRankCut,
  wholeCut,
  type MeshOptions,
  type RankExecutor,
  type TinyMeshOptions,
  type TinyRows,
} from './tiny-model.ts';

/** What `shardmesh tune` leaves where graphs with programmatic edges are the faster ones; everything else as it is built in. */
export const programmaticEdges = JSON.stringify({
  version: 1,
  cards: [{ sm: null, card: null, measured: null, products: [], attention: [], graphEdges: 'programmatic' }],
});

/** The same, where launches of few rows had better do products alone. */
const productsAlone = JSON.stringify({
  version: 1,
  cards: [{ sm: null, card: null, measured: null, products: [], attention: [], fusion: 'products', graphEdges: 'programmatic' }],
});

/** @param load  the addon that has the CUDA executor, and a card to go with it */
export function describeCudaPrograms(load: () => Promise<Addon>): void {
  const weights = tinyWeights();
  const prompt = randomTokens(100);
  const cpu: RankExecutor = { kind: 'cpu' };
  let withCuda: Addon;
  let cuda: RankExecutor;

  beforeAll(async () => {
    withCuda = await load();
    cuda = { addon: withCuda, kind: 'cuda' };
  }, 600_000);

  const onMesh = <T>(options: TinyMeshOptions, use: (mesh: TinyMesh) => Promise<T>): Promise<T> =>
    TinyMesh.with({ weights, ...options }, use);
  const scores = (options: TinyMeshOptions, chunk = 100, tokens = prompt): Promise<number[]> =>
    onMesh(options, (mesh) => {
      mesh.open(0);
      return mesh.score(tokens, { chunk, blocks: [9, 3, 0, 14, 6, 2, 11] });
    });

  describe('the same bits', () => {
    it.for([
      ['in one chunk, one worker', 100, wholeCut, {}],
      ['in chunks of 9, one worker', 9, wholeCut, {}],
      ['in chunks of 70, two ranks', 70, twoRankCut, {}],
      ['in chunks of 33, two ranks over the host driver', 33, twoRankCut, { host: true }],
      ['in chunks of 41, three uneven ranks by two stages', 41, threeRankTwoStageCut, {}],
      ['in chunks of 64, three uneven ranks by two stages over the host driver', 64, threeRankTwoStageCut, { host: true }],
      ['in one chunk, blocks of 64 tokens', 100, wholeCut, { blockTokens: 64 }],
    ] as const)('cuda program - scores a prompt as the reference does %s', async ([, chunk, cut, options]) => {
      const found = await scores({ ...cuda, cut, ...options }, chunk);
      expect(found).toEqual(await scores({}));
      expect(new Set(found).size).toBeGreaterThan(300);
    });

    it.for([
      ['int16 activations', { activations: 'int16' }],
      ['f16 K', { key: 'f16' }],
      ['f16 V', { value: 'f16' }],
      ['int16 activations, f16 K and V', { activations: 'int16', key: 'f16', value: 'f16' }],
    ] as const)(
      'cuda program - with %s two ranks, one of them a CPU, score a prompt as the reference does',
      async ([, types]) => {
        const executorOf = (_: number, rank: number): RankExecutor => (rank === 0 ? cuda : cpu);
        const want = await scores(types);
        expect(await scores({ ...types, executorOf, cut: twoRankCut }, 41)).toEqual(want);
        expect(want).not.toEqual(await scores({}));
      },
    );

    it.for([
      ['CUDA at rank 0, a CPU at rank 1', twoRankCut, (_: number, rank: number) => rank === 0],
      ['a CPU at rank 0, CUDA at rank 1', twoRankCut, (_: number, rank: number) => rank === 1],
      ['CUDA in the first stage, CPUs in the second', threeRankTwoStageCut, (stage: number) => stage === 0],
      ['CPUs in the first stage, CUDA in the second', threeRankTwoStageCut, (stage: number) => stage === 1],
      ['CUDA and CPUs by turns', threeRankTwoStageCut, (stage: number, rank: number) => (stage + rank) % 2 === 0],
    ] as const)('cuda program - a mesh of %s scores a prompt as the reference does', async ([, cut, isCuda]) => {
      const executorOf = (stage: number, rank: number): RankExecutor => (isCuda(stage, rank) ? cuda : cpu);
      expect(await scores({ executorOf, cut }, 41)).toEqual(await scores({}));
    });

    it.for(['bf16', 'q8'] as const)('cuda program - %s on the wire gives what the reference gives of that cut', async (wire) => {
      const executorOf = (_: number, rank: number): RankExecutor => (rank === 1 ? { kind: 'reference' } : cuda);
      const want = await scores({ cut: threeRankTwoStageCut, wire });
      expect(await scores({ executorOf, cut: threeRankTwoStageCut, wire }, 41)).toEqual(want);
      expect(want).not.toEqual(await scores({}));
    });

    it.for(['f32', 'q8'] as const)(
      'cuda program - a step whose sums need two pieces of an exchange gives the same, %s on the wire',
      async (wire) => {
        const tokens = randomTokens(640, 11); // 606 rows of three subtrees are a piece
        const last = (options: TinyMeshOptions) =>
          onMesh({ cut: threeRankTwoStageCut, wire, stepTokensMax: 640, ...options }, (mesh) => {
            mesh.open(0);
            const blocks = Array.from({ length: 40 }, (_, block) => block);
            return mesh.run([{ slot: 0, position: 0, tokens, blocks, outputs: [{ row: 639, score: null }] }], 60_000);
          });
        const [want] = await last(cpu);
        expect(await last({ executorOf: (stage, rank) => (rank === 2 - stage ? cpu : cuda) })).toEqual([want]);
      },
    );

    it('cuda program - a sequence gives the same among others, and on blocks that another one filled', async () => {
      const tokens = prompt.slice(0, 50);
      const run = (options: TinyMeshOptions) =>
        onMesh(options, async (mesh) => {
          for (const slot of [0, 1, 2, 3]) mesh.open(slot);
          const all: TinyRows[] = [0, 1, 2].map((slot) => {
            const own = slot === 1 ? tokens : randomTokens(5 + 20 * slot, slot);
            const blocks = [4, 3, 2, 1].map((block) => slot * 5 + block);
            return {
              slot,
              position: 0,
              tokens: own,
              blocks,
              outputs: own.map((_, row) => ({ row, score: own[row + 1] ?? null })),
            };
          });
          const first = await mesh.run(all);
          // Its first 32 tokens are those of slot 1, in blocks 9 and 8; beside it each of the others decodes.
          const shared: TinyRows = {
            slot: 3,
            position: 32,
            tokens: [...tokens.slice(32, 40), 7, 8],
            blocks: [9, 8, 16],
            outputs: [{ row: 9, score: null }],
          };
          const decoding = all.map(({ slot, tokens: own, blocks }, index): TinyRows => {
            const token = first.filter((output) => output.slot === slot).at(-1)!.token;
            return { slot, position: own!.length, tokens: [token + index], blocks, outputs: [{ row: 0, score: null }] };
          });
          return [...first, ...(await mesh.run([shared, ...decoding]))];
        });
      expect(await run({ ...cuda, cut: twoRankCut })).toEqual(await run({}));
    });
  });

  describe('decoding', () => {
    const sampled: Partial<SlotSampling> = { temperature: 0.9, topP: 0.95, seed: 1234567890123456789n };
    const penalties = { ...sampled, repetitionPenalty: 1.3, presencePenalty: 0.4, frequencyPenalty: 0.3 };
    const generate = (options: TinyMeshOptions, sampling: Partial<SlotSampling>) =>
      onMesh(options, (mesh) => mesh.generate(prompt.slice(0, 30), sampling, 16));

    it.for([
      ['one worker', () => cuda],
      ['two ranks', () => ({ ...cuda, cut: twoRankCut })],
      ['CUDA and CPUs by turns', () => ({ executorOf: (s, r) => ((s + r) % 2 ? cuda : cpu), cut: threeRankTwoStageCut })],
    ] as [string, () => TinyMeshOptions][])(
      "cuda program - queued steps give the reference's text on %s",
      async ([, options]) => {
        for (const sampling of [{}, sampled, penalties])
          expect(await generate(options(), sampling)).toEqual(await generate({}, sampling));
      },
    );

    it.for([
      ['one worker', () => cuda],
      ['two ranks', () => ({ ...cuda, cut: twoRankCut })],
      ['a CPU and CUDA', () => ({ executorOf: (_, rank) => (rank ? cuda : cpu), cut: twoRankCut })],
    ] as [string, () => TinyMeshOptions][])(
      'cuda program - best candidates give the tokens that all logits give, on %s',
      async ([, options]) => {
        for (const sampling of [{}, { temperature: 0.9, seed: 99n }, { temperature: 2, seed: 7n, choice: 3 }]) {
          const want = (await generate({}, { ...sampling, logprobs: 0 })).map(([token]) => token);
          expect(new Set(want).size).toBeGreaterThan(5);
          expect(await generate(options(), { ...sampling, logprobs: null })).toEqual(want.map((token) => [token, null]));
        }
      },
    );

    it('cuda program - drafts are kept as far as they are what one row a step samples', async () => {
      for (const sampling of [{}, { temperature: 0.9, seed: 4n, logprobs: null }, penalties]) {
        const plain = await generate({}, sampling);
        const want = plain.map(([token]) => token);
        for (const options of [cuda, { ...cuda, cut: twoRankCut }])
          expect(await onMesh(options, (mesh) => mesh.generateWithDrafts(prompt.slice(0, 30), sampling, want, 3))).toEqual(plain);
      }
    });

    it("cuda program - an epoch after another begins without its predecessor's keys", async () => {
      const want = await scores({}, 100, prompt.slice(0, 40));
      await onMesh({ ...cuda, cut: twoRankCut }, async (mesh) => {
        for (const epoch of [0, 1]) {
          if (epoch > 0) {
            // The last result is here a moment before the step has ended.
            await Promise.all(mesh.members.map(({ executor }) => executor.abort('a new epoch begins')));
            mesh.connect(true);
          }
          mesh.open(0);
          expect(await mesh.score(prompt.slice(0, 40), { blocks: [9, 3, 0] })).toEqual(want);
        }
      });
    });
  });

  describe('steps on the card before the result in front of them is read', () => {
    const alone = { logprobs: null };
    const warm = { ...alone, temperature: 0.9, seed: 5n };
    const last = (rows: number) => [{ row: rows - 1, score: null }];

    /**
     * Steps that are all submitted at once: sequences join, pause and end, their blocks and slots go to others, one needs the host's sampler, and rows take tokens of the
     * step before, of an earlier one, or from the host.
     */
    const script = (options: TinyMeshOptions) =>
      onMesh({ kvBlocks: 16, ...options }, async (mesh) => {
        const results: Promise<OutputResult[]>[] = [];
        const running = new Map<number, TinyRows & { after: number }>();
        const begin = (slot: number, sampling: Partial<SlotSampling>, length: number, blocks: number[]): TinyRows => {
          mesh.open(slot, sampling);
          running.set(slot, { slot, position: length, tokens: null, after: 0, blocks, outputs: last(1) });
          return { slot, position: 0, tokens: randomTokens(length, slot + length), blocks, outputs: last(length) };
        };
        const end = (slot: number): void => {
          mesh.close(slot);
          running.delete(slot);
        };
        const step = (slots: number[], prompts: TinyRows[] = []): void => {
          const decoding = slots.map((slot) => running.get(slot)!);
          const { step: number, done } = mesh.submit([...decoding.map((rows) => ({ ...rows })), ...prompts]);
          for (const rows of decoding) rows.position++;
          for (const { slot } of [...decoding, ...prompts]) running.get(slot)!.after = number;
          results.push(done);
        };
        const steps = (count: number, slots: number[]): void => {
          for (let i = 0; i < count; i++) step(slots);
        };
        step([], [begin(0, alone, 20, [7, 2, 9]), begin(1, warm, 7, [4, 0])]);
        steps(4, [0, 1]);
        step([0, 1], [begin(2, { ...warm, temperature: 2, choice: 1 }, 5, [12, 3])]);
        steps(2, [0, 1, 2]);
        step([1, 2]);
        steps(3, [0, 1, 2]); // of the first of these, slot 0 has its token from a step in front of the one in front
        end(0);
        step([1, 2], [begin(0, warm, 1, [9, 7])]); // on blocks of another, written a step ago
        steps(3, [0, 1, 2]);
        step([1, 2], [{ ...running.get(0)!, tokens: [5] }]); // a token that the host knows
        step([0, 1], [begin(3, {}, 2, [1, 10])]);
        steps(2, [0, 3]);
        end(3);
        steps(3, [2, 0, 1]);
        end(1);
        steps(3, [0, 2]);
        const found = await Promise.all(results);
        const facts = mesh.members.flatMap(({ executor }) => executor.graphs());
        return [found, facts.reduce((sum, { stepsBehind }) => sum + stepsBehind, 0)] as const;
      });

    it("cuda program - steps queued behind others give the reference's tokens, whatever they take them from", async () => {
      const [want] = await script({});
      expect(new Set(want.flat().map(({ token }) => token)).size).toBeGreaterThan(20);
      const [found, behind] = await script(cuda);
      expect(found).toEqual(want);
      expect(behind).toBeGreaterThan(10);
      const [ofRanks, behindOthers] = await script({ ...cuda, cut: twoRankCut });
      expect(ofRanks).toEqual(want);
      expect(behindOthers).toBe(0); // a token is the best of both ranks' candidates
    });

    it('cuda program - a step behind one that fails is not run, with the words of the CPU, and the next epoch knows nothing of it', async () => {
      const broken = tinyWeights();
      new Float32Array(broken.get('1.ffn_norm')!.blocks.buffer).fill(3e38);
      const failures = (options: TinyMeshOptions) =>
        onMesh({ weights: broken, ...options }, async (mesh) => {
          const messages: unknown[] = [];
          for (const epoch of [1, 2]) {
            if (epoch > 1) mesh.connect(false);
            mesh.open(0, alone);
            const steps = [mesh.submit([{ slot: 0, position: 0, tokens: [epoch], blocks: [0], outputs: last(1) }])];
            for (let position = 1; position < 4; position++)
              steps.push(
                mesh.submit([{ slot: 0, position, tokens: null, after: steps.at(-1)!.step, blocks: [0], outputs: last(1) }]),
              );
            for (const { done } of steps) messages.push(await done.catch((error: unknown) => (error as Error).message));
            await mesh.members[0]!.executor.abort('a new epoch begins');
          }
          return messages;
        });
      const messages = await failures(cuda);
      expect(messages[0]).toMatch(/^step 1, operation \d+ \(rms_norm\): its output 'n' is not finite$/);
      expect(messages[1]).toBe('step 2 was not run: step 1 failed before it');
      expect(messages.slice(4)).toEqual(messages.slice(0, 4));
      expect(messages).toEqual(await failures(cpu));
    });

    it('cuda program - a row that wants a token which no step has sampled fails its step with the words of the CPU', async () => {
      const failure = (options: TinyMeshOptions) =>
        onMesh(options, async (mesh) => {
          mesh.open(0, alone);
          const row = (position: number, tokens: number[] | null, after: number): TinyRows[] => [
            { slot: 0, position, tokens, after, blocks: [0], outputs: last(1) },
          ];
          const steps = [row(0, [1], 0), row(1, null, 1), row(2, null, 1)].map((rows) => mesh.submit(rows).done);
          const [one, two, three] = await Promise.allSettled(steps);
          return [one, two, three!.status === 'rejected' && (three!.reason as Error).message];
        });
      const found = await failure(cuda);
      expect(found[2]).toBe('step 3: row 0 wants the token that step 1 sampled for slot 0, but that step sampled none');
      expect(found).toEqual(await failure(cpu));
    });

    it('cuda program - an epoch that ends with steps on the card leaves nothing to the next', async () => {
      const want = await onMesh({}, (mesh) => mesh.generate(prompt.slice(0, 30), warm, 12));
      const found = await onMesh(cuda, async (mesh) => {
        const texts: unknown[] = [];
        for (const epoch of [1, 2, 3, 4]) {
          if (epoch > 1) mesh.connect(false);
          if (epoch % 2 === 0) {
            texts.push(await mesh.generate(prompt.slice(0, 30), warm, 12));
          } else {
            mesh.open(0, alone);
            const blocks = [4, 9, 14];
            const steps = [mesh.submit([{ slot: 0, position: 0, tokens: [epoch], blocks, outputs: last(1) }])];
            for (let position = 1; position < 20; position++)
              steps.push(mesh.submit([{ slot: 0, position, tokens: null, after: steps.at(-1)!.step, blocks, outputs: last(1) }]));
            await steps[epoch]!.done;
            await mesh.members[0]!.executor.abort('a new epoch begins');
            await expect(steps.at(-1)!.done).rejects.toMatchObject({ code: 'aborted' });
          }
          await mesh.members[0]!.executor.abort('a new epoch begins');
        }
        return texts;
      });
      expect(found).toEqual([want, want]);
    });
  });

  describe('graphs', () => {
    const sequences = 13;
    /** `counts.length` steps, of so many sequences each, one token a sequence; every sequence has a prompt of its own length. */
    const decode = (options: TinyMeshOptions, counts: readonly number[]) =>
      onMesh({ kvBlocks: 3 * sequences, ...options }, async (mesh) => {
        const blocks = (slot: number) => [slot, 2 * sequences - 1 - slot, 2 * sequences + slot];
        const lengths = Array.from({ length: sequences }, (_, slot) => 1 + ((slot * 5) % 20));
        for (let slot = 0; slot < sequences; slot++) mesh.open(slot, slot % 3 ? { logprobs: null, temperature: slot % 2 } : {});
        await mesh.run(
          lengths.map((length, slot) => ({
            slot,
            position: 0,
            tokens: randomTokens(length, slot + 1),
            blocks: blocks(slot),
            outputs: [],
          })),
        );
        const found: unknown[] = [];
        for (const count of counts) {
          const rows = Array.from({ length: count }, (_, slot): TinyRows => {
            const position = lengths[slot]!++;
            const outputs = [{ row: 0, score: null }];
            return { slot, position, tokens: randomTokens(1, position), blocks: blocks(slot), outputs };
          });
          found.push(await mesh.run(rows));
        }
        return [found, mesh.members.map(({ executor }) => executor.graphs())] as const;
      });
    const counts = [3, 13, 1, 8, 5, 2, 9, 3, 13];

    it.for([
      ['one worker', wholeCut, {}],
      ['two ranks', twoRankCut, {}],
      ['three uneven ranks by two stages, on q8 wires', threeRankTwoStageCut, { wire: 'q8' }],
      ['one worker whose steps are small', wholeCut, { stepTokensMax: 150 }],
      ['one worker, programmatic edges', wholeCut, { cudaTuning: programmaticEdges }],
      ['two ranks, programmatic edges', twoRankCut, { cudaTuning: programmaticEdges }],
      ['one worker, products alone in a launch', wholeCut, { cudaTuning: productsAlone }],
      ['two ranks, products alone in a launch', twoRankCut, { cudaTuning: productsAlone }],
    ] as const)(
      'cuda program - steps of any number of rows pad to those of a graph and keep their bits: %s',
      async ([, cut, options]) => {
        const [want] = await decode({ cut, ...options }, counts);
        const [found, graphs] = await decode({ ...cuda, cut, ...options }, counts);
        expect(found).toEqual(want);
        for (const of of graphs) {
          expect(of.map(({ rows }) => rows)).toEqual([1, 2, 4, 8, 12, 16, 24, 32, 48, 64]);
          expect(of.map(({ steps }) => steps)).toEqual([1, 1, 2, 2, 1, 2, 0, 0, 0, 0]);
          // Every node is a kernel.
          const early = 'cudaTuning' in options && withCuda.cudaFacts().card!.sm >= 90;
          for (const { nodes, programmaticEdges } of of) expect(programmaticEdges).toEqual(nodes.map((n) => (early ? n - 1 : 0)));
        }
      },
    );

    it('cuda program - a step is one graph on a worker alone, with five nodes a layer for 8 rows and fewer', async () => {
      const [, [graphs]] = await decode({ ...cuda }, [1]);
      const layers = 2;
      // Embed, of few rows the first norm, and of the tail: look at the rows, select them, norm, head, candidates, report.
      for (const { rows, nodes } of graphs!)
        expect(nodes, `${rows} rows`).toEqual([rows <= 8 ? 8 + 5 * layers : 7 + 17 * layers]);
    });

    it('cuda program - nine nodes a layer where launches of few rows do products alone', async () => {
      const [, [graphs]] = await decode({ ...cuda, cudaTuning: productsAlone }, [1]);
      const layers = 2;
      for (const { rows, nodes } of graphs!)
        expect(nodes, `${rows} rows`).toEqual([rows <= 8 ? 7 + 9 * layers : 7 + 17 * layers]);
    });

    it('cuda program - where output rows take several passes, the layers are a graph and the tail is not', async () => {
      const model = smallModel({
        architecture: 'llama',
        layers: 1,
        hidden: 64,
        heads: 2,
        kvHeads: 1,
        headSize: 32,
        feedForward: 96,
        vocabulary: 280_000, // logits of 14 rows are a pass
        window: null,
        types: { q: 'Q4_0', k: 'Q4_0', v: 'Q8_0', o: 'Q4_0', gate: 'Q4_0', up: 'Q4_0', down: 'Q4_0', embedding: 'Q4_0' },
      });
      const tokens = randomTokens(15, 5);
      const run = async (options: MeshOptions) => {
        const mesh = await TinyMesh.ofPrograms(model.programs(1, 1), (slice) => model.blocksOf(slice), options);
        try {
          mesh.open(0, { logprobs: null });
          const outputs = tokens.map((_, row) => ({ row, score: tokens[row + 1] ?? null }));
          const found = await mesh.run([{ slot: 0, position: 0, tokens, blocks: [1], outputs }]);
          return [found, mesh.members[0]!.executor.graphs()] as const;
        } finally {
          await mesh.stop();
        }
      };
      const [found, graphs] = await run(cuda);
      expect(found).toEqual((await run({ kind: 'cpu' }))[0]);
      // Of 16 rows the embedding and the layer only.
      expect(graphs.slice(4, 6)).toEqual([
        { rows: 12, nodes: [7 + 17], programmaticEdges: [0], steps: 0, stepsBehind: 0 },
        { rows: 16, nodes: [1 + 17], programmaticEdges: [0], steps: 1, stepsBehind: 0 },
      ]);
    });

    it('cuda program - between two exchanges a step is one graph', async () => {
      const [, [graphs]] = await decode({ ...cuda, cut: twoRankCut }, [1]);
      // embed; the first norm, q k v with rope, attention, o; gate up with the activation, down; the next layer without its norm, which is done where sums meet; the tail
      expect(graphs![0]!.nodes).toEqual([1, 4, 2, 3, 2, 6]);
    });
  });

  describe('failures', () => {
    const rows: TinyRows[] = [{ slot: 0, position: 0, tokens: [1, 2, 3], blocks: [0], outputs: [{ row: 2, score: null }] }];

    it('cuda program - a value that overflows fails the step with the words of the CPU', async () => {
      const broken = tinyWeights();
      new Float32Array(broken.get('1.ffn_norm')!.blocks.buffer).fill(3e38);
      const one: TinyRows[] = [{ ...rows[0]!, tokens: [1], outputs: [{ row: 0, score: null }] }]; // a step that is a graph
      for (const step of [rows, one]) {
        const failure = (options: TinyMeshOptions) =>
          onMesh({ weights: broken, ...options }, async (mesh) => {
            mesh.open(0);
            return mesh.run(step).catch((error: unknown) => (error as Error).message);
          });
        const message = await failure(cuda);
        expect(message).toMatch(/^step 1, operation \d+ \(rms_norm\): its output 'n' is not finite$/);
        expect(message).toBe(await failure({}));
      }
    });

    it('cuda program - a peer that is silent fails the step at its deadline, and the next epoch works', async () => {
      await onMesh({ ...cuda, cut: twoRankCut }, async (mesh) => {
        mesh.open(0);
        const { done } = mesh.submit(rows, 200, [mesh.members[0]!]);
        await expect(done).rejects.toMatchObject({ code: 'wait_timeout', peer: { stage: 0, rank: 1 } });
        await Promise.all(mesh.members.map(({ executor }) => executor.abort('a new epoch begins')));
        mesh.connect(false);
        mesh.open(0);
        expect(await mesh.run(rows)).toHaveLength(1);
      });
    });

    it('cuda executor - refuses what it has no kernel for, by name', async () => {
      const refused = (options: TinyMeshOptions) =>
        TinyMesh.start({ weights, ...cuda, ...options }).then(
          () => expect.unreachable(),
          (error: unknown) => (error as Error).message,
        );
      expect(await refused({ isa: 'avx2' })).toBe("executor kind 'cuda' has no isa; 'avx2' was asked for");
      const wide = smallModel({
        architecture: 'llama',
        layers: 1,
        hidden: 64,
        heads: 1,
        kvHeads: 1,
        headSize: 160,
        feedForward: 32,
        vocabulary: 64,
        window: null,
        types: typesOf('Q4_0'),
      });
      await expect(TinyMesh.ofPrograms(wide.programs(1), (slice) => wide.blocksOf(slice), cuda)).rejects.toThrow(
        "executor kind 'cuda': the head size is 160; supported: 32, 64, 96, 128, 256",
      );
    });
  });

  describe('real programs with generated weights', () => {
    const shapes: Record<string, SmallShape> = {
      'llama, Q4_K, Q5_K and Q6_K, heads of 64, tied head': kQuantShape,
      'qwen2 with biases, blocks of 32, a window of 70, a head of its own': qwen2Shape,
      'llama, heads of 128': {
        architecture: 'llama',
        layers: 2,
        hidden: 128,
        heads: 3,
        kvHeads: 3,
        headSize: 128,
        feedForward: 96,
        vocabulary: 2_100,
        window: null,
        types: { q: 'Q4_0', k: 'Q4_0', v: 'Q4_1', o: 'Q8_0', gate: 'Q4_0', up: 'Q4_0', down: 'Q4_1', embedding: 'Q4_0' },
      },
      'llama, BF16 throughout, heads of 256, K and V f16': {
        architecture: 'llama',
        layers: 2,
        hidden: 128,
        heads: 3,
        kvHeads: 1,
        headSize: 256,
        feedForward: 96,
        vocabulary: 2_100,
        window: null,
        kvType: 'f16',
        types: typesOf('BF16'),
      },
      'qwen2, int16 activations, heads of 96, K and V f16': {
        architecture: 'qwen2',
        layers: 2,
        hidden: 256,
        heads: 4,
        kvHeads: 2,
        headSize: 96,
        feedForward: 288,
        vocabulary: 2_100,
        window: null,
        activations: 'int16',
        kvType: 'f16',
        types: { q: 'Q6_K', k: 'Q8_0', v: 'Q4_1', o: 'Q5_0', gate: 'Q4_K', up: 'Q5_1', down: 'Q4_0', embedding: 'Q6_K' },
      },
      'llama, floats beside Q4_0 and Q8_0, a window of 70, K f16 and V int8': {
        architecture: 'llama',
        layers: 2,
        hidden: 128,
        heads: 4,
        kvHeads: 2,
        headSize: 64,
        feedForward: 96,
        vocabulary: 2_100,
        window: 70,
        kvType: 'f16-int8',
        types: {
          q: 'F16',
          k: 'Q8_0',
          v: 'F32',
          o: 'F16',
          gate: 'Q4_0',
          up: 'BF16',
          down: 'F32',
          embedding: 'F16',
          head: 'Q8_0',
        },
      },
    };

    /** A prompt over two spans of attention, in chunks, then four tokens one by one. */
    const text = async (model: ReturnType<typeof smallModel>, tp: number | number[], pp: number, options: MeshOptions) => {
      const mesh = await TinyMesh.ofPrograms(model.programs(tp, pp), (slice) => model.blocksOf(slice), options);
      try {
        mesh.open(0);
        const tokens = randomTokens(270, 3);
        const blocks = Array.from({ length: 18 }, (_, i) => (i * 7 + 5) % 18);
        const found: unknown[] = [];
        const step = async (position: number, ids: number[]) => {
          const [output] = await mesh.run([
            { slot: 0, position, tokens: ids, blocks, outputs: [{ row: ids.length - 1, score: null }] },
          ]);
          found.push(output!.token, output!.logprob, output!.top);
          return output!.token;
        };
        await step(0, tokens.slice(0, 200));
        let token = await step(200, tokens.slice(200));
        for (let i = 0; i < 4; i++) token = await step(270 + i, [token]);
        return found;
      } finally {
        await mesh.stop();
      }
    };

    it('cuda program - bits per kind: BF16 by tensor cores gives the same on any cut of cards, and is near what the reference gives', async () => {
      const shape = shapes['llama, BF16 throughout, heads of 256, K and V f16']!;
      const [exact, allowed] = [smallModel(shape), smallModel({ ...shape, bits: 'per-kind' })];
      const want = await text(exact, 1, 1, {});
      expect(await text(allowed, 1, 1, {})).toEqual(want); // the reference has one arithmetic
      const found = await text(allowed, 1, 1, cuda);
      expect(found).not.toEqual(want);
      expect(Math.abs((found[1] as number) - (want[1] as number))).toBeLessThan(0.02);
      expect(await text(allowed, [2, 1], 1, cuda)).toEqual(found);
      expect(await text(allowed, 1, 2, cuda)).toEqual(found);
    });

    it('cuda program - bits free: near what the reference gives, by cuBLASLt where it is here, else by own kernels', async () => {
      const shape = { ...shapes['llama, BF16 throughout, heads of 256, K and V f16']!, headSize: 64, hidden: 64 };
      const want = await text(smallModel(shape), 1, 1, {});
      const found = await text(smallModel({ ...shape, bits: 'free' }), 1, 1, cuda);
      expect(found).not.toEqual(want);
      expect(Math.abs((found[1] as number) - (want[1] as number))).toBeLessThan(0.02);
    });

    for (const [name, shape] of Object.entries(shapes))
      it(`cuda program - ${name}: the reference's bits on one rank, on several and a mixed pair of stages`, async () => {
        const model = smallModel(shape);
        const want = await text(model, 1, 1, {});
        expect(await text(model, 1, 1, cuda)).toEqual(want);
        const executorOf = (_: number, rank: number): RankExecutor => (rank === 1 ? cpu : cuda);
        expect(await text(model, [3, 2, 1], 1, { executorOf })).toEqual(want);
        expect(await text(model, 1, 2, { executorOf: (stage) => (stage === 0 ? cpu : cuda) })).toEqual(want);
      });
  });

  it('cuda program - the default model says what it says on the CPU, number for number', async ({ skip }) => {
    const path = await cachedModelPath('smollm2-135m-instruct-q4_1');
    if (path === null) skip('the default model is not in the cache');
    const ids = [504, 3575, 282, 4649, 314];
    const run = async (kind: 'cpu' | 'cuda') => {
      const model = await loadScoringModel(path!, kind, { addon: kind === 'cuda' ? withCuda : loadAddon() });
      try {
        return await model.generate(ids, 2);
      } finally {
        await model.close();
      }
    };
    const found = await run('cuda');
    expect(found).toEqual(await run('cpu'));
    expect(found.firstTop).toHaveLength(20);
  });
}
