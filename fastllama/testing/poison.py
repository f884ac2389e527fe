"""Poisoned memory, so that an illegal read or a missing write makes a test fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside the block, uninitialised memory (torch.empty and similar) is NaN, or the largest integer.

    Uses torch's deterministic mode, which torch.compile and every allocator follow; ops without a deterministic
    implementation warn.
    """
    flags: Any = torch.utils.deterministic  # its one attribute is hidden from type checkers
    fills = flags.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    flags.fill_uninitialized_memory = True
    try:
        yield
    finally:
        flags.fill_uninitialized_memory = fills
        torch.set_deterministic_debug_mode(mode)


def noise_(x: Tensor) -> Tensor:
    """Fill with huge finite noise of either sign (integers: of the whole range), and return x.

    For memory past the end, which kernels mask: unused slots of a page, padding rows. NaN would be wrong there, as it
    survives a multiplication by 0.
    """
    if not x.is_floating_point():
        limits = torch.iinfo(x.dtype)
        return x.copy_(torch.randint(limits.min, limits.max, x.shape, dtype=torch.int64, device="cpu"))
    largest = min(torch.finfo(x.dtype).max, torch.finfo(torch.float32).max)
    size = torch.rand(x.shape, dtype=torch.float32, device="cpu") / 2 + 0.5
    sign = torch.randint(0, 2, x.shape, dtype=torch.int64, device="cpu") * 2 - 1
    return x.copy_(size * sign * largest)


@contextmanager
def surrounded(x: Tensor, margin: int = 64) -> Iterator[Tensor]:
    """A copy of x [..., N] inside a buffer of noise: `margin` elements before, after and between its rows.

    Reading outside x reads noise; writing there raises AssertionError at the end of the block. margin: 64 elements of
    16 bits keep rows aligned to 128 bytes where N does.
    """
    buffer = noise_(torch.empty(*x.shape[:-1], x.shape[-1] + 2 * margin, dtype=x.dtype, device=x.device))
    inner = buffer[..., margin : margin + x.shape[-1]]
    inner.copy_(x)
    before = buffer.clone()
    yield inner
    before[..., margin : margin + x.shape[-1]] = inner
    harmed = int((before.view(torch.uint8) != buffer.view(torch.uint8)).any(-1).sum())
    if harmed:
        raise AssertionError(f"memory next to a tensor of shape {list(x.shape)} was written, in {harmed} of its rows")
