"""Warm-up steps, run before any request, so that no request waits for compilation or graph capture.

A launch depends on the following, which these steps cover:
- the rows of a step, rounded up to a power of two (matmuls, rotary embedding, silu * up), up to all tokens of the
  largest step: prompts of 1, 2, 4, ... tokens in all;
- the tokens per decoding sequence, and for a graph its bucket of sequences: decodes of every shape, the largest first,
  whose graph memory the smaller ones reuse (capture.py);
- the rows of logits, up to 64 or more, where torch computes the matmul and the norm is a separate kernel: covered by
  the same decodes, which have logits for each token;
- decodes and prompts in one step, which run as two kernels: one mixed step;
- penalties, for which decode steps are captured separately, and which prompt steps apply outside of a graph.
On a CPU only one row or more matters, and steps are captured by their number of pages, which takes as long as running
them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import torch

from fastllama.arithmetic import ceil_div
from fastllama.kernels.launch import tuning
from fastllama.runtime.device import sampler
from fastllama.runtime.device.memory import Sizes
from fastllama.runtime.device.runner import Runner
from fastllama.runtime.params import SamplingParams
from fastllama.runtime.planning.sequence import Request, Sequence
from fastllama.runtime.planning.step import Chunk, Step

PLAIN = SamplingParams(max_tokens=1, seed=0)
PENALIZED = SamplingParams(max_tokens=1, seed=0, repetition_penalty=1.1)


def warm_up(runner: Runner, sizes: Sizes, num_queries: Iterable[int] = (1,)) -> float:
    """Run every shape that a request may need. num_queries: tokens of a sequence in decode steps.

    Overwrites the pages. Returns the seconds it took.
    """
    device, start = runner.model.device, time.perf_counter()
    longest = min(sizes.max_model_len, sizes.kv_cache_tokens)
    most = min(sizes.max_num_batched_tokens, longest * sizes.max_num_seqs)

    def run(chunks: list[Chunk], num_decodes: int = 0) -> None:
        sampler.sample(runner.run(Step(tuple(chunks), num_decodes=num_decodes, copies=())))

    def prompts(rows: int) -> None:
        lengths = [longest] * (rows // longest) + [rows % longest] * (rows % longest > 0)
        run(_chunks(runner, lengths, PLAIN), num_decodes=1 if rows == 1 else 0)

    if device.type == "cuda":
        for num_seqs, length in decodes(runner, sizes.max_num_seqs, most, num_queries):
            for params in (PENALIZED, PLAIN):
                run(_chunks(runner, [length] * num_seqs, params), num_decodes=num_seqs)
    tuning.warm_up(prompts, most, device)
    if device.type == "cuda":
        if longest > 1 < most:
            run(_chunks(runner, [1, 2], PLAIN), num_decodes=1)
            run(_chunks(runner, [2], PENALIZED))
        torch.cuda.synchronize(device)
        runner.adjustments.clear()
    return time.perf_counter() - start


def decodes(runner: Runner, max_num_seqs: int, most: int, num_queries: Iterable[int]) -> list[tuple[int, int]]:
    """Returns (sequences, tokens of each) of the smallest decode step of every captured shape; most: tokens of a step.

    The shapes with most rows come first.
    """
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for length in num_queries:
        for num_seqs in range(1, min(max_num_seqs, most // length) + 1):
            found.setdefault(runner.shape(num_seqs, length), (num_seqs, length))
    return [found[shape] for shape in sorted(found, key=math.prod, reverse=True)]


def _chunks(runner: Runner, lengths: list[int], params: SamplingParams) -> list[Chunk]:
    """Returns chunks of sequences of these lengths, all in the same pages."""
    chunks = []
    for number, length in enumerate(lengths):
        request = Request("warm-up", (0,) * length, params, time.monotonic())
        pages = list(range(ceil_div(length, runner.page_size)))
        seq = Sequence(number, request, number, [0] * length, length, 1, page_ids=pages)
        chunks.append(Chunk(seq, 0, length, (seq,)))
    return chunks
