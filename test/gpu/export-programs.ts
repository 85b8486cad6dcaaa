/**
 * Writes the models of exported-models.ts into a folder, a file each: `test` ones for program_test, `step` ones for gpu_bench.
 *
 *   node --import ./test/integration/helpers/typescript-loader.mjs test/gpu/export-programs.ts FOLDER
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { benchModels, exportModel, testModels } from './exported-models.ts';

const folder = process.argv[2];
if (folder === undefined) throw new Error('which folder?');
mkdirSync(folder, { recursive: true });
for (const model of [...testModels, ...benchModels]) writeFileSync(join(folder, `${model.name}.jsonl`), exportModel(model));
console.log(`${testModels.length + benchModels.length} models in ${folder}`);
