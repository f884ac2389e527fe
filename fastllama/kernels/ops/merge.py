"""merge_state."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.errors import check_dtype, check_shape
from fastllama.kernels import reference
from fastllama.kernels.dispatch.checks import FLOATS, check_elements, check_tensor
from fastllama.kernels.dispatch.op import Op
from fastllama.kernels.ops.compiled import triton_kernels
from fastllama.kernels.reference.numerics import wide_dtype


def _check(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor, base2: bool, out: Tensor, lse_out: Tensor) -> None:
    check_shape("a", a, ("T", "H", "D"))
    check_elements("a", a, FLOATS)
    check_tensor("b", b, a.shape, (a.dtype,))
    check_tensor("out", out, a.shape, (a.dtype,))
    for name, lse in (("a_lse", a_lse), ("b_lse", b_lse), ("lse_out", lse_out)):
        check_shape(name, lse, a.shape[:2])
        check_dtype(name, lse, (wide_dtype(a),))


_MERGE_STATE = Op(
    "merge_state(Tensor a, Tensor a_lse, Tensor b, Tensor b_lse, bool base2, Tensor(a!) out, Tensor(b!) lse_out) -> ()",
    check=_check,
    reference=reference.merge_state,
    in_place={"out": {"a": 1, "b": 1}, "lse_out": {"a_lse": 1, "b_lse": 1}},
    triton=triton_kernels,
)


def merge_state(
    a: Tensor,
    a_lse: Tensor,
    b: Tensor,
    b_lse: Tensor,
    *,
    base2: bool = False,
    out: Tensor | None = None,
    lse_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over all keys, from the same queries' attention over some of them and over the others.

    For a prefix that sequences share (its keys read once for all of them) and for contexts in parts.
    a, b: [T, H, D], what attention over either set gave, one floating dtype; last dimension contiguous, other strides
    free. a_lse, b_lse: [T, H] fp32 (fp64 where a is), its log-sum-exp, as `attention_varlen` returns it; any strides,
    so flash-attn's [H, T] is passed as `lse.T`.
    base2: log-sum-exps, given and returned, are to base 2, as FlashInfer's are; natural logs where False.
    A log-sum-exp of -inf, and flash-attn's +inf, mean that no key was seen: the other side is returned bit for bit,
    whatever this one holds; where both say so, 0 and -inf.
    out: like a, may be a or b itself. lse_out: like a_lse, may be a_lse or b_lse. Allocated when None. Returns (out,
    lse_out).
    Computed in fp32, rounded once, at the end. Raises ValueError for a shape, stride or device, TypeError for a dtype;
    nothing is written then.
    Source: Dao et al., Flash-Decoding (2023); Juravsky et al., Hydragen (2024); Ye et al., Cascade Inference (2024).
    """
    if out is None:
        out = torch.empty_like(a)
    if lse_out is None:
        lse_out = torch.empty(a.shape[:2], dtype=wide_dtype(a), device=a.device)
    _MERGE_STATE(a, a_lse, b, b_lse, base2, out, lse_out)
    return out, lse_out
