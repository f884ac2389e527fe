"""Merges two attention results over disjoint keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastllama.kernels.reference.numerics import wide

LN2 = math.log(2)


def merge_state(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor, base2: bool = False) -> tuple[Tensor, Tensor]:
    """Each side weighted by its share of the exponentials; a side of -inf or +inf, without any key, is ignored."""
    a_lse, b_lse = (lse.masked_fill(lse == math.inf, -math.inf) for lse in (a_lse, b_lse))
    no_a, no_b = (lse[..., None] == -math.inf for lse in (a_lse, b_lse))
    lead = (a_lse - b_lse)[..., None] * (LN2 if base2 else 1.0)
    out = wide(a) * lead.sigmoid() + wide(b) * (-lead).sigmoid()
    out = torch.where(no_a, wide(b), torch.where(no_b, wide(a), out)).masked_fill(no_a & no_b, 0.0)
    return out.to(a.dtype), (torch.logaddexp2 if base2 else torch.logaddexp)(a_lse, b_lse)
