"""Run a transformers Llama on fastllama's ops: load it as usual, then patch it in one line.

python examples/patch_transformers.py [MODEL] [--device cuda] [--dtype bfloat16]

MODEL is a Hugging Face id or folder of model_type llama; without one, the bundled model.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastllama
from fastllama.io.hub import resolve_model

PROMPT = "Once upon a time"


def answer(model: Any, tokenizer: Any, tokens: int) -> tuple[str, float]:
    """Generate greedily; returns the text and tokens/s."""
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    model.generate(**inputs, max_new_tokens=2, do_sample=False)  # the first call compiles
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    seconds = time.perf_counter() - start
    return tokenizer.decode(output[0], skip_special_tokens=True), tokens / seconds


def main() -> None:
    """Generate before and after the patch, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(resolve_model("tiny")))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model = model.to(options.device).eval()

    text, rate = answer(model, tokenizer, options.tokens)
    print(f"transformers: {rate:.1f} tokens/s\n{text}\n")

    print(fastllama.patch(model))  # the one line; it returns a report of the layers that now run on fastllama's ops

    patched_text, patched_rate = answer(model, tokenizer, options.tokens)
    print(f"patched: {patched_rate:.1f} tokens/s, the {'same' if patched_text == text else 'another'} text")

    fastllama.unpatch(model)  # and back


if __name__ == "__main__":
    main()
