"""RMSNorm in one pass over each row, with or without a residual addition in front."""

from __future__ import annotations

import numba
import numpy as np
from torch import Tensor

from fastllama.kernels import reference
from fastllama.kernels.checks import as_rows
from fastllama.kernels.numba.numerics import LIKE, jit, match_threads, narrow, parallel_jit, vector, widen


@jit
def norm_row(out, x, weight, eps, like):
    """out = weight * cast(x / its rms), the cast to x's dtype."""
    size = x.shape[0]
    square = np.float32(0)
    for i in range(size):
        value = widen(x[i])
        square += value * value
    scale = np.float32(1) / np.sqrt(square / np.float32(size) + np.float32(eps))
    for i in range(size):
        normed = widen(narrow(widen(x[i]) * scale, like))
        out[i] = narrow(normed * widen(weight[i]), like)


@jit
def add_row(total, x, residual, like):
    """total = x + residual, rounded."""
    for i in range(x.shape[0]):
        total[i] = narrow(widen(x[i]) + widen(residual[i]), like)


# The _row_ kernels own one row and one thread, the others a row for each iteration. Strides count elements.
@jit
def norm_row_kernel(out_ptr, x_ptr, weight_ptr, size, eps, like, weight_like):
    out, x = vector(out_ptr, 0, size, like), vector(x_ptr, 0, size, like)
    norm_row(out, x, vector(weight_ptr, 0, size, weight_like), eps, like)


@parallel_jit
def norm_kernel(out_ptr, x_ptr, weight_ptr, out_stride, x_stride, rows, size, eps, like, weight_like):
    for row in numba.prange(rows):
        out, x = vector(out_ptr, row * out_stride, size, like), vector(x_ptr, row * x_stride, size, like)
        norm_row(out, x, vector(weight_ptr, 0, size, weight_like), eps, like)


@jit
def add_norm_row_kernel(out_ptr, total_ptr, x_ptr, residual_ptr, weight_ptr, size, eps, like, weight_like):
    total = vector(total_ptr, 0, size, like)
    add_row(total, vector(x_ptr, 0, size, like), vector(residual_ptr, 0, size, like), like)
    norm_row(vector(out_ptr, 0, size, like), total, vector(weight_ptr, 0, size, weight_like), eps, like)


@parallel_jit
def add_norm_kernel(
    out_ptr,
    total_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_stride,
    total_stride,
    x_stride,
    residual_stride,
    rows,
    size,
    eps,
    like,
    weight_like,
):
    for row in numba.prange(rows):
        total, x = vector(total_ptr, row * total_stride, size, like), vector(x_ptr, row * x_stride, size, like)
        add_row(total, x, vector(residual_ptr, row * residual_stride, size, like), like)
        out = vector(out_ptr, row * out_stride, size, like)
        norm_row(out, total, vector(weight_ptr, 0, size, weight_like), eps, like)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See kernels.rms_norm."""
    like, size = LIKE.get(x.dtype), weight.shape[0]
    if like is None:
        out.copy_(reference.rms_norm(x, weight, eps))
        return
    likes = (like, LIKE[weight.dtype])
    if x.numel() == size:
        norm_row_kernel(out.data_ptr(), x.data_ptr(), weight.data_ptr(), size, eps, *likes)
    else:
        x, out = as_rows("x", x), as_rows("out", out)
        match_threads()
        strides = (out.stride(0), x.stride(0))
        norm_kernel(out.data_ptr(), x.data_ptr(), weight.data_ptr(), *strides, x.shape[0], size, eps, *likes)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, residual_out: Tensor) -> None:
    """See kernels.add_rms_norm."""
    like, size = LIKE.get(x.dtype), weight.shape[0]
    if like is None:
        for target, result in zip((out, residual_out), reference.add_rms_norm(x, residual, weight, eps), strict=True):
            target.copy_(result)
        return
    tensors = (out, residual_out, x, residual)
    likes = (like, LIKE[weight.dtype])
    if x.numel() == size:
        add_norm_row_kernel(*(t.data_ptr() for t in tensors), weight.data_ptr(), size, eps, *likes)
    else:
        names = ("out", "residual_out", "x", "residual")
        rows = [as_rows(name, tensor) for name, tensor in zip(names, tensors, strict=True)]
        match_threads()
        pointers, strides = (t.data_ptr() for t in rows), (t.stride(0) for t in rows)
        add_norm_kernel(*pointers, weight.data_ptr(), *strides, rows[0].shape[0], size, eps, *likes)
