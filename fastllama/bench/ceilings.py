"""What the device reaches, which figures are shares of."""

from __future__ import annotations

from typing import Any

import torch

from fastllama.bench import timing
from fastllama.kernels.device import device_info

COPY = {"cuda": 1 << 29, "cpu": 1 << 27}  # bf16 numbers, 1 GiB and 256 MiB: more than the caches hold
SIZE = 8192  # of a product's matrices
TOY_COPY, TOY_SIZE = 1 << 15, 64
ROUNDS = 10


def copy_bandwidth(device: torch.device, toy: bool = False) -> dict[str, Any]:
    """Bytes a second, read and written, of a large copy; and every sample in seconds.

    Returns {"copy_bytes_per_second": float, "seconds": {"copy": [float, ...]}}.
    """
    count = TOY_COPY if toy else COPY[device.type]
    source = torch.randn(TOY_COPY, device=device).to(torch.bfloat16).repeat(count // TOY_COPY)
    target = torch.empty_like(source)
    seconds = _samples(lambda: target.copy_(source), device)
    return {
        "copy_bytes_per_second": 2 * source.nbytes / timing.quantiles(seconds)["median"],
        "seconds": {"copy": seconds},
    }


def ceilings(device: torch.device, toy: bool = False) -> dict[str, Any]:
    """`copy_bandwidth`, and beside it operations a second in a large product in bf16."""
    size = TOY_SIZE if toy else SIZE
    found = copy_bandwidth(device, toy)
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    seconds = _samples(lambda: torch.matmul(a, b, out=c), device)
    found["bf16_flops_per_second"] = 2 * size**3 / timing.quantiles(seconds)["median"]
    found["seconds"]["product"] = seconds
    return found


def _samples(call: timing.Call, device: torch.device) -> list[float]:
    if device.type == "cpu":
        sampler = timing.wall(call)
    else:
        scratch = torch.empty(2 * device_info(device).l2_cache, dtype=torch.int8, device=device)
        sampler = timing.events(call, scratch)
    with torch.inference_mode():
        return timing.in_turns({"": sampler}, ROUNDS)[""]
