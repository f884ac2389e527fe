"""silu_mul: silu(gate) * up in one pass."""

from __future__ import annotations

import numba
import numpy as np
from torch import Tensor

from fastllama.kernels import reference
from fastllama.kernels.dispatch.checks import as_rows
from fastllama.kernels.numba.numerics import FAST, LIKE, as_written, exp, jit, load, store
from fastllama.kernels.numba.pieces import enter, leave, proceed
from fastllama.kernels.numba.threads import launch

END = np.float32(88)  # `exp` returns e^88 beyond


# Not reassociated: gate * up may overflow where the result does not.
@as_written
def times(silu, up):
    return silu * up


# As in torch, a gate of -90 gives -0, as e^90 is infinite in fp32, and -inf gives NaN; `exp`, clamped to e^88, would
# give -60 for a gate of -100 and an up of 1e38. The correction past the clamp is e^x to 0.7 % up to the largest number
# and infinite beyond: 2 % slower than without, where a branch takes 8 %.
@numba.njit(fastmath=FAST, error_model="numpy")
def silu_mul_of(gate, up):
    past = max(-gate - END, np.float32(0))
    power = exp(-gate) * (np.float32(1) + past + np.float32(0.61) * (past * past))
    return times(gate / (np.float32(1) + power), up)


@jit
def silu_mul_row_kernel(gate_ptr, up_ptr, out_ptr, gate_start, up_start, out_start, size, like):
    for i in range(size):
        gate = load(gate_ptr, gate_start + i, like)
        up = load(up_ptr, up_start + i, like)
        store(out_ptr, out_start + i, silu_mul_of(gate, up), like)


# One iteration owns one row.
@jit
def silu_mul_rows_kernel(region, *args):
    gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, out_stride, size, like = args
    first, last = enter(region, args)
    while first < last:
        for row in range(first, last):
            gate_start, up_start = row * gate_stride, row * up_stride
            silu_mul_row_kernel(gate_ptr, up_ptr, out_ptr, gate_start, up_start, row * out_stride, size, like)
        first, last = proceed(region)
    return leave(region)


def silu_mul(gate_up: Tensor, up: Tensor | None, out: Tensor) -> None:
    """See kernels.silu_mul."""
    like, size = LIKE.get(out.dtype), out.shape[-1]
    if like is None:
        out.copy_(reference.silu_mul(gate_up, up))
        return
    gate_ptr = gate_up.data_ptr()
    up_ptr = gate_ptr + size * out.itemsize if up is None else up.data_ptr()
    pointers = gate_ptr, up_ptr, out.data_ptr()
    if out.numel() == size:
        silu_mul_row_kernel(*pointers, 0, 0, 0, size, like)
        return
    gates, target = as_rows("gate_up", gate_up), as_rows("out", out)
    ups = gates if up is None else as_rows("up", up)
    strides = gates.stride(0), ups.stride(0), target.stride(0)
    launch(silu_mul_rows_kernel, target.shape[0], 8 * out.numel(), *pointers, *strides, size, like)
