"""matmul of a few rows by a weight that is read once, at memory speed.

On two AVX2 cores that read 29 GB/s, torch's bf16 matmul of one row is bound by its arithmetic at 20 GB/s; this one
reaches 27 (docs/measured/cpu.md).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastllama.kernels import cpu
from fastllama.kernels.dispatch.checks import as_rows
from fastllama.kernels.numba.numerics import LIKE, jit, load, prefetch, store
from fastllama.kernels.numba.pieces import enter, leave, proceed
from fastllama.kernels.numba.threads import launch

ROW_LIMIT = 32  # beyond, widening the weight once for a blocked fp32 matmul is as fast


LINE = 32  # elements of 16 bits in a cache line
AHEAD = 8  # rows: two iterations


# One iteration owns four output features: a value of x, loaded once, serves four rows of the weight.
@jit
def matmul_row_kernel(region, *args):
    weight_ptr, x_ptr, out_ptr, weight_stride, features, size, like = args
    first, last = enter(region, args)
    while first < last:
        for quad in range(first, last):
            n = 4 * quad
            row_a, row_b = n * weight_stride, min(n + 1, features - 1) * weight_stride
            row_c, row_d = min(n + 2, features - 1) * weight_stride, min(n + 3, features - 1) * weight_stride
            # Sums over 32 columns in fp32, of these in fp64: as exact as a matmul blocked for registers.
            all_a, all_b, all_c, all_d = np.float64(0), np.float64(0), np.float64(0), np.float64(0)
            for start in range(0, size, LINE):
                # The hardware's prefetchers stop at each page, a row of 2048: 24 GB/s without this, 29 with.
                ahead = start + AHEAD * weight_stride
                prefetch(weight_ptr, row_a + ahead, like)
                prefetch(weight_ptr, row_b + ahead, like)
                prefetch(weight_ptr, row_c + ahead, like)
                prefetch(weight_ptr, row_d + ahead, like)
                a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
                for k in range(start, min(start + LINE, size)):
                    value = load(x_ptr, k, like)
                    a += load(weight_ptr, row_a + k, like) * value
                    b += load(weight_ptr, row_b + k, like) * value
                    c += load(weight_ptr, row_c + k, like) * value
                    d += load(weight_ptr, row_d + k, like) * value
                all_a += np.float64(a)
                all_b += np.float64(b)
                all_c += np.float64(c)
                all_d += np.float64(d)
            a, b, c, d = np.float32(all_a), np.float32(all_b), np.float32(all_c), np.float32(all_d)
            store(out_ptr, n, a, like)
            if n + 3 < features:
                store(out_ptr, n + 1, b, like)
                store(out_ptr, n + 2, c, like)
                store(out_ptr, n + 3, d, like)
            else:
                if n + 1 < features:
                    store(out_ptr, n + 1, b, like)
                if n + 2 < features:
                    store(out_ptr, n + 2, c, like)
        first, last = proceed(region)
    return leave(region)


# x in float32. torch would wake its threads for it, which then spin on cores that ours need.
@jit
def widen_rows_kernel(x_ptr, wide_ptr, x_stride, rows, size, like):
    for m in range(rows):
        for k in range(size):
            store(wide_ptr, m * size + k, load(x_ptr, m * x_stride + k, like), np.float32(0))


# One iteration owns two output features for all rows of x, two at a time, while the weights stay in the first cache.
@jit
def matmul_rows_kernel(region, *args):
    weight_ptr, x_ptr, out_ptr, weight_stride, out_stride, rows, features, size, like = args
    first, last = enter(region, args)
    while first < last:
        for pair in range(first, last):
            n = 2 * pair
            next_n = min(n + 1, features - 1)
            row_a, row_b = n * weight_stride, next_n * weight_stride
            for m in range(0, rows, 2):
                next_m = min(m + 1, rows - 1)
                a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
                for k in range(size):
                    weight_a, weight_b = load(weight_ptr, row_a + k, like), load(weight_ptr, row_b + k, like)
                    x_a, x_b = load(x_ptr, m * size + k, np.float32(0)), load(x_ptr, next_m * size + k, np.float32(0))
                    a += weight_a * x_a
                    b += weight_b * x_a
                    c += weight_a * x_b
                    d += weight_b * x_b
                store(out_ptr, m * out_stride + n, a, like)
                store(out_ptr, m * out_stride + next_n, b, like)
                store(out_ptr, next_m * out_stride + n, c, like)
                store(out_ptr, next_m * out_stride + next_n, d, like)
        first, last = proceed(region)
    return leave(region)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, workspace: Tensor | None) -> None:
    """See kernels.matmul."""
    (features, size), like = weight.shape, LIKE.get(x.dtype)
    rows = x.numel() // size if size else 0
    if not 1 <= rows <= ROW_LIMIT or like is None:
        cpu.matmul(x, weight, bias, out, workspace)
        return
    work = rows * features * size
    if rows == 1:
        launch(
            matmul_row_kernel,
            (features + 3) // 4,
            work,
            weight.data_ptr(),
            x.data_ptr(),
            out.data_ptr(),
            weight.stride(0),
            features,
            size,
            like,
        )
    else:
        target, source = as_rows("out", out), as_rows("x", x)
        wide = torch.empty(rows, size, dtype=torch.float32, device=x.device)
        widen_rows_kernel(source.data_ptr(), wide.data_ptr(), source.stride(0), rows, size, like)
        launch(
            matmul_rows_kernel,
            (features + 1) // 2,
            work,
            weight.data_ptr(),
            wide.data_ptr(),
            target.data_ptr(),
            weight.stride(0),
            target.stride(0),
            rows,
            features,
            size,
            like,
        )
    if bias is not None:
        out += bias
