"""Two attention results over disjoint keys as one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastllama.kernels.reference.numerics import wide


def merge_state(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Each weighed by its share of the exponentials; one of -inf, which saw no key, is not looked at.

    One of +inf, which attention never gives, makes NaN.
    """
    a_share, b_share = torch.stack((a_lse, b_lse)).softmax(0)[..., None]
    no_a, no_b = (lse[..., None] == float("-inf") for lse in (a_lse, b_lse))
    out = wide(a) * a_share + wide(b) * b_share
    out = torch.where(no_a, wide(b), torch.where(no_b, wide(a), out)).masked_fill(no_a & no_b, 0.0)
    lse = torch.logaddexp(a_lse, b_lse)
    return out.to(a.dtype), lse.masked_fill(lse == math.inf, math.nan)
