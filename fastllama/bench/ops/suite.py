"""Measures every op at the shapes of a Llama against torch, by importance, within a time limit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fastllama.bench import models
from fastllama.bench.ceilings import ceilings
from fastllama.bench.environment import environment, gpu
from fastllama.bench.ops import comparison
from fastllama.bench.ops.peers import torch_peers
from fastllama.bench.ops.report import OURS, Record, line
from fastllama.catalogue.llama_calls import LlamaCall, llama_calls, toy_calls
from fastllama.catalogue.sizes import LlamaSizes, config_of
from fastllama.catalogue.table import CATALOGUE
from fastllama.errors import check_choice, check_range
from fastllama.io.load import resolve_device, resolve_dtype

SHAPES = {"toy": "toy", **{name: preset for name, preset in models.SHAPES.items() if preset is not None}}
USUAL = {"cuda": "7b", "cpu": "1.1b"}  # shape
MOST = {"cuda": None, "cpu": 2}  # calls per op


@dataclass(frozen=True)
class OpsOptions:
    """Options. Raises ValueError for illegal ones.

    ops: if empty, all of the device. shape: one of SHAPES; USUAL where None. most: calls per op, by importance; MOST
    where None. minutes: no call starts after them. peers: whether to measure torch.
    """

    ops: tuple[str, ...] = ()
    shape: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    most: int | None = None
    minutes: float = 10.0
    peers: bool = True

    def __post_init__(self) -> None:
        for op in self.ops:
            check_choice("op", op, CATALOGUE)
        if self.shape is not None:
            check_choice("shape", self.shape, SHAPES)
        if self.most is not None:
            check_range("most", self.most, 1)
        check_range("minutes", self.minutes, 0)


def calls(options: OpsOptions, device: torch.device) -> Iterator[LlamaCall]:
    """The calls to measure on a device, in order. Raises ValueError for an op that the device lacks."""
    able = [op for op, entry in CATALOGUE.items() if entry.only in (None, device.type)]
    for op in options.ops:
        check_choice(f"op on {device.type}", op, able)
    ops, shape = options.ops or tuple(able), options.shape or USUAL[device.type]
    sizes = LlamaSizes.of(SHAPES[shape])
    dtype = resolve_dtype(options.dtype, replace(config_of(sizes.name), dtype="bfloat16"))
    most, counts = options.most or MOST[device.type], Counter[str]()
    for call in toy_calls(dtype, ops) if shape == "toy" else llama_calls(dtype, ops, (sizes,)):
        counts[call.op] += 1
        if most is None or counts[call.op] <= most:
            yield call


def measure(
    options: OpsOptions, say: Callable[[str], None], keep: Callable[[Record], None] = lambda record: None
) -> Record:
    """Measure all calls; returns the record: conditions, ceilings, and every contender's samples for each call.

    `say`: called with a line after each call. `keep`: called with the partial record then.
    """
    start, longest = time.monotonic(), 0.0
    device = resolve_device(options.device)
    plan = list(calls(options, device))
    dtype = plan[0].dtype
    record: Record = {
        "benchmark": "ops",
        "environment": environment(device),
        "conditions": asdict(options) | {"device": str(device), "dtype": str(dtype).removeprefix("torch.")},
        "ceilings": ceilings(device, options.shape == "toy", dtype),
        "cases": [],
        "skipped": [],
    }
    for call in plan:
        began = time.monotonic()
        if began + longest - start > 60 * options.minutes:
            record["skipped"].append(f"{call.op}, {call.label}: no time left")
            continue
        peers = torch_peers(call.op, device) if options.peers else {}
        try:
            case = comparison.measure(call, device, peers)
        except (MemoryError, torch.OutOfMemoryError):
            record["skipped"].append(f"{call.op}, {call.label}: does not fit in memory")
            continue
        except Exception as failure:  # a failing op must not end the others
            case = _failed(call, failure)
        finally:
            models.release(device)
        longest = max(longest, time.monotonic() - began)
        record["cases"].append(case)
        record["environment"]["gpu_after"] = gpu(device.index or 0) if device.type == "cuda" else None
        keep(record)
        say(line(case))
    keep(record)  # includes skipped calls
    return record


def failed(record: Record) -> bool:
    """Whether one of our ops is wrong, or does not run."""
    return any("failed" in case["contenders"][OURS] for case in record["cases"])


def _failed(call: LlamaCall, failure: Exception) -> dict[str, Any]:
    said = f"{type(failure).__name__}: {failure}"[:500]
    return {"op": call.op, "label": call.label, "backend": "", "contenders": {OURS: {"failed": said}}}
