"""A transformers Llama, the same model patched, and this runtime with the same weights: time of prefill and of a token.

python -m benchmarks.transformers_patch [--device cuda] [--rounds 7] [--tokens 32] [--prompt-tokens 400] [--output FILE]

Random weights, 103M parameters on a CPU and 1.1B on a GPU. transformers' models run in a minimal greedy loop with a
DynamicCache. All take turns, a round each. Also timed: a patched layer's check that its weights have not changed.
"""

from __future__ import annotations

import argparse
import statistics
import timeit
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers

import fastllama
from benchmarks.cpu.decode import time_forward, time_ours
from fastllama.bench.environment import environment
from fastllama.bench.files import output_file, write_record
from fastllama.bench.timing import Generation
from fastllama.layers.loading import load_weights

COMMON: dict[str, Any] = {"max_position_embeddings": 2048, "eos_token_id": None, "pad_token_id": 0}
SIZES: dict[str, dict[str, Any]] = {
    "toy": {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "103m": {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
    | {"num_attention_heads": 16, "num_key_value_heads": 8},
    "1.1b": fastllama.LlamaConfig.preset("tinyllama-1.1b").to_hf(),
}
NAMES = "transformers", "patched", "fastllama.LLM"


def build(size: str, device: str, dtype: torch.dtype) -> tuple[Any, Any, fastllama.LLM]:
    """Returns one random Llama three times: stock, patched, and in this runtime without quantization."""
    config = SIZES[size] | COMMON
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        with torch.device(device):
            models.append(transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(**config), dtype=dtype))
    stock, patched = (model.eval() for model in models)
    print(fastllama.patch(patched, strict=True))
    ours = fastllama.LlamaForCausalLM(fastllama.LlamaConfig.from_hf(stock.config.to_dict()), dtype, device)
    load_weights(ours, stock.state_dict().items())
    return stock, patched, fastllama.LLM(ours, max_model_len=2048, kv_cache_tokens=2048, quantization=None)


def noticing(model: Any) -> float:
    """Returns the least seconds of a patched layer's check that its weights have not changed."""
    layer = model.model.layers[0]
    calls = 2000
    return min(timeit.repeat(lambda: layer._fastllama.holds(layer), number=calls, repeat=9)) / calls


def main() -> None:
    """Take the measurements, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, help="default: 103m on a CPU, 1.1b on a GPU")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=400)
    parser.add_argument("--output", type=output_file, help="where to write conditions and raw samples as JSON")
    options = parser.parse_args()
    size = options.size or {"cpu": "103m", "cuda": "1.1b"}[options.device]
    stock, patched, llm = build(size, options.device, getattr(torch, options.dtype))
    takes = {"tokens": options.tokens}
    runs: dict[str, Callable[[list[int]], Generation]] = {
        NAMES[0]: partial(time_forward, stock, **takes),
        NAMES[1]: partial(time_forward, patched, **takes),
        NAMES[2]: partial(time_ours, llm, **takes),
    }
    generator = torch.Generator().manual_seed(0)
    samples: dict[str, list[Generation]] = {name: [] for name in runs}
    for number in range(options.rounds + 1):
        for name, run in runs.items():
            prompt = torch.randint(3, SIZES[size]["vocab_size"], (options.prompt_tokens,), generator=generator)
            timing = run(prompt.tolist())  # new each time: no prefix cache hits
            if number:  # the first is the warm-up
                samples[name].append(timing)
    seconds = noticing(patched)
    print_table(samples, options.tokens)
    print(f"noticing a change: {seconds * 1e6:.2f} us a layer")
    if options.output:
        record = {
            "benchmark": "transformers_patch",
            "model": f"{sum(p.numel() for p in stock.parameters()) / 1e6:.0f}M random weights",
            "conditions": {key: value for key, value in vars(options).items() if key != "output"} | {"size": size},
            "environment": environment() | {"transformers": transformers.__version__},
            "seconds_to_notice": seconds,
            "samples": samples,
        }
        write_record(options.output, record)


def print_table(samples: dict[str, list[Generation]], tokens: int) -> None:
    """Print medians, minima, and the speedup of the medians over transformers."""
    print(f"{'':16}{'ms a token':>12}{'least':>9}{'times':>8}{'ms a prompt':>14}{'least':>9}{'times':>8}")
    decode = {name: [1e3 * each["decode"] / (tokens - 1) for each in taken] for name, taken in samples.items()}
    prefill = {name: [1e3 * each["prefill"] for each in taken] for name, taken in samples.items()}
    for name in samples:
        cells = ""
        for times, width in ((decode, 12), (prefill, 14)):
            middle, stock = statistics.median(times[name]), statistics.median(times[NAMES[0]])
            cells += f"{middle:{width}.2f}{min(times[name]):9.2f}{stock / middle:8.2f}"
        print(f"{name:16}{cells}")


if __name__ == "__main__":
    main()
