/** `shardmesh models`: what can be served by name, and what is in a model file. */
import { Command } from 'commander';
import { fileSha256 } from '../../kernels/model-file/file-digest.ts';
import { catalogue } from '../../kernels/model-file/catalogue.ts';
import { cachedModel } from '../../kernels/model-file/download.ts';
import { openModel } from '../../kernels/model-file/model-file.ts';
import { unitsOfModel } from '../../kernels/programs/index.ts';
import { ShardmeshError } from '../../protocol/errors.ts';
import { findModel } from './find-model.ts';

const mebibytes = (bytes: number): string => `${(bytes / 1024 ** 2).toFixed(1)} MiB`;
const print = (line: string): void => void process.stdout.write(`${line}\n`);

export function modelsCommand(): Command {
  const command = new Command('models')
    .description('Models that can be served by name, and what is in a model file.')
    .addHelpText(
      'after',
      '\nExamples:\n  shardmesh models list\n  shardmesh models pull smollm2-135m-instruct-q4_1\n  shardmesh models inspect model.gguf\n',
    );
  command.command('list').description('the catalogue, and which of it is in the cache').action(list);
  command
    .command('pull <name>')
    .description('fetches a model of the catalogue into the cache')
    .action(async (name: string) => print(await findModel(name)));
  command.command('inspect <name|path>').description('shape, tensors and units of a model').action(inspect);
  command.command('verify <name|path>').description('reads the whole file: sha256, structure').action(verify);
  return command;
}

async function list(): Promise<void> {
  for (const entry of catalogue) {
    const cached = await cachedModel(entry);
    print(
      `${entry.name.padEnd(44)} ${mebibytes(entry.bytes).padStart(10)}  ${entry.licence.padEnd(11)} ${cached ? 'in the cache' : 'not fetched'}  ${entry.title}`,
    );
  }
}

async function inspect(nameOrPath: string): Promise<void> {
  const path = await findModel(nameOrPath);
  const { facts } = await openModel(path);
  const units = unitsOfModel(facts);
  const types = new Map<string, { tensors: number; bytes: number }>();
  for (const tensor of facts.tensors) {
    const sum = types.get(tensor.type) ?? { tensors: 0, bytes: 0 };
    types.set(tensor.type, { tensors: sum.tensors + 1, bytes: sum.bytes + tensor.bytes });
  }
  print(`name            ${facts.name}`);
  print(`architecture    ${facts.architecture}`);
  print(`layers          ${facts.layers}`);
  print(`hidden size     ${facts.hiddenSize}`);
  print(`heads           ${units.attention.heads} query, ${units.attention.kvHeads} key/value, size ${facts.headSize}`);
  print(`feed-forward    ${facts.feedForwardSize}`);
  print(`vocabulary      ${facts.vocabularySize}`);
  print(`context         ${facts.contextTokensMax} tokens`);
  print(
    `units           attention ${units.attention.units}, feed-forward ${units.feedForward.units}, vocabulary ${units.vocabulary.units}`,
  );
  print(
    `largest --tp    ${Math.min(units.attention.units, units.feedForward.units, units.vocabulary.units)}, largest --pp ${facts.layers}`,
  );
  for (const [type, { tensors, bytes }] of types) print(`${type.padEnd(15)} ${tensors} tensors, ${mebibytes(bytes)}`);
  print(`sha256          ${facts.sourceSha256}`);
}

async function verify(nameOrPath: string): Promise<void> {
  const path = await findModel(nameOrPath);
  const sha256 = await fileSha256(path);
  const { facts } = await openModel(path);
  const entry = catalogue.find((one) => one.name === nameOrPath);
  if (entry && entry.sha256 !== sha256)
    throw new ShardmeshError('digest_mismatch', `${path} has sha256 ${sha256}, the catalogue says ${entry.sha256}`);
  print(`${path}: ${facts.tensors.length} tensors, sha256 ${sha256}${entry ? ', as in the catalogue' : ''}`);
}
