"""Estimates memory and time of a benchmark of decode steps before it starts, and chooses a shape that fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from fastllama.bench import models
from fastllama.errors import counted
from fastllama.layers.batch import KVCache
from fastllama.layers.config import LlamaConfig
from fastllama.layers.packing import expected_bytes
from fastllama.runtime.device.memory import available_bytes

PATIENCE = 600.0  # most seconds of a benchmark with a default shape
SHARE = 0.8  # of the free memory, for weights, keys and values: activations and the system need the rest
DRAWN = 1e8  # random weights generated per second
EFFICIENCY = 0.5  # of a large matmul's rate, reached by prompts


@dataclass(frozen=True)
class Rates:
    """A CPU's quickly measured rates in a dtype: operations of a matmul and bytes of a copy, per second."""

    flops: float
    bytes: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> Rates:
        """Measure; takes half a second and 50 MB."""
        a, b = torch.ones(256, 2048, dtype=dtype, device="cpu"), torch.ones(2048, 2048, dtype=dtype, device="cpu")
        source = torch.zeros(24_000_000, dtype=torch.int8, device="cpu")
        target = torch.empty_like(source)
        matmul = min(_seconds(lambda: torch.matmul(a, b)) for _ in range(3))
        copy = min(_seconds(lambda: target.copy_(source)) for _ in range(5))
        return cls(2 * 256 * 2048**2 / matmul, 2 * source.nbytes / copy)


@dataclass(frozen=True)
class Work:
    """The work of all cases. weight_bytes, kv_bytes: of the largest case; the others are sums over all cases."""

    weight_bytes: float
    kv_bytes: float
    prompt_tokens: int
    steps: int
    flops: float
    moved_bytes: float
    made: float

    @classmethod
    def of(
        cls,
        config: LlamaConfig,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        kinds: Sequence[str],
        batch: Sequence[int],
        context: Sequence[int],
        steps: int,
    ) -> Work:
        """steps: per case. A context's other tokens are its prompt."""
        each = [expected_bytes(config, dtype, kind) for kind in kinds]
        multiplied = config.num_parameters  # by a token: all but the embeddings, a row of which is looked up
        if not config.tie_word_embeddings:
            multiplied -= config.vocab_size * config.hidden_size
        of_kv = KVCache.bytes_per_token(config, kv_dtype)
        tokens = [(rows, length - steps - 1, length) for rows, length in product(batch, context)]
        width = config.num_attention_heads * config.head_dim
        scores = 4 * config.num_hidden_layers * width  # operations per pair of tokens in attention
        prompts = sum(rows * length for rows, length, _ in tokens)
        flops = sum(rows * (length + steps) * (2 * multiplied + scores * length / 2) for rows, length, _ in tokens)
        moved = sum(steps * (sum(each) / len(each) + rows * length * of_kv) for rows, _, length in tokens)
        return cls(
            weight_bytes=max(each),
            kv_bytes=max(rows * length for rows, _, length in tokens) * of_kv,
            prompt_tokens=len(kinds) * prompts,
            steps=len(kinds) * len(tokens) * steps,
            flops=len(kinds) * flops,
            moved_bytes=len(kinds) * moved,
            made=len(kinds) * config.num_parameters,
        )

    def seconds(self, rates: Rates) -> float:
        """Estimated seconds on a CPU."""
        return self.flops / (EFFICIENCY * rates.flops) + self.moved_bytes / rates.bytes + self.made / DRAWN

    def fits(self, device: torch.device) -> bool:
        """Whether the largest case fits in the free memory."""
        return self.weight_bytes + self.kv_bytes <= SHARE * available_bytes(device)

    def describe(self, rates: Rates | None) -> str:
        """One line; with a time estimate where the rates are known."""
        memory = f"weights {_size(self.weight_bytes)}, keys and values up to {_size(self.kv_bytes)}"
        amount = f"{self.prompt_tokens:,} tokens of prompts, {counted(self.steps, 'step')}"
        return f"{memory}; {amount}" + ("" if rates is None else f": about {_duration(self.seconds(rates))}")


def largest_shape(device: torch.device, work_of: Callable[[str], Work], rates: Rates | None) -> str:
    """The largest of models.SHAPES whose cases fit in memory and, on a CPU, take at most PATIENCE by these rates.

    Without rates, as on a GPU, 7b at most. Where none fits, the smallest. work_of: the work of all cases of a shape.
    """
    smallest, *names = models.SHAPES
    for name in reversed(names[: None if rates else names.index("7b") + 1]):
        work = work_of(name)
        if work.fits(device) and (rates is None or work.seconds(rates) <= PATIENCE):
            return name
    return smallest


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return counted(max(round(seconds), 1), "second")
    minutes = round(seconds / 60)
    return counted(minutes, "minute") if minutes < 90 else counted(round(seconds / 3600), "hour")


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
