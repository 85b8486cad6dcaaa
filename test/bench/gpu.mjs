/**
 * `npm run bench:gpu`: builds test/gpu and measures this machine's card: kernels and decode steps beside the card's ceilings, PyTorch where it is installed. Keeps the
 * figures in kernels/cuda/measured and writes kernels/cuda/MEASURED.md from them. Without a card it says so and changes nothing.
 */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { buildCuda, cardFolder } from '../../deploy/setup/build-cuda.mjs';
import { exportModel, testModels } from '../gpu/exported-models.ts';
import { cudaReadme, memoryTable } from '../gpu/memory-table.ts';
import { buildKernelTarget } from '../kernels/build-target.ts';
import { measuredFolder, measuredPage, readMeasurements, renderPage } from './gpu-measured.ts';

const { values } = parseArgs({
  options: {
    emulated: { type: 'boolean' },
    memory: { type: 'boolean' },
    from: { type: 'string' },
    rivals: { type: 'string' },
    help: { type: 'boolean' },
  },
});
if (values.help) {
  console.log(`npm run bench:gpu -- [options]

  (none)              measures this machine's card
  --from FILE         takes the bench.json that card/run.sh left on another machine;  --rivals FILE: its rivals.json
  --memory            writes the memory table of kernels/cuda/README.md; needs no card
  --emulated          the same program on the emulated machine, tiny shapes: shows that it runs, measures nothing

Example: npm run bench:gpu -- --from results/bench.json`);
  process.exit(0);
}

const run = (command, args) => spawnSync(command, args, { stdio: 'inherit' }).status ?? 1;
const parse = (file) => JSON.parse(readFileSync(file, 'utf8'));

function keep(benchFile, rivalsFile) {
  const report = parse(benchFile);
  if (report.card.emulated) throw new Error(`${benchFile} is of the emulated machine`);
  if (rivalsFile && existsSync(rivalsFile)) report.rivals = parse(rivalsFile);
  mkdirSync(measuredFolder, { recursive: true });
  const name = report.card.name.toLowerCase().replace(/[^a-z0-9]+/g, '-');
  writeFileSync(join(measuredFolder, `${name}.json`), `${JSON.stringify(report, null, 1)}\n`);
  writeFileSync(measuredPage, renderPage(readMeasurements(), report.floors));
  console.log(`written: ${fileURLToPath(new URL(`file://${measuredPage}`))}`);
}

if (values.from) {
  keep(values.from, values.rivals);
} else if (values.memory) {
  const table = await memoryTable(await buildKernelTarget('gpu_bench'));
  const page = readFileSync(cudaReadme, 'utf8');
  writeFileSync(
    cudaReadme,
    page.replace(/(<!-- memory -->\n)[^]*(<!-- \/memory -->)/, (_, begin, end) => `${begin}${table}${end}`),
  );
} else if (values.emulated) {
  const folder = mkdtempSync(join(tmpdir(), 'shardmesh-bench-'));
  const model = join(folder, 'model.jsonl');
  writeFileSync(model, exportModel(testModels[0]));
  process.exitCode = run(await buildKernelTarget('gpu_bench'), ['--tries', '1', '--tiny', model]);
  rmSync(folder, { recursive: true });
} else {
  await buildCuda();
  const results = join(cardFolder, 'results');
  rmSync(results, { recursive: true, force: true });
  process.exitCode = run('sh', [join(cardFolder, 'run.sh'), '--bench', results]);
  if (existsSync(join(results, 'bench.json'))) keep(join(results, 'bench.json'), join(results, 'rivals.json'));
}
