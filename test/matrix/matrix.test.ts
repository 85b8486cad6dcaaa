/** The whole same-bits matrix: every cut with every link, chunk size, company and cache state, and every cut on every executor. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { loadAddon } from '../../kernels/index.ts';
import { emulatedCli } from './emulated-cli.ts';
import {
  companyName,
  MatrixMesh,
  plainShape,
  shapeName,
  type Asked,
  type CellResult,
  type Company,
  type MeshShape,
} from './same-bits.ts';

const asked: Asked = { outputTokens: 24, prompt: 'long' };
const { isas } = loadAddon().cpuFeatures();
const everyCompany: Company[] = [0, 8].flatMap((others) => [false, true].map((cached) => ({ others, cached })));
const alone = everyCompany.slice(0, 2);

/** Chunks are cut before a link is met: every size goes over shared memory, each other link has its own. */
const chunksOf = { auto: [256, 7, 64, 129], shm: [256, 7, 64, 129], tcp: [64, 129], grpc: [7, 129], nats: [64] };

interface MeshCells {
  shape: MeshShape;
  companies: Company[];
}

/** All combinations but those that say the same twice: a single worker has no link, and slow executors run each cut alone. */
function allMeshes(): MeshCells[] {
  const meshes: MeshCells[] = [];
  for (const tp of ['1', '2', '3', '3:2:1', '5'])
    for (const pp of ['1', '2', '3']) {
      const cut = { ...plainShape, tp, pp };
      for (const link of tp === '1' && pp === '1' ? (['auto'] as const) : (['shm', 'tcp', 'grpc', 'nats'] as const))
        for (const prefillChunk of chunksOf[link])
          meshes.push({ shape: { ...cut, link, prefillChunk }, companies: everyCompany });
      for (const isa of ['amx', 'avx512'] as const) meshes.push({ shape: { ...cut, isa }, companies: alone });
      if (isas.includes('avx512')) meshes.push({ shape: { ...cut, isa: 'avx2' }, companies: alone });
      meshes.push({ shape: { ...cut, isa: 'portable' }, companies: alone });
      meshes.push({ shape: { ...cut, executor: 'reference' }, companies: alone });
    }
  return meshes;
}

describe('same bits, whole matrix', () => {
  let want: CellResult;
  let wantScores: string;

  beforeAll(async () => {
    const mesh = await MatrixMesh.start(plainShape);
    want = await mesh.run({ others: 0, cached: false }, asked);
    wantScores = await mesh.promptScores(0, asked);
    await mesh.stop();
    expect(new Set((JSON.parse(wantScores) as unknown[][])[1]).size).toBeGreaterThan(100);
  });

  for (const { shape, companies } of allMeshes()) {
    const emulated = (shape.isa === 'avx512' || shape.isa === 'amx') && !isas.includes(shape.isa);
    describe(`${shapeName(shape)}${emulated ? ', emulated' : ''}`, () => {
      let mesh: MatrixMesh;
      beforeAll(async () => {
        mesh = await MatrixMesh.start(shape, emulated ? await emulatedCli('shardmesh_emulated') : undefined);
      });
      afterAll(() => mesh.stop());

      for (const company of companies)
        it(`same bits - ${companyName(company)}`, async () => {
          const { greedy, sampled, unreported, cachedTokens } = await mesh.run(company, asked);
          expect(greedy).toBe(want.greedy);
          expect(sampled).toBe(want.sampled);
          expect(unreported).toBe(want.unreported);
          expect(cachedTokens > 0).toBe(company.cached);
        });
      it('same bits - scores of the prompt', async () => {
        expect(await mesh.promptScores(companies.at(-1)!.others, asked)).toBe(wantScores);
      });
    });
  }
});
