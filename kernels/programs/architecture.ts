import type { DecoderTraits } from './decoder.ts';

/** A model architecture: the name its files carry (`general.architecture`), and what is its own about the decoder. */
export interface Architecture {
  name: string;
  traits: DecoderTraits;
}
