"""RMSNorm in one pass over each row, alone or fused with a residual addition."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fastllama.kernels import reference
from fastllama.kernels.dispatch.checks import as_rows
from fastllama.kernels.numba.numerics import LIKE, as_written, jit, load, rounded, store
from fastllama.kernels.numba.pieces import enter, leave, proceed
from fastllama.kernels.numba.threads import launch


# Not reassociated: x times the weight, 1e30 * 1e30, may overflow where the normalised value does not.
@as_written
def weighed(normed, weight):
    return normed * weight


# One row: out = weight * cast(x / its rms), the cast to x's dtype. Starts and strides count elements.
@jit
def rms_norm_row_kernel(out_ptr, x_ptr, weight_ptr, out_start, x_start, size, eps, like, weight_like):
    square = np.float32(0)
    for i in range(size):
        value = load(x_ptr, x_start + i, like)
        square += value * value
    scale = np.float32(1) / np.sqrt(square / np.float32(size) + np.float32(eps))
    for i in range(size):
        normed = rounded(load(x_ptr, x_start + i, like) * scale, like)
        store(out_ptr, out_start + i, weighed(normed, load(weight_ptr, i, weight_like)), like)


# One row: total = x + residual, rounded; out = the norm of that.
@jit
def add_rms_norm_row_kernel(
    out_ptr,
    total_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_start,
    total_start,
    x_start,
    residual_start,
    size,
    eps,
    like,
    weight_like,
):
    for i in range(size):
        total = load(x_ptr, x_start + i, like) + load(residual_ptr, residual_start + i, like)
        store(total_ptr, total_start + i, total, like)
    rms_norm_row_kernel(out_ptr, total_ptr, weight_ptr, out_start, total_start, size, eps, like, weight_like)


# One iteration owns one row.
@jit
def rms_norm_kernel(region, *args):
    out_ptr, x_ptr, weight_ptr, out_stride, x_stride, size, eps, like, weight_like = args
    first, last = enter(region, args)
    while first < last:
        for row in range(first, last):
            rms_norm_row_kernel(
                out_ptr, x_ptr, weight_ptr, row * out_stride, row * x_stride, size, eps, like, weight_like
            )
        first, last = proceed(region)
    return leave(region)


# One iteration owns one row.
@jit
def add_rms_norm_kernel(region, *args):
    (
        out_ptr,
        total_ptr,
        x_ptr,
        residual_ptr,
        weight_ptr,
        out_stride,
        total_stride,
        x_stride,
        residual_stride,
        size,
        eps,
        like,
        weight_like,
    ) = args
    first, last = enter(region, args)
    while first < last:
        for row in range(first, last):
            add_rms_norm_row_kernel(
                out_ptr,
                total_ptr,
                x_ptr,
                residual_ptr,
                weight_ptr,
                row * out_stride,
                row * total_stride,
                row * x_stride,
                row * residual_stride,
                size,
                eps,
                like,
                weight_like,
            )
        first, last = proceed(region)
    return leave(region)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See kernels.rms_norm."""
    like, size = LIKE.get(x.dtype), weight.shape[0]
    if like is None:
        out.copy_(reference.rms_norm(x, weight, eps))
        return
    likes = (like, LIKE[weight.dtype])
    if x.numel() == size:
        rms_norm_row_kernel(out.data_ptr(), x.data_ptr(), weight.data_ptr(), 0, 0, size, eps, *likes)
    else:
        x, out = as_rows("x", x), as_rows("out", out)
        pointers, strides = (out.data_ptr(), x.data_ptr(), weight.data_ptr()), (out.stride(0), x.stride(0))
        launch(rms_norm_kernel, x.shape[0], x.numel(), *pointers, *strides, size, eps, *likes)


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
        add_rms_norm_row_kernel(*(t.data_ptr() for t in tensors), weight.data_ptr(), 0, 0, 0, 0, size, eps, *likes)
    else:
        names = ("out", "residual_out", "x", "residual")
        rows = [as_rows(name, tensor) for name, tensor in zip(names, tensors, strict=True)]
        pointers, strides = (t.data_ptr() for t in rows), (t.stride(0) for t in rows)
        launch(
            add_rms_norm_kernel, rows[0].shape[0], x.numel(), *pointers, weight.data_ptr(), *strides, size, eps, *likes
        )
