/** The real model files of the reference figures, where this machine has them. */
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { createTextModel } from '../../../../coordinator/text/text-model.ts';
import type { LoadedTextModel } from '../../../../coordinator/text/text-model.ts';
import type { ChatMessage } from '../../../../coordinator/text/text-types.ts';
import { defaultCacheDirectory } from '../../../../kernels/model-file/cache-directory.ts';
import { findModel } from '../../../../kernels/model-file/catalogue.ts';
import { readGguf } from '../../../../kernels/model-file/gguf-reader.ts';

export interface ReferenceFigures {
  tokenize: { text: string; ids: number[] }[];
  chat: { messages: ChatMessage[]; prompt: string; ids: number[]; greedy: number[]; greedy_text: string }[];
}

export function readReference(name: string): ReferenceFigures {
  const file = new URL(`../../../fixtures/reference-${name}.json`, import.meta.url);
  return JSON.parse(readFileSync(file, 'utf8')) as ReferenceFigures;
}

/** Path of a model file in the cache; null where it was never fetched. */
export function findModelFile(name: string): string | null {
  const path = join(defaultCacheDirectory(), 'models', findModel(name)?.file ?? '');
  return existsSync(path) ? path : null;
}

export function loadTextModel(path: string): LoadedTextModel {
  return createTextModel(readGguf(path));
}
