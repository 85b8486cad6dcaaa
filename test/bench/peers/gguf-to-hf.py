"""Writes a GGUF file as the folder that vLLM loads: config.json, tokenizer, and its weights dequantised into bf16 (model.safetensors).

    python gguf-to-hf.py MODEL.gguf FOLDER

Every weight is that of the file, rounded once to bf16: d * q + m has more bits than bf16 keeps. Names, the order of rows in q and k, and the tokenizer are put
back by `transformers`, which reads GGUF by the packages `gguf` and `accelerate`.
"""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main(source: str, target: str) -> None:
    folder, name = os.path.split(os.path.abspath(source))
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
