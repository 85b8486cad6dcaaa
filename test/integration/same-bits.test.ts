/** Cells of the same-bits matrix that touch every value of every dimension; `npm run test:matrix` runs all that is sensible. */
import { beforeAll, describe, expect, it } from 'vitest';
import { loadAddon } from '../../kernels/index.ts';
import { emulatedCli } from '../matrix/emulated-cli.ts';
import {
  companyName,
  MatrixMesh,
  plainShape,
  shapeName,
  type CellResult,
  type Company,
  type MeshShape,
} from '../matrix/same-bits.ts';

const cold: Company = { others: 0, cached: false };
const warm: Company = { others: 0, cached: true };
const coldAmong: Company = { others: 8, cached: false };
const warmAmong: Company = { others: 8, cached: true };

const meshes: { shape: MeshShape; companies: Company[] }[] = [
  { shape: { ...plainShape, isa: 'avx2' }, companies: [cold, warm] },
  { shape: { ...plainShape, tp: '2', link: 'shm' }, companies: [coldAmong, warmAmong] },
  { shape: { ...plainShape, tp: '3', prefillChunk: 64 }, companies: [cold, warm] },
  { shape: { ...plainShape, tp: '3:2:1', link: 'shm', prefillChunk: 129 }, companies: [cold] },
  { shape: { ...plainShape, tp: '5', prefillChunk: 129 }, companies: [cold, warm] },
  { shape: { ...plainShape, pp: '2', link: 'shm', prefillChunk: 7 }, companies: [coldAmong] },
  { shape: { ...plainShape, pp: '3', link: 'grpc' }, companies: [cold, warm] },
  { shape: { ...plainShape, tp: '2', pp: '2', link: 'shm', prefillChunk: 64 }, companies: [cold] },
  { shape: { ...plainShape, tp: '2', link: 'grpc', prefillChunk: 129 }, companies: [cold] },
  { shape: { ...plainShape, tp: '2', link: 'nats' }, companies: [cold, warm] },
  { shape: { ...plainShape, pp: '2', link: 'nats', prefillChunk: 64 }, companies: [cold] },
  { shape: { ...plainShape, isa: 'avx512' }, companies: [cold] },
  { shape: { ...plainShape, tp: '2', executor: 'reference' }, companies: [cold] },
];
const outputTokens = 12;

describe('same bits', () => {
  const { isas } = loadAddon().cpuFeatures();
  let want: CellResult;
  let wantScores: string;

  const runAll = async (shape: MeshShape, companies: Company[], cli?: string) => {
    const mesh = await MatrixMesh.start(shape, cli);
    try {
      const results: CellResult[] = [];
      for (const company of companies) results.push(await mesh.run(company, outputTokens));
      return { results, scores: await mesh.promptScores(companies[0]!.others) };
    } finally {
      await mesh.stop();
    }
  };

  beforeAll(async () => {
    const { results, scores } = await runAll(plainShape, [cold]);
    want = results[0]!;
    wantScores = scores;
    expect(new Set((JSON.parse(scores) as unknown[][])[1]).size).toBeGreaterThan(100);
  });

  for (const { shape, companies } of meshes) {
    const emulated = shape.isa === 'avx512' && !isas.includes('avx512');
    const names = companies.map(companyName).join(' and ');
    it(`same bits - ${shapeName(shape)}${emulated ? ', emulated' : ''}, ${names} equals one worker`, async () => {
      const { results, scores } = await runAll(shape, companies, emulated ? await emulatedCli() : undefined);
      for (const [index, { greedy, sampled, cachedTokens }] of results.entries()) {
        expect(greedy).toBe(want.greedy);
        expect(sampled).toBe(want.sampled);
        expect(cachedTokens > 0).toBe(companies[index]!.cached);
      }
      expect(scores).toBe(wantScores);
    });
  }
});
