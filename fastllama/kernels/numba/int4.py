"""matmul_int4 in Numba: see quantized.py."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.kernels import cpu
from fastllama.kernels.dispatch.checks import as_rows
from fastllama.kernels.dispatch.isolation import full_precision
from fastllama.kernels.numba import quantized
from fastllama.kernels.reference.int4 import MIDDLE


def matmul_int4(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    """See kernels.matmul_int4."""
    if not quantized.runs(x, scales):
        cpu.matmul_int4(x, packed, scales, zeros, bias, out, workspace)
    elif zeros is None:
        quantized.multiply(x, packed, scales, bias, out)
    else:
        _multiply(as_rows("x", x), packed, scales, zeros, bias, as_rows("out", out))


def _multiply(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """By values less 8; the differences of zeros from 8 multiply the sums of x over each group, which are few."""
    total = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    quantized.multiply(x, packed, scales, None, total)
    sums = x.float().unflatten(-1, (scales.shape[1], -1)).sum(-1)  # [M, G]
    with full_precision("cpu"):
        total.addmm_(sums, (scales.float() * (zeros.float() - MIDDLE)).T, alpha=-1)
    if bias is not None:
        total += bias
    out.copy_(total)
