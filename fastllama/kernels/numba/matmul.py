"""Dense products of a few rows with a weight that is read once, at memory speed.

On two AVX2 cores that read 29 GB/s, torch's bf16 product of one row is bound by its arithmetic at 20 GB/s; this one
reaches 27 (docs/tuning.md).
"""

from __future__ import annotations

import numba
import numpy as np
from torch import Tensor

from fastllama.kernels import cpu
from fastllama.kernels.checks import as_rows
from fastllama.kernels.numba.numerics import LIKE, match_threads, narrow, parallel_jit, vector, widen

ROW_LIMIT = 32  # beyond, widening the weight once for a blocked fp32 product is as fast


# One iteration owns four output features: a value of x, loaded once, serves four rows of the weight.
@parallel_jit
def one_row_kernel(weight_ptr, x_ptr, out_ptr, weight_stride, features, size, like):
    x, out = vector(x_ptr, 0, size, np.float32(0)), vector(out_ptr, 0, features, like)
    quads = features // 4
    for quad in numba.prange(quads + 1):
        n = 4 * quad
        if quad < quads:
            weight_a = vector(weight_ptr, n * weight_stride, size, like)
            weight_b = vector(weight_ptr, (n + 1) * weight_stride, size, like)
            weight_c = vector(weight_ptr, (n + 2) * weight_stride, size, like)
            weight_d = vector(weight_ptr, (n + 3) * weight_stride, size, like)
            a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for k in range(size):
                value = x[k]
                a += widen(weight_a[k]) * value
                b += widen(weight_b[k]) * value
                c += widen(weight_c[k]) * value
                d += widen(weight_d[k]) * value
            out[n] = narrow(a, like)
            out[n + 1] = narrow(b, like)
            out[n + 2] = narrow(c, like)
            out[n + 3] = narrow(d, like)
        else:
            for last in range(n, features):
                weight_a = vector(weight_ptr, last * weight_stride, size, like)
                a = np.float32(0)
                for k in range(size):
                    a += widen(weight_a[k]) * x[k]
                out[last] = narrow(a, like)


# One iteration owns two output features for all rows of x, two at a time, while the weights stay in the first cache.
@parallel_jit
def rows_kernel(weight_ptr, x_ptr, out_ptr, weight_stride, out_stride, rows, features, size, like):
    for pair in numba.prange((features + 1) // 2):
        n = 2 * pair
        next_n = min(n + 1, features - 1)
        weight_a = vector(weight_ptr, n * weight_stride, size, like)
        weight_b = vector(weight_ptr, next_n * weight_stride, size, like)
        for m in range(0, rows, 2):
            next_m = min(m + 1, rows - 1)
            x_a, x_b = vector(x_ptr, m * size, size, np.float32(0)), vector(x_ptr, next_m * size, size, np.float32(0))
            a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for k in range(size):
                first, second = widen(weight_a[k]), widen(weight_b[k])
                a += first * x_a[k]
                b += second * x_a[k]
                c += first * x_b[k]
                d += second * x_b[k]
            out_a = vector(out_ptr, m * out_stride, features, like)
            out_b = vector(out_ptr, next_m * out_stride, features, like)
            out_a[n] = narrow(a, like)
            out_a[next_n] = narrow(b, like)
            out_b[n] = narrow(c, like)
            out_b[next_n] = narrow(d, like)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See kernels.matmul."""
    (features, size), like = weight.shape, LIKE.get(x.dtype)
    rows = x.numel() // size if size else 0
    if not 1 <= rows <= ROW_LIMIT or like is None:
        cpu.matmul(x, weight, bias, out)
        return
    match_threads()
    wide = x.float()
    if rows == 1:
        one_row_kernel(weight.data_ptr(), wide.data_ptr(), out.data_ptr(), weight.stride(0), features, size, like)
    else:
        target, wide = as_rows("out", out), as_rows("x", wide).contiguous()
        rows_kernel(
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
