"""Small kernels, each with one property that a compile report must show, and the functions that launch them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

Launcher = Callable[[], None]


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@triton.jit
def copy_kernel(out_ptr, x_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n), mask=offsets < n)


def copy() -> None:
    copy_kernel[(1,)](out_ptr=empty(4096), x_ptr=empty(4096), n=4096, BLOCK=2048)


def copy_misaligned() -> None:
    copy_kernel[(1,)](out_ptr=empty(4096)[1:], x_ptr=empty(4096)[1:], n=4095, BLOCK=2048)


# More of a row than a warp's registers hold, all of it needed twice.
@triton.jit
def spilling_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, x - tl.sum(x, 0))


def spilling() -> None:
    row = empty(32768, dtype=torch.float32)
    spilling_kernel[(1,)](out_ptr=row, x_ptr=row, BLOCK=32768, num_warps=1)


# Nothing guarantees that rows start at a multiple of 16 bytes.
@triton.jit
def row_sum_kernel(out_ptr, x_ptr, row_stride, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        total += tl.load(x_ptr + row * row_stride + start + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(out_ptr + row, tl.sum(total, 0))


def row_sum(stride: int) -> None:
    x = empty(8, stride)
    row_sum_kernel[(8,)](out_ptr=empty(8, dtype=torch.float32), x_ptr=x, row_stride=stride, n=4096, BLOCK=1024)


def narrow() -> None:
    row_sum(4099)


def wide() -> None:
    row_sum(4096)


@triton.jit
def dot_kernel(out_ptr, a_ptr, b_ptr, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr):
    m, n = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    total = tl.zeros((M, N), tl.float32)
    for start in tl.range(0, k, K, num_stages=STAGES):
        a = tl.load(a_ptr + m * k + start + tl.arange(0, K)[None, :])
        b = tl.load(b_ptr + n * k + start + tl.arange(0, K)[:, None])
        total += tl.dot(a, b)
    tl.store(out_ptr + m * N + n, total.to(out_ptr.dtype.element_ty))


def dot(m: int = 64, n: int = 64, k: int = 64, stages: int = 2, num_warps: int = 4) -> None:
    dot_kernel[(1,)](
        out_ptr=empty(m, n),
        a_ptr=empty(m, 4096),
        b_ptr=empty(n, 4096),
        k=4096,
        M=m,
        N=n,
        K=k,
        STAGES=stages,
        num_warps=num_warps,
    )


def over_the_limit() -> None:
    dot(m=128, n=128, k=128, stages=6, num_warps=8)


# A warpgroup's sum takes 256 registers of each thread, more than there are.
def serialised() -> None:
    dot(m=128, n=256, k=16)


@triton.jit
def broken_kernel(x_ptr):
    tl.store(x_ptr, tl.arange(0, 3))


def broken() -> None:
    broken_kernel[(1,)](x_ptr=empty(4))


def nothing() -> None:
    """Launches nothing."""
