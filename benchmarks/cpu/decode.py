"""Greedy decoding of a 1.1B Llama with random weights at batch 1 on this CPU, compared with peers in the same run.

python -m benchmarks.cpu.decode [--rounds 3] [--tokens 32] [--prompt-tokens 128] [--dtype bfloat16] [--output FILE]

This project, transformers and, where the extra [llama] is installed, llama.cpp hold the same weights (each quantizes
with its own quantizer) and take turns, a round each, so that drifting machine speed affects all. Decode time is from
the first token to the last; transformers is timed twice, through `generate` and through its forward pass with a cache,
and the ratio is to the faster of the two. The floor is the time to read the weights at the read bandwidth measured in
every round: no decoder that reads all weights for each token can be faster.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.cpu import llama_cpp
from fastllama import LLM, LlamaConfig, LlamaForCausalLM, SamplingParams
from fastllama.bench.environment import environment
from fastllama.bench.files import output_file, write_record
from fastllama.bench.models import read_bytes
from fastllama.bench.timing import Generation
from fastllama.layers.loading import load_weights

# This project's quantization, and the llama.cpp format with about the same loss.
QUANTIZATIONS = {"bf12": "BF16", None: "BF16", "int8": "Q8_0", "int4": "Q4_0"}


def build(dtype: torch.dtype, config: dict[str, Any]) -> tuple[dict[str, LLM], transformers.LlamaForCausalLM]:
    """One random Llama of a Hugging Face configuration: this project's models by format, and transformers' in bf16."""
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(**config), dtype=dtype).eval()
    llms = {}
    for quantization in QUANTIZATIONS if dtype == torch.bfloat16 else (None,):
        ours = LlamaForCausalLM(LlamaConfig.from_hf(config), dtype)
        load_weights(ours, theirs.state_dict().items())
        llms[_name(quantization)] = LLM(ours, max_model_len=1024, kv_cache_tokens=1024, quantization=quantization)
    return llms, theirs


def _name(quantization: str | None) -> str:
    return " ".join(filter(None, ("fastllama", quantization)))


def time_ours(llm: LLM, prompt: list[int], tokens: int) -> Generation:
    """Time LLM.generate; RequestMetrics holds the time of the first token."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    start = time.monotonic()
    metrics = llm.generate(prompt, params)[0].metrics
    assert metrics.first_token_time is not None
    assert metrics.finish_time is not None
    return {"prefill": metrics.first_token_time - start, "decode": metrics.finish_time - metrics.first_token_time}


def load_llama_cpp(model: transformers.LlamaForCausalLM, prompt_tokens: int) -> dict[str, llama_cpp.Decoder]:
    """Load llama.cpp with the same weights, by name and format."""
    with tempfile.TemporaryDirectory() as folder:
        files = llama_cpp.write_files(model, Path(folder))
        return {f"llama.cpp {name}": llama_cpp.Decoder(file, prompt_tokens) for name, file in files.items()}


def time_llama_cpp(decoder: llama_cpp.Decoder, prompt: list[int], tokens: int) -> Generation:
    """Time llama.cpp's library in a minimal greedy loop."""
    return decoder.generate(prompt, tokens)[1]


class _Clock:
    """A streamer for transformers that records the time of each token; its first call is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.monotonic())

    def end(self) -> None:
        """Does nothing: no token is buffered."""


@torch.inference_mode()
def time_generate(model: transformers.LlamaForCausalLM, prompt: list[int], tokens: int) -> Generation:
    """Time transformers' generate."""
    clock, ids = _Clock(), torch.tensor([prompt])
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    start = time.monotonic()
    model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **options)
    return {"prefill": clock.times[1] - start, "decode": clock.times[-1] - clock.times[1]}


@torch.inference_mode()
def time_forward(model: transformers.LlamaForCausalLM, prompt: list[int], tokens: int) -> Generation:
    """Time transformers' forward pass in a minimal greedy loop."""
    cache, ids, times = transformers.DynamicCache(), torch.tensor([prompt], device=model.device), []
    start = time.monotonic()
    for _ in range(tokens):
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        ids.tolist()  # as `generate` does; it also waits for a GPU
        times.append(time.monotonic())
    return {"prefill": times[0] - start, "decode": times[-1] - times[0]}


