"""The device's measured ceilings: rates of a copy, a read and a matmul."""

from __future__ import annotations

from typing import Any

import torch

from fastllama.bench import timing
from fastllama.kernels.launch.device import device_info

COPY = {"cuda": 1 << 29, "cpu": 1 << 27}  # bf16 numbers, 1 GiB and 256 MiB: more than the caches hold
SIZE = {"cuda": 8192, "cpu": 2048}  # rows and columns of the matmul's matrices
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TOY_COPY, TOY_SIZE = 1 << 15, 64
COLUMNS = 8192  # of the matrix of the matrix-vector read
ROUNDS = 10


def bandwidths(device: torch.device, toy: bool = False) -> dict[str, Any]:
    """Bytes per second of a large copy, reads plus writes, and of a large read; and every sample in seconds.

    A decode step reads and hardly writes. The read is the faster of torch's sum and its matrix-vector matmul, since
    either may be limited by more than memory.
    Returns {"copy_bytes_per_second": float, "read_bytes_per_second": float, "seconds": {"copy" | "sum" | "mv": [...]}}.
    """
    count = TOY_COPY if toy else COPY[device.type]
    source = torch.randn(TOY_COPY, dtype=torch.float32, device=device).to(torch.bfloat16).repeat(count // TOY_COPY)
    target, pairs = torch.empty_like(source), source.view(torch.float32)
    matrix = source.view(-1, COLUMNS)
    vector, products = matrix[0].clone(), source.new_empty(len(matrix))
    total = pairs.new_empty(())
    seconds = {
        "copy": _samples(lambda: target.copy_(source), device),
        "sum": _samples(lambda: torch.sum(pairs, dim=0, out=total), device),
        "mv": _samples(lambda: torch.mv(matrix, vector, out=products), device),
    }
    medians = {name: timing.quantiles(samples)["median"] for name, samples in seconds.items()}
    return {
        "copy_bytes_per_second": 2 * source.nbytes / medians["copy"],
        "read_bytes_per_second": source.nbytes / min(medians["sum"], medians["mv"]),
        "seconds": seconds,
    }


def ceilings(device: torch.device, toy: bool = False, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """`bandwidths`, and operations per second of a large matmul: "bf16_flops_per_second", or of another dtype."""
    size = TOY_SIZE if toy else SIZE[device.type]
    found = bandwidths(device, toy)
    a, b = (torch.randn(size, size, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    seconds = _samples(lambda: torch.matmul(a, b, out=c), device)
    found[f"{SHORT[dtype]}_flops_per_second"] = 2 * size**3 / timing.quantiles(seconds)["median"]
    found["seconds"]["product"] = seconds
    return found


def shares(bytes_per_second: float, reached: dict[str, Any]) -> dict[str, float]:
    """A rate as a share of the ceilings of `bandwidths`, read and copy; a decode step is mostly reads."""
    return {f"of_{name}": bytes_per_second / reached[f"{name}_bytes_per_second"] for name in ("read", "copy")}


def _samples(call: timing.Call, device: torch.device) -> list[float]:
    if device.type == "cpu":
        sampler = timing.wall(call)
    else:
        scratch = torch.empty(2 * device_info(device).l2_cache, dtype=torch.int8, device=device)
        sampler = timing.events(call, scratch)
    with torch.inference_mode():
        return timing.in_turns({"": sampler}, ROUNDS)[""]
