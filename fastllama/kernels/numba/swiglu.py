"""silu(gate) * up in one pass."""

from __future__ import annotations

import numba
import numpy as np
from torch import Tensor

from fastllama.kernels import reference
from fastllama.kernels.checks import as_rows
from fastllama.kernels.numba.numerics import LIKE, exp, jit, match_threads, narrow, parallel_jit, vector, widen


@jit
def silu_mul_row(gate_up, out, like):
    """One row: gate_up [2 * size], out [size]."""
    size = out.shape[0]
    for i in range(size):
        gate = widen(gate_up[i])
        silu = gate / (np.float32(1) + exp(-gate))
        out[i] = narrow(silu * widen(gate_up[size + i]), like)


@jit
def one_row_kernel(gate_up_ptr, out_ptr, size, like):
    silu_mul_row(vector(gate_up_ptr, 0, 2 * size, like), vector(out_ptr, 0, size, like), like)


# One iteration owns one row.
@parallel_jit
def rows_kernel(gate_up_ptr, out_ptr, gate_up_stride, out_stride, rows, size, like):
    for row in numba.prange(rows):
        gate_up = vector(gate_up_ptr, row * gate_up_stride, 2 * size, like)
        silu_mul_row(gate_up, vector(out_ptr, row * out_stride, size, like), like)


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """See kernels.silu_mul."""
    like, size = LIKE.get(out.dtype), out.shape[-1]
    if like is None:
        out.copy_(reference.silu_mul(gate_up))
    elif out.numel() == size:
        one_row_kernel(gate_up.data_ptr(), out.data_ptr(), size, like)
    else:
        source, target = as_rows("gate_up", gate_up), as_rows("out", out)
        match_threads()
        rows_kernel(
            source.data_ptr(), target.data_ptr(), source.stride(0), target.stride(0), source.shape[0], size, like
        )
