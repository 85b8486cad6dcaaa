import { resolveModel } from '../../kernels/model-file/download.ts';
import { ShardmeshError } from '../../protocol/errors.ts';

/**
 * Path of a model given by path or by its name in the catalogue; one that is not there yet is fetched, with progress on stderr.
 * @throws {ShardmeshError} `config_invalid`: neither a file nor in the catalogue, or no source had it
 */
export async function findModel(nameOrPath: string): Promise<string> {
  const live = process.stderr.isTTY === true;
  try {
    const { path, source } = await resolveModel(nameOrPath, {
      onNote: (note) => process.stderr.write(`shardmesh: ${note}\n`),
      onProgress: ({ source: from, bytesDone, bytesTotal }) => {
        if (live) process.stderr.write(`\r\x1b[K${nameOrPath} from ${from}: ${Math.floor((100 * bytesDone) / bytesTotal)} %`);
      },
    });
    if (live && source !== 'cache' && source !== 'path') process.stderr.write('\n');
    return path;
  } catch (error) {
    throw new ShardmeshError('config_invalid', `--model ${nameOrPath}: ${(error as Error).message}`, { cause: error });
  }
}
