/** What can be wrong with a model file, one stable code each. */
export type ModelFileErrorCode =
  | 'unreadable'
  | 'bad_magic'
  | 'bad_version'
  | 'truncated'
  | 'count_too_large'
  | 'length_too_large'
  | 'bad_text'
  | 'bad_key'
  | 'duplicate_key'
  | 'bad_value_type'
  | 'bad_value'
  | 'missing_key'
  | 'bad_alignment'
  | 'duplicate_tensor'
  | 'bad_dimensions'
  | 'tensor_overflow'
  | 'unknown_tensor_type'
  | 'partial_block'
  | 'misaligned_tensor'
  | 'tensor_past_end'
  | 'tensor_out_of_order'
  | 'tensor_overlap'
  | 'bad_vocabulary'
  | 'unknown_architecture'
  | 'unsupported'
  | 'inconsistent'
  | 'missing_tensor'
  | 'unexpected_tensor'
  | 'bad_scale'
  | 'digest_mismatch'
  | 'bad_facts';

export interface ModelFileErrorDetails {
  /** Metadata key or tensor name. */
  key?: string;
  value?: string | number | bigint | boolean;
  limit?: string | number | bigint;
  cause?: unknown;
}

/** A model file that is broken, not supported, or not the one it should be. The message names key, value and limit. */
export class ModelFileError extends Error {
  readonly code: ModelFileErrorCode;
  readonly key: string | null;
  readonly value: string | number | bigint | boolean | null;
  readonly limit: string | number | bigint | null;

  constructor(code: ModelFileErrorCode, message: string, details: ModelFileErrorDetails = {}) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause });
    this.name = 'ModelFileError';
    this.code = code;
    this.key = details.key ?? null;
    this.value = details.value ?? null;
    this.limit = details.limit ?? null;
  }
}

/** A name or text from a file, made safe and short for a message. */
export const quoted = (text: string): string => JSON.stringify(text.length > 80 ? `${text.slice(0, 80)}…` : text);
