/** Programs by architecture name. The only place that lists the architectures. */
import type { ModelFacts } from '../model-file/model-facts.ts';
import { ModelFileError } from '../model-file/model-file-error.ts';
import type { Architecture } from './architecture.ts';
import { buildDecoder, checkDecoder, decoderShape, type ProgramOptions } from './decoder.ts';
import { llama } from './llama.ts';
import type { Program } from './program.ts';
import { qwen2 } from './qwen2.ts';
import { modelUnits, type ModelCut, type ModelUnits } from './units.ts';

const architectures: ReadonlyMap<string, Architecture> = new Map([llama, qwen2].map((one) => [one.name, one]));

export const architectureNames: readonly string[] = [...architectures.keys()];

/** @throws {ModelFileError} `unknown_architecture` */
export function checkArchitecture(name: string): void {
  architectureNamed(name);
}

function architectureNamed(name: string): Architecture {
  const found = architectures.get(name);
  if (!found)
    throw new ModelFileError(
      'unknown_architecture',
      `key general.architecture is ${name}; supported are ${architectureNames.join(', ')}`,
      { key: 'general.architecture', value: name, limit: architectureNames.join(', ') },
    );
  return found;
}

/**
 * Checks that the model can be run: known architecture, tensors as its hyper-parameters say.
 * @throws {ModelFileError} `unknown_architecture`, `inconsistent`, `missing_tensor`, `unexpected_tensor`, `unsupported`
 */
export function checkModel(facts: ModelFacts): void {
  checkDecoder(facts, architectureNamed(facts.architecture).traits);
}

/** Units of a model, for planning a cut. @throws {CutError} `bad_shape`, {ModelFileError} */
export function unitsOfModel(facts: ModelFacts): ModelUnits {
  architectureNamed(facts.architecture);
  return modelUnits(decoderShape(facts));
}

/**
 * The program of one rank of one stage.
 * @param cut a `ModelCut`, or the `stages` of a placement
 * @throws {ModelFileError} as `checkModel`; {CutError} `bad_cut`: the cut does not cover the model
 */
export function buildProgram(facts: ModelFacts, cut: ModelCut, options: ProgramOptions): Program {
  const { traits } = architectureNamed(facts.architecture);
  checkDecoder(facts, traits);
  return buildDecoder(facts, traits, cut, options);
}

export { vectorsSent, type KvType, type ProgramOptions } from './decoder.ts';
export { cutModel, CutError, type CutShares, type ModelCut, type ModelUnits, type RankUnits, type StageCut } from './units.ts';
