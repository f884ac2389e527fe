"""Steps that are run before any request comes, so that what compiles or is captured at first use is so already."""

from __future__ import annotations

import time
from collections.abc import Iterable

from fastllama.kernels import tuning
from fastllama.kernels.arithmetic import ceil_div
from fastllama.runtime import sampler
from fastllama.runtime.memory import Sizes
from fastllama.runtime.params import SamplingParams
from fastllama.runtime.runner import Runner
from fastllama.runtime.sequence import Request, Sequence
from fastllama.runtime.step import Chunk, Step


def warm_up(runner: Runner, sizes: Sizes, num_queries: Iterable[int] = (1,)) -> float:
    """Run prompts of one token, two, four and on; on a GPU as many decodes, of each of these numbers of tokens.

    Whatever its pages hold is overwritten. Returns the seconds it took.
    """
    device = runner.model.device
    most = min(sizes.max_num_batched_tokens, sizes.max_model_len, sizes.kv_cache_tokens)
    seconds = tuning.warm_up(lambda length: _run(runner, 1, length, decodes=length == 1), most, device)
    if device.type == "cuda":
        for length in num_queries:
            seconds += _of_decodes(runner, sizes.max_num_seqs, length)
    return seconds


def _of_decodes(runner: Runner, most: int, length: int) -> float:
    return tuning.warm_up(lambda num_seqs: _run(runner, num_seqs, length, decodes=True), most, runner.model.device)


def _run(runner: Runner, num_seqs: int, length: int, *, decodes: bool) -> None:
    """A step of sequences of so many tokens, all in the same pages."""
    request = Request("warm-up", (0,) * length, SamplingParams(max_tokens=1, seed=0), time.monotonic())
    pages = list(range(ceil_div(length, runner.page_size)))
    sequences = [Sequence(i, request, i, [0] * length, length, 1, page_ids=pages) for i in range(num_seqs)]
    chunks = tuple(Chunk(seq, 0, length, (seq,)) for seq in sequences)
    sampler.draw(runner.run(Step(chunks, num_decodes=num_seqs if decodes else 0, copies=())))
