"""The op merge_state."""

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
    """Merge attention of the same queries over two disjoint sets of keys into attention over all keys.

    For shared prefixes (whose keys are read once for all sequences) and for contexts that are split.
    a, b: [T, H, D], attention over each set, one floating dtype; last dimension contiguous, other strides free. a_lse,
    b_lse: [T, H] fp32 (fp64 where a is), their log-sum-exps, as `attention_varlen` returns them; any strides, so
    flash-attn's [H, T] is passed as `lse.T`.
    base2: log-sum-exps, passed and returned, are to base 2, as FlashInfer's are; natural logs where False.
    A log-sum-exp of -inf, or flash-attn's +inf, means an empty set of keys: the other side is returned bit for bit,
    even if this side is NaN; where both sets are empty, 0 and -inf.
    out: like a, may be a or b itself. lse_out: like a_lse, may be a_lse or b_lse. Allocated when None. Returns (out,
    lse_out).
    Computed in fp32 and rounded once. Raises ValueError for a shape, stride or device, TypeError for a dtype;
    nothing is written then.
    Source: Dao et al., Flash-Decoding (2023); Juravsky et al., Hydragen (2024); Ye et al., Cascade Inference (2024).

    Example:
        >>> q, k, v = torch.randn(1, 2, 8), torch.randn(6, 2, 8), torch.randn(6, 2, 8)
        >>> one, half, all_keys = torch.tensor([0, 1]), torch.tensor([0, 3]), torch.tensor([0, 6])
        >>> a, b = (kernels.attention_varlen(q, k[i:][:3], v[i:][:3], one, half, return_lse=True) for i in (0, 3))
        >>> out, lse = kernels.merge_state(*a, *b)
        >>> torch.allclose(out, kernels.attention_varlen(q, k, v, one, all_keys), atol=1e-6)
        True
    """
    if out is None:
        out = torch.empty_like(a)
    if lse_out is None:
        lse_out = torch.empty(a.shape[:2], dtype=wide_dtype(a), device=a.device)
    _MERGE_STATE(a, a_lse, b, b_lse, base2, out, lse_out)
    return out, lse_out
