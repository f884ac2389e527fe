"""Cost of sampling options in a decode step: penalties, biases, bans, logits processors.

python -m benchmarks.sampling_options [--model toy small] [--batch 1 16 64] [--rounds 30] [--output FILE]

Times steps of sequences of random tokens; one sequence, all, or none use an option. The configurations take turns, step
by step, and the ratio is the median within the turns; a second "none" shows the noise. Repetition penalties are timed
at several contexts, the rest at the shortest. Both models have a vocabulary of 32000 and random weights: "toy" computes
next to nothing, "small" has 4 layers of 1024. Prompts are not computed: their pages hold zeros, which does not change
the time. One thread, and its CPU time: that of a step on an idle machine.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import abc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastllama import LLM, LlamaConfig, LlamaForCausalLM, SamplingParams
from fastllama.bench import timing
from fastllama.bench.environment import environment
from fastllama.bench.files import output_file, write_record
from fastllama.bench.models import random_model
from fastllama.bench.text import table
from fastllama.errors import check_range
from fastllama.io.hub import resolve_model

VOCAB = 32000
MODELS = {
    "toy": LlamaConfig(VOCAB, 64, 128, 1, 4, 2, head_dim=16, max_position_embeddings=32768, eos_token_ids=()),
    "small": LlamaConfig(VOCAB, 1024, 2816, 4, 16, 4, head_dim=64, max_position_embeddings=32768, eos_token_ids=()),
}
CONTEXTS = (100, 1000, 4000, 16000)
MOST_TOKENS = 64_000  # tokens in all contexts of a step: attention to more takes seconds, and hides the rest
ROOM = 256  # tokens of each sequence after its prompt: those while other prompts are read, and those timed
MOST_ROUNDS = 100  # for which ROOM suffices
UNCOUNTED = 3  # steps at the start: the first captures


def _same(token_ids: list[int], logits: Tensor) -> Tensor:
    return logits


def _even(token_ids: list[int], logits: Tensor) -> Tensor:
    logits[1::2] = -torch.inf
    return logits


PENALTY = "repetition_penalty"
OPTIONS: dict[str, dict[str, Any]] = {
    PENALTY: {"repetition_penalty": 1.1},
    "frequency_penalty": {"frequency_penalty": 0.1},
    "logit_bias of 8000": {"logit_bias": dict.fromkeys(range(0, VOCAB, 4), 0.5)},
    "allowed_token_ids, 8000": {"allowed_token_ids": range(0, VOCAB, 4)},
    "min_tokens": {"min_tokens": ROOM, "stop_token_ids": (7,)},
    "bad_words": {"bad_words": ("little girl", "once upon a time", "the end")},
    "processor, unchanged": {"logits_processors": (_same,)},
    "processor that masks": {"logits_processors": (_even,)},
}
NONE, AGAIN = ("none", 0), ("none", 1)  # the second shows the noise
Contender = tuple[str, int]  # an option, and how many sequences use it


def build(name: str) -> LlamaForCausalLM:
    """Returns a model of random weights."""
    torch.manual_seed(0)
    return random_model(MODELS[name], "none", torch.float32, torch.device("cpu"))


@contextmanager
def _prompts_not_computed(model: LlamaForCausalLM) -> Iterator[None]:
    """Context in which the model returns logits at once, and computes no keys and values."""
    model.forward = lambda ids, batch, kv: torch.zeros(len(batch.logits_rows), VOCAB)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.forward


def decoding(model: LlamaForCausalLM, batch: int, context: int, contender: Contender) -> LLM:
    """Returns an LLM that decodes `batch` sequences of this context length, with no prompts left."""
    option, asked = contender
    llm = LLM(
        model,
        tokenizer=resolve_model("tiny"),  # for bad words; ids beyond its vocabulary have no text
        quantization=None,
        max_model_len=context + ROOM,
        kv_cache_tokens=batch * (context + ROOM + 64),
        max_num_seqs=batch,
        progress=False,
    )
    for layer in llm.engine._runner.kv.layers:
        layer.k_pages.zero_()
        layer.v_pages.zero_()
    rng = random.Random(0)
    for number in range(batch):
        options = OPTIONS[option] if option in OPTIONS and number < asked else {}
        params = SamplingParams(max_tokens=ROOM, temperature=0, ignore_eos=True, **options)
        llm.engine.add_request(rng.choices(range(3, VOCAB), k=context), params)
    with _prompts_not_computed(model):
        while llm.engine.scheduler.num_waiting or any(
            generation.first_token_time is None for generation in llm.engine._requests.generations.values()
        ):
            llm.engine.step()
    return llm


def core_seconds(call: timing.Call) -> timing.Sampler:
    """CPU time of the process in seconds: time that other processes take from the core does not count."""

    def sample() -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    return sample


def measure(
    model: LlamaForCausalLM, batch: int, context: int, options: abc.Iterable[str], rounds: int
) -> dict[Contender, list[float]]:
    """CPU seconds of each step of each configuration: one sequence, all, or none use an option."""
    contenders = [NONE, AGAIN, *((option, asked) for option in options for asked in sorted({1, batch}))]
    with ExitStack() as stack:
        llms = {each: stack.enter_context(decoding(model, batch, context, each)) for each in contenders}
        for llm in llms.values():
            for _ in range(UNCOUNTED):
                llm.engine.step()
        samplers = {str(each): core_seconds(llm.engine.step) for each, llm in llms.items()}
        seconds = timing.in_turns(samplers, rounds)
        assert all(len(llm.engine._requests.generations) == batch for llm in llms.values()), "some have ended"
    return {each: seconds[str(each)] for each in contenders}


def cells(seconds: dict[Contender, list[float]], contender: Contender) -> tuple[str, str]:
    """Milliseconds of a step, and the ratio to the steps of the same rounds without options."""
    ratios = [ours / none for ours, none in zip(seconds[contender], seconds[NONE], strict=True)]
    return f"{1e3 * statistics.median(seconds[contender]):.2f}", f"{statistics.median(ratios):.3f}"


def main() -> None:
    """Take the measurements, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--rounds", type=int, default=30, help=f"at most {MOST_ROUNDS}")
    parser.add_argument("--output", type=output_file, help="where to write conditions and raw samples as JSON")
    given = parser.parse_args()
    check_range("rounds", given.rounds, 1, MOST_ROUNDS)
    torch.set_num_threads(1)
    samples = []
    rows = [("", "sequences", "context", "ask", "ms", "times none")]
    for name in given.model:
        model = build(name)
        for batch, context in product(given.batch, given.contexts):
            if batch * context > max(MOST_TOKENS, batch * min(given.contexts)):
                continue
            options = list(OPTIONS) if context == min(given.contexts) else [PENALTY]
            found = measure(model, batch, context, options, given.rounds)
            for option, asked in found:
                figures = cells(found, (option, asked))
                rows.append((f"{name}, {option}", str(batch), str(context), str(asked), *figures))
                print(" ".join(rows[-1]), file=sys.stderr)
                case = {"model": name, "batch": batch, "context": context, "option": option, "asked": asked}
                samples.append(case | {"seconds": found[option, asked]})
    print(table(rows))
    if given.output:
        write_record(given.output, {"benchmark": "sampling_options", "environment": environment(), "samples": samples})


if __name__ == "__main__":
    main()
