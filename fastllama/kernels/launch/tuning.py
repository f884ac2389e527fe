"""How each Triton kernel is launched: the user's tuned file, else the packaged one for this GPU, else a heuristic.

A launcher calls the function of its family, such as `norm(x.device, size=..., itemsize=...)`: a cached lookup of well
under a microsecond, which times and compiles nothing. To add a family, write a frozen dataclass, a heuristic from
numbers, an entry in FAMILIES and a function for launchers.

Only elementwise ops and exact sums (w8a8) may have the number of rows in their shape, as `rows`, rounded up to a power
of two. Ops with rounded sums (norm, sample, int4, int8) would not be batch-invariant.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from fastllama import env
from fastllama.arithmetic import power_of_2
from fastllama.kernels.launch.device import Device, device_info
from fastllama.kernels.launch.heuristics import (
    AdjustLaunch,
    DecodeLaunch,
    LaunchConfig,
    MatmulLaunch,
    NormLaunch,
    PrefillLaunch,
    QuantizedMatmulLaunch,
    RopeLaunch,
    SampleLaunch,
    SwigluLaunch,
    W8A8Launch,
    adjust_heuristic,
    decode_heuristic,
    int4_heuristic,
    int8_heuristic,
    matmul_heuristic,
    norm_heuristic,
    prefill_heuristic,
    rope_heuristic,
    sample_heuristic,
    swiglu_heuristic,
    w8a8_heuristic,
)
from fastllama.kernels.launch.tuned import Shape, nearest, read

PACKAGED = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Family:
    """One kernel family: the class of its configuration, the names in its shape, and its heuristic."""

    launch: type[Any]
    shape: tuple[str, ...]
    heuristic: Callable[..., LaunchConfig]


FAMILIES = {
    "norm": Family(NormLaunch, ("size", "itemsize"), norm_heuristic),
    "rope": Family(RopeLaunch, ("rows", "heads", "head_dim", "itemsize"), rope_heuristic),
    "swiglu": Family(SwigluLaunch, ("rows", "size", "itemsize"), swiglu_heuristic),
    "sample": Family(SampleLaunch, ("vocab_size", "itemsize"), sample_heuristic),
    "adjust": Family(AdjustLaunch, ("vocab_size", "itemsize"), adjust_heuristic),
    "prefill": Family(PrefillLaunch, ("head_dim", "itemsize", "key_itemsize"), prefill_heuristic),
    "decode": Family(DecodeLaunch, ("queries", "head_dim", "itemsize"), decode_heuristic),
    "matmul": Family(MatmulLaunch, ("features", "size", "itemsize"), matmul_heuristic),
    "int4": Family(QuantizedMatmulLaunch, ("features", "size", "itemsize"), int4_heuristic),
    "int8": Family(QuantizedMatmulLaunch, ("features", "size", "itemsize"), int8_heuristic),
    "w8a8": Family(W8A8Launch, ("rows", "features", "size"), w8a8_heuristic),
}


def norm(device: torch.device, *, size: int, itemsize: int) -> NormLaunch:
    """The launch for rows of `size` elements of `itemsize` bytes."""
    return cast(NormLaunch, _launch("norm", device, size, itemsize))


def rope(device: torch.device, *, rows: int, heads: int, head_dim: int, itemsize: int) -> RopeLaunch:
    """The launch for `rows` tokens of `heads` heads, those of queries, keys and (when written) values together."""
    return cast(RopeLaunch, _launch("rope", device, power_of_2(rows), heads, head_dim, itemsize))


def swiglu(device: torch.device, *, rows: int, size: int, itemsize: int) -> SwigluLaunch:
    """The launch for outputs [rows, size]."""
    return cast(SwigluLaunch, _launch("swiglu", device, power_of_2(rows), size, itemsize))


def sample(device: torch.device, *, vocab_size: int, itemsize: int) -> SampleLaunch:
    """The launch for logits of `itemsize` bytes."""
    return cast(SampleLaunch, _launch("sample", device, vocab_size, itemsize))


def adjust(device: torch.device, *, vocab_size: int, itemsize: int) -> AdjustLaunch:
    """The launch for logits of `itemsize` bytes."""
    return cast(AdjustLaunch, _launch("adjust", device, vocab_size, itemsize))


def prefill(device: torch.device, *, head_dim: int, itemsize: int, key_itemsize: int) -> PrefillLaunch:
    """The launch for queries of `head_dim` elements of `itemsize` bytes, keys and values of `key_itemsize`."""
    return cast(PrefillLaunch, _launch("prefill", device, head_dim, itemsize, key_itemsize))


def decode(device: torch.device, *, queries: int, head_dim: int, itemsize: int) -> DecodeLaunch:
    """The launch for `queries` queries of a sequence on one KV head, over all query heads of the group."""
    return cast(DecodeLaunch, _launch("decode", device, queries, head_dim, itemsize))


def matmul(device: torch.device, *, features: int, size: int, itemsize: int) -> MatmulLaunch:
    """The launch for a weight [features, size], and at most 64 rows."""
    return cast(MatmulLaunch, _launch("matmul", device, features, size, itemsize))


def int4(device: torch.device, *, features: int, size: int, itemsize: int) -> QuantizedMatmulLaunch:
    """The launch for a weight [features, size] and rows of x with elements of `itemsize` bytes."""
    return cast(QuantizedMatmulLaunch, _launch("int4", device, features, size, itemsize))


def int8(device: torch.device, *, features: int, size: int, itemsize: int) -> QuantizedMatmulLaunch:
    """As `int4`."""
    return cast(QuantizedMatmulLaunch, _launch("int8", device, features, size, itemsize))


def w8a8(device: torch.device, *, rows: int, features: int, size: int) -> W8A8Launch:
    """The launch for `rows` rows of x and a weight [features, size]."""
    return cast(W8A8Launch, _launch("w8a8", device, power_of_2(rows), features, size))


def user_folder(device: Device) -> Path:
    """The folder of the user's tuned files for a device, in the same format as the packaged ones."""
    return env.cache_dir() / "tuned" / device.name


def row_counts(most: int) -> Iterator[int]:
    """Numbers of rows, up to `most`, that cover every launch that depends on rows."""
    rows = 1
    while rows < most:
        yield rows
        rows *= 2
    yield most


def warm_up(run: Callable[[int], Any], most: int, device: torch.device) -> float:
    """Run `run(rows)` for every number of rows up to `most` at which kernels are launched differently.

    So no request waits for compilation. On a CPU launches differ only between one row and more. Returns the seconds.
    """
    start = time.perf_counter()
    for rows in row_counts(most if device.type == "cuda" else min(most, 2)):
        run(rows)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@functools.cache
def _launch(family: str, device: torch.device, *values: int) -> LaunchConfig:
    facts, kind = device_info(device), FAMILIES[family]
    shape: Shape = dict(zip(kind.shape, values, strict=True))
    for folder in (user_folder(facts), PACKAGED / facts.name):
        found = nearest(read(folder / f"{family}.json", family, facts.name, kind.shape, kind.launch), shape)
        if found is not None:
            return cast(LaunchConfig, found)
    return kind.heuristic(facts, **shape)
