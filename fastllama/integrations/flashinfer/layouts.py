"""Converts FlashInfer's layouts, dtypes and scales to those of the ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastllama.errors import check_choice, check_shape
from fastllama.integrations.flashinfer.checks import check_tensors, number
from fastllama.kernels.dispatch.checks import CODES

Cache = Tensor | tuple[Tensor, Tensor]
Dtype = str | torch.dtype | None


def check_layout(kv_layout: str) -> None:
    """Raise ValueError unless it is NHD (tokens before heads) or HND."""
    check_choice("kv_layout", kv_layout, ("NHD", "HND"))


def as_pages(paged_kv_cache: Cache, kv_layout: str) -> tuple[Tensor, Tensor]:
    """Keys and values as views [P, Hkv, page_size, D].

    paged_kv_cache: a pair of [P, page_size, Hkv, D] (NHD) or [P, Hkv, page_size, D] (HND), or one tensor
    [P, 2, ...] of both. Without the dimension page_size, a page has one token.
    """
    if isinstance(paged_kv_cache, Tensor):
        if paged_kv_cache.dim() not in (4, 5) or paged_kv_cache.shape[1] != 2:
            raise ValueError(
                f"paged_kv_cache has shape {list(paged_kv_cache.shape)}; legal: [P, 2, ...] of 4 or 5 dims"
            )
        k, v = paged_kv_cache[:, 0], paged_kv_cache[:, 1]
    elif isinstance(paged_kv_cache, (tuple, list)) and len(paged_kv_cache) == 2:
        k, v = paged_kv_cache
    else:
        raise TypeError(f"paged_kv_cache is of type {type(paged_kv_cache).__name__}; legal: a tensor or two in a tuple")
    return _pages("paged_kv_cache[0]", k, kv_layout), _pages("paged_kv_cache[1]", v, kv_layout)


def _pages(name: str, x: Tensor, kv_layout: str) -> Tensor:
    check_tensors(**{name: x})
    if x.dim() == 3:
        return x.unsqueeze(2)
    if x.dim() != 4:
        raise ValueError(f"{name} has shape {list(x.shape)}; legal: 3 or 4 dimensions")
    return x.transpose(1, 2) if kv_layout == "NHD" else x


def as_tokens(name: str, x: Tensor, kv_layout: str) -> Tensor:
    """Unpaged keys or values as a view [T, Hkv, D]."""
    check_tensors(**{name: x})
    check_shape(name, x, ("T", "Hkv", "D") if kv_layout == "NHD" else ("Hkv", "T", "D"))
    return x if kv_layout == "NHD" else x.transpose(0, 1)


def dtype_of(name: str, given: Any, legal: Sequence[torch.dtype] = ()) -> torch.dtype:
    """A dtype, given as such or by its name in torch. ValueError for another value, TypeError for an illegal dtype."""
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name} is {given!r}; legal: a dtype of torch, or its name")
    if legal and found not in legal:
        raise TypeError(f"{name} is {found}; legal: {', '.join(map(str, legal))}")
    return found


def softmax_scale(
    function: str, sm_scale: float | None, head_dim: int, q_scale: float | None, k_scale: float | None = None
) -> float:
    """The factor of q k^T: sm_scale, by default 1 / sqrt(D), times the given scales of q and k."""
    scale = head_dim**-0.5 if sm_scale is None else number(function, "sm_scale", sm_scale)
    for name, given in (("q_scale", q_scale), ("k_scale", k_scale)):
        if given is not None:
            scale *= number(function, name, given)
    return scale


def page_scales(function: str, k_scale: float | None, v_scale: float | None, pages: Tensor) -> list[float | None]:
    """The op's k_scale and v_scale; default 1 for 8-bit pages, which need a scale."""
    missing = 1.0 if pages.dtype in CODES else None
    given = (("k_scale", k_scale), ("v_scale", v_scale))
    return [missing if scale is None else number(function, name, scale) for name, scale in given]