def read_bandwidth(memory: torch.Tensor) -> float:
    """Returns the bytes per second that all threads together read from memory: the best of three sums."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        memory.sum()
        seconds.append(time.perf_counter() - start)
    return memory.nbytes / min(seconds)


def main() -> None:
    """Take the measurements, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--layers", type=int, help="fewer layers, for a quick look")
    parser.add_argument("--output", type=output_file, help="where to write conditions and raw samples as JSON")
    options = parser.parse_args()
    config = LlamaConfig.preset("tinyllama-1.1b").to_hf()
    if options.layers is not None:
        config["num_hidden_layers"] = options.layers
    llms, theirs = build(getattr(torch, options.dtype), config)
    absent = llama_cpp.missing() if options.dtype == "bfloat16" else "compared in bfloat16 only"
    runs: dict[str, Callable[[list[int]], Generation]] = {
        **{name: partial(time_ours, llm, tokens=options.tokens) for name, llm in llms.items()},
        "transformers generate": lambda prompt: time_generate(theirs, prompt, options.tokens),
        "transformers forward": lambda prompt: time_forward(theirs, prompt, options.tokens),
    }
    if absent:
        print(f"llama.cpp is left out: {absent}")
    else:
        for name, decoder in load_llama_cpp(theirs, options.prompt_tokens).items():
            runs[name] = partial(time_llama_cpp, decoder, tokens=options.tokens)
    generator = torch.Generator().manual_seed(0)
    samples: dict[str, list[Generation]] = {name: [] for name in runs}
    memory, bandwidths = torch.ones(1 << 27), []
    for round_number in range(options.rounds + 1):
        bandwidths.append(read_bandwidth(memory))
        for name, run in runs.items():
            # A new prompt each time: no prefix cache hits.
            prompt = torch.randint(3, 32000, (options.prompt_tokens,), generator=generator).tolist()
            timing = run(prompt)
            if round_number:  # the first is the warm-up
                samples[name].append(timing)
    step_bytes = {name: read_bytes(llm.engine.model) for name, llm in llms.items()}
    floors = {name: statistics.median(bandwidths) / count for name, count in step_bytes.items()}
    print_table(samples, options.prompt_tokens, options.tokens, floors)
    if options.output:
        record: dict[str, Any] = {
            "benchmark": "cpu_decode",
            "model": "TinyLlama-1.1B shape, random weights",
            "conditions": {key: value for key, value in vars(options).items() if key != "output"},
            "environment": environment(),
            "llama_cpp": absent or llama_cpp.version(),
            "bytes_per_token": step_bytes,
            "read_bytes_per_second": bandwidths,
            "samples": samples,
        }
        write_record(options.output, record)


def print_table(
    samples: dict[str, list[Generation]], prompt_tokens: int, tokens: int, floors: dict[str, float]
) -> None:
    """Print median tokens/s, the ratio to each peer, and the share of the memory bandwidth."""
    decode = {name: statistics.median((tokens - 1) / t["decode"] for t in taken) for name, taken in samples.items()}
    prefill = {name: statistics.median(prompt_tokens / t["prefill"] for t in taken) for name, taken in samples.items()}
    print(f"{'':24}{'decode tok/s':>14}{'prefill tok/s':>15}")
    for name in samples:
        print(f"{name:24}{decode[name]:14.2f}{prefill[name]:15.1f}")
    for quantization, peer in QUANTIZATIONS.items():
        name = _name(quantization)
        if name not in floors:
            continue
        others = {"transformers": [each for each in decode if each.startswith("transformers")]}
        if f"llama.cpp {peer}" in decode:
            others[f"llama.cpp {peer}"] = [f"llama.cpp {peer}"]
        for title, group in others.items():
            ratios = [rates[name] / max(rates[other] for other in group) for rates in (decode, prefill)]
            print(f"{name}: decode {ratios[0]:.2f} times {title}, prefill {ratios[1]:.2f} times")
        share = 100 * decode[name] / floors[name]
        print(f"{name}: memory allows {floors[name]:.2f} tok/s, of which it decodes {share:.0f} %")


if __name__ == "__main__":
    main()
