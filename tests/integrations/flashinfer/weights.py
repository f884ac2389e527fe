"""The tokens that a filter keeps, by its definition: token by token, in fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def filtered(
    weights: Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    filter_apply_order: str = "top_k_first",
) -> Tensor:
    """weights [V], of any sum, with all that is not kept set to 0: top_k, then top_p, then min_p.

    A token is kept if fewer than top_k are likelier, if those likelier have less than top_p together, and if it has
    min_p of what the likeliest has.
    """
    likelier = weights[None] > weights[:, None]  # [token, other]
    kept = weights > 0
    if top_k is not None:
        kept = kept & (likelier.sum(1) < top_k)
    if top_p is not None:
        seen = weights * kept if filter_apply_order == "top_k_first" else weights
        kept = kept & ((likelier * seen).sum(1) < top_p * seen.sum())
    if min_p is not None:
        kept = kept & (weights >= min_p * weights.max())
    return weights * kept


def is_close_call(weights: Tensor, filter_apply_order: str = "top_k_first", **filters: Any) -> bool:
    """Whether a filter a thousandth smaller or larger would keep other tokens, so that rounding may decide."""
    cuts = []
    for factor in (0.999, 1.001):
        near = {name: value if name == "top_k" else min(value * factor, 1.0) for name, value in filters.items()}
        cuts.append(filtered(weights, **near, filter_apply_order=filter_apply_order))
    return not torch.equal(*cuts)
