/** Cells of the same-bits matrix that touch every value of every dimension; `npm run test:matrix` runs all that is sensible. */
import { beforeAll, describe, expect, it } from 'vitest';
import { loadAddon } from '../../kernels/index.ts';
import { emulatedCli } from '../matrix/emulated-cli.ts';
import {
  companyName,
  MatrixMesh,
  plainShape,
  shapeName,
  type Asked,
  type CellResult,
  type Company,
  type MeshShape,
  type PromptName,
} from '../matrix/same-bits.ts';

const cold: Company = { others: 0, cached: false };
const warm: Company = { others: 0, cached: true };
const coldAmong: Company = { others: 8, cached: false };
const warmAmong: Company = { others: 8, cached: true };

interface MeshCells {
  shape: MeshShape;
  companies: Company[];
  prompt?: PromptName;
}

const meshes: MeshCells[] = [
  { shape: { ...plainShape, isa: 'avx2' }, companies: [cold, warm] },
  { shape: { ...plainShape, tp: '2', link: 'shm' }, companies: [coldAmong, warmAmong] },
  { shape: { ...plainShape, tp: '3', prefillChunk: 64 }, companies: [cold, warm] },
  { shape: { ...plainShape, tp: '3:2:1', link: 'shm', prefillChunk: 129 }, companies: [cold] },
  { shape: { ...plainShape, tp: '5', prefillChunk: 129 }, companies: [cold, warm] },
  { shape: { ...plainShape, pp: '2', link: 'shm', prefillChunk: 7 }, companies: [coldAmong] },
  { shape: { ...plainShape, pp: '3', link: 'grpc' }, companies: [cold, warm] },
  { shape: { ...plainShape, tp: '2', pp: '2', link: 'shm', prefillChunk: 64 }, companies: [cold] },
  { shape: { ...plainShape, tp: '2', link: 'grpc', prefillChunk: 129 }, companies: [cold] },
  { shape: { ...plainShape, tp: '3', pp: '2', link: 'tcp', prefillChunk: 64 }, companies: [coldAmong] },
  { shape: { ...plainShape, tp: '2', link: 'nats' }, companies: [cold, warm] },
  { shape: { ...plainShape, pp: '2', link: 'nats', prefillChunk: 64 }, companies: [cold] },
  { shape: { ...plainShape, isa: 'amx' }, companies: [cold], prompt: 'short' },
  { shape: { ...plainShape, tp: '2', executor: 'reference' }, companies: [cold, warm], prompt: 'short' },
];
const outputTokens = 12;

describe('same bits', () => {
  const { isas } = loadAddon().cpuFeatures();
  const want = new Map<PromptName, { cell: CellResult; scores: string }>();

  const runAll = async ({ shape, companies }: MeshCells, asked: Asked, main?: string) => {
    const mesh = await MatrixMesh.start(shape, main);
    try {
      const cells: CellResult[] = [];
      for (const company of companies) cells.push(await mesh.run(company, asked));
      return { cells, scores: await mesh.promptScores(companies[0]!.others, asked) };
    } finally {
      await mesh.stop();
    }
  };

  beforeAll(async () => {
    for (const prompt of ['long', 'short'] as const) {
      const { cells, scores } = await runAll({ shape: plainShape, companies: [cold] }, { outputTokens, prompt });
      want.set(prompt, { cell: cells[0]!, scores });
      expect(cells[0]!.unreported.length).toBeGreaterThan(20);
      expect(new Set((JSON.parse(scores) as unknown[][])[1]).size).toBeGreaterThan(prompt === 'long' ? 100 : 20);
    }
  });

  for (const mesh of meshes) {
    const { shape, companies, prompt = 'long' } = mesh;
    const emulated = shape.isa === 'amx' && !isas.includes('amx');
    const names = companies.map(companyName).join(' and ');
    it(`same bits - ${shapeName(shape)}${emulated ? ', emulated' : ''}, ${names} equals one worker`, async () => {
      const { cells, scores } = await runAll(
        mesh,
        { outputTokens, prompt },
        emulated ? await emulatedCli('shardmesh_emulated') : undefined,
      );
      const { cell, scores: wantScores } = want.get(prompt)!;
      for (const [index, { greedy, sampled, unreported, cachedTokens }] of cells.entries()) {
        expect(greedy).toBe(cell.greedy);
        expect(sampled).toBe(cell.sampled);
        expect(unreported).toBe(cell.unreported);
        expect(cachedTokens > 0).toBe(companies[index]!.cached);
      }
      expect(scores).toBe(wantScores);
    });
  }
});
