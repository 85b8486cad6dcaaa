/** Opens a model file for serving: header, digest and facts, all checked. */
import { defaultCacheDirectory } from './cache-directory.ts';
import { rememberedSha256 } from './file-digest.ts';
import { readGguf, type GgufFile } from './gguf-reader.ts';
import { readModelFacts, type ModelFacts } from './model-facts.ts';
import { checkModel } from '../programs/index.ts';

export interface OpenModel {
  path: string;
  /** Header: metadata for the tokenizer and the template. */
  file: GgufFile;
  facts: ModelFacts;
}

export interface OpenModelOptions {
  cacheDirectory?: string;
  /** Bytes hashed; not called when the digest is remembered from an earlier start. */
  onHash?: (bytesDone: number) => void;
}

/** @throws {ModelFileError} the file is broken or its model is not supported */
export async function openModel(path: string, options: OpenModelOptions = {}): Promise<OpenModel> {
  const file = readGguf(path);
  // Facts without a digest first: a file that cannot be served is not hashed.
  const unhashed = readModelFacts(file, '');
  checkModel(unhashed);
  const sourceSha256 = await rememberedSha256(path, options.cacheDirectory ?? defaultCacheDirectory(), options.onHash);
  return { path, file, facts: { ...unhashed, sourceSha256 } };
}
