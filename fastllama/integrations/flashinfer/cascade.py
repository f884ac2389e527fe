"""FlashInfer's `cascade`: merges attention over disjoint parts of the keys. All log-sum-exps are to base 2."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.errors import check_dtype, check_shape
from fastllama.integrations.flashinfer.checks import check_optional, check_tensors
from fastllama.kernels.reference.numerics import wide_dtype


def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over some keys (v_a, s_a) with attention over the others (v_b, s_b).

    v_a, v_b: [T, H, D]. s_a, s_b: [T, H], log-sum-exps to base 2. Returns (v, s): see `kernels.merge_state`.
    """
    check_tensors(v_a=v_a, s_a=s_a, v_b=v_b, s_b=s_b)
    return kernels.merge_state(v_a, s_a.to(wide_dtype(v_a)), v_b, s_b.to(wide_dtype(v_a)), base2=True)


def merge_state_in_place(v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None) -> None:
    """Merge (v_other, s_other) into v [T, H, D] and s [T, H] fp32; where mask [T] is False, both stay as they are.

    The mask is not read on the host, so a CUDA graph may hold the call.
    """
    check_tensors(v=v, s=s, v_other=v_other, s_other=s_other)
    check_optional(mask=mask)
    check_dtype("s", s, (wide_dtype(v),))
    s_other = s_other.to(s.dtype)
    if mask is None:
        kernels.merge_state(v, s, v_other, s_other, base2=True, out=v, lse_out=s)
        return
    check_shape("mask", mask, v.shape[:1])
    check_dtype("mask", mask, (torch.bool,))
    merged, merged_s = kernels.merge_state(v, s, v_other, s_other, base2=True)
    v.copy_(torch.where(mask[:, None, None], merged, v))
    s.copy_(torch.where(mask[:, None], merged_s, s))


def merge_states(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over N parts of the keys: v [T, N, H, D], s [T, N, H]; returns [T, H, D], [T, H].

    In torch, in fp32, also under autocast, rounded once. A part whose log-sum-exp is -inf or +inf had no keys, and is
    ignored.
    """
    check_tensors(v=v, s=s)
    check_shape("v", v, ("T", "N", "H", "D"))
    check_shape("s", s, v.shape[:3])
    if not v.shape[1]:
        raise ValueError(f"v has shape {list(v.shape)}; legal: [T, N, H, D], N at least 1")
    s = s.to(wide_dtype(v))
    s = s.masked_fill(s == math.inf, -math.inf)
    peak = s.amax(1, keepdim=True)
    peak = peak.masked_fill(peak == -math.inf, 0.0)
    weights = torch.exp2(s - peak)
    total = weights.sum(1)
    seen = v.to(s.dtype).masked_fill((weights == 0)[..., None], 0.0)
    merged = (weights[..., None] * seen).sum(1) / total.masked_fill(total == 0, 1.0)[..., None]
    return merged.to(v.dtype), peak.squeeze(1) + total.log2()
