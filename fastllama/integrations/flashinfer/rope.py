"""FlashInfer's rotary embeddings: from a base frequency, with Llama 3.1's scaling, or from a cos/sin cache.

Positions are on the device, so the length of a cos/sin cache for them is unknown: the angles of the given tokens are
computed there, [T, R] fp32, without synchronization. Frequencies are computed in fp64 and rounded to fp32; an angle is
frequency times position in fp32, as in the op's own cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.errors import check_device, check_dtype, check_shape
from fastllama.integrations.flashinfer.checks import check_integer, check_tensors
from fastllama.kernels.dispatch.checks import INTEGERS


def apply_rope(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys of B ragged segments. Returns new (q, k).

    q: [T, Hq, D], k: [T, Hkv, D], one floating dtype, last dimension contiguous. indptr: [B + 1] int32 or int64, the
    bounds of the segments: tokens past the last one are unchanged. offsets: [B], the position of each segment's first
    token.
    rotary_dim: number of leading dimensions of D to rotate; None for all. interleave: pairs (x_2i, x_2i+1), otherwise
    (x_i, x_{i + rotary_dim/2}). Frequencies: rope_theta^(-2i / rotary_dim) / rope_scale.
    Raises ValueError for a shape, stride, device or number, TypeError for a dtype; nothing is written then.
    """
    inv_freq = _frequencies(q, rotary_dim, rope_scale, rope_theta)
    return _rotate(q, k, _positions(q, indptr, offsets), inv_freq, interleave)


def apply_rope_inplace(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """`apply_rope` in place; q and k may be slices of one tensor."""
    inv_freq = _frequencies(q, rotary_dim, rope_scale, rope_theta)
    _rotate(q, k, _positions(q, indptr, offsets), inv_freq, interleave, in_place=True)


def apply_rope_pos_ids(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> tuple[Tensor, Tensor]:
    """`apply_rope` with the position of each token. pos_ids: [T] int32 or int64."""
    return _rotate(q, k, pos_ids, _frequencies(q, rotary_dim, rope_scale, rope_theta), interleave)


def apply_rope_pos_ids_inplace(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """`apply_rope_pos_ids` in place."""
    _rotate(q, k, pos_ids, _frequencies(q, rotary_dim, rope_scale, rope_theta), interleave, in_place=True)


def apply_llama31_rope(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> tuple[Tensor, Tensor]:
    """`apply_rope` with Llama 3.1's frequencies.

    Frequencies with fewer than low_freq_factor turns in old_context_len tokens are divided by rope_scale, those with
    more than high_freq_factor turns stay, and those between are interpolated.
    """
    scaling = (low_freq_factor, high_freq_factor, old_context_len)
    inv_freq = _frequencies(q, rotary_dim, rope_scale, rope_theta, scaling)
    return _rotate(q, k, _positions(q, indptr, offsets), inv_freq, interleave)


def apply_llama31_rope_inplace(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """`apply_llama31_rope` in place."""
    scaling = (low_freq_factor, high_freq_factor, old_context_len)
    inv_freq = _frequencies(q, rotary_dim, rope_scale, rope_theta, scaling)
    _rotate(q, k, _positions(q, indptr, offsets), inv_freq, interleave, in_place=True)


def apply_llama31_rope_pos_ids(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> tuple[Tensor, Tensor]:
    """`apply_llama31_rope` with the position of each token. pos_ids: [T] int32 or int64."""
    scaling = (low_freq_factor, high_freq_factor, old_context_len)
    return _rotate(q, k, pos_ids, _frequencies(q, rotary_dim, rope_scale, rope_theta, scaling), interleave)


def apply_llama31_rope_pos_ids_inplace(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """`apply_llama31_rope_pos_ids` in place."""
    scaling = (low_freq_factor, high_freq_factor, old_context_len)
    inv_freq = _frequencies(q, rotary_dim, rope_scale, rope_theta, scaling)
    _rotate(q, k, pos_ids, inv_freq, interleave, in_place=True)


def apply_rope_with_cos_sin_cache(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool = True
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys with a cache of cosines and sines. Returns new (query, key) of the same shapes.

    positions: [T] int32 or int64, each below max_position; others give NaN. query: [T, Hq * head_size], key:
    [T, Hkv * head_size], or [T, heads, head_size], one floating dtype, last dimension contiguous. cos_sin_cache:
    [max_position, R] fp32, R/2 cosines, then R/2 sines; R is even and at most head_size. is_neox: pairs
    (x_i, x_{i + R/2}), otherwise (x_2i, x_2i+1).
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    """
    check_tensors(query=query, key=key)
    query_out, key_out = torch.empty_like(query), torch.empty_like(key)
    _rotate_by_cache(positions, query, key, head_size, cos_sin_cache, is_neox, query_out, key_out)
    return query_out, key_out


def apply_rope_with_cos_sin_cache_inplace(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool = True
) -> None:
    """`apply_rope_with_cos_sin_cache` in place; query and key may be slices of one tensor. Allocates nothing."""
    _rotate_by_cache(positions, query, key, head_size, cos_sin_cache, is_neox, query, key)


def _rotate_by_cache(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
    query_out: Tensor,
    key_out: Tensor,
) -> None:
    check_tensors(positions=positions, query=query, key=key, cos_sin_cache=cos_sin_cache)
    check_integer("head_size", head_size, 1)
    shape = cos_sin_cache.shape
    if len(shape) != 2 or shape[1] % 2 or shape[1] > head_size:
        raise ValueError(
            f"cos_sin_cache has shape {list(shape)}; legal: [max_position, R] with R even and at most {head_size}"
        )
    check_dtype("cos_sin_cache", cos_sin_cache, (torch.float32,))
    check_device("cos_sin_cache", cos_sin_cache, "query", query)
    q, q_out = _heads("query", query, head_size), _heads("query", query_out, head_size)
    k, k_out = _heads("key", key, head_size), _heads("key", key_out, head_size)
    kernels.rope(q, k, cos_sin_cache, positions, interleaved=not is_neox, q_out=q_out, k_out=k_out)


def _heads(name: str, x: Tensor, head_size: int) -> Tensor:
    """A view [T, heads, head_size]."""
    if x.dim() == 3 and x.shape[2] == head_size:
        return x
    if head_size < 1 or x.dim() != 2 or x.shape[1] % head_size:
        raise ValueError(f"{name} has shape {list(x.shape)}; legal for head_size {head_size}: [T, heads * head_size]")
    return x.unflatten(1, (x.shape[1] // head_size, head_size))


def _rotate(
    q: Tensor, k: Tensor, pos_ids: Tensor, inv_freq: Tensor, interleave: bool, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    check_tensors(k=k, pos_ids=pos_ids)
    check_shape("pos_ids", pos_ids, q.shape[:1])
    check_dtype("pos_ids", pos_ids, INTEGERS)
    check_device("pos_ids", pos_ids, "q", q)
    angles = pos_ids.float()[:, None] * inv_freq
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    rows = torch.arange(pos_ids.shape[0], dtype=torch.int32, device=q.device)
    q_out, k_out = (q, k) if in_place else (None, None)
    return kernels.rope(q, k, cos_sin, rows, interleaved=interleave, q_out=q_out, k_out=k_out)


def _positions(q: Tensor, indptr: Tensor, offsets: Tensor) -> Tensor:
    """[T] int64: the position of each token in its segment; 0, no rotation, past the last segment."""
    check_tensors(indptr=indptr, offsets=offsets)
    check_shape("offsets", offsets, ("B",))
    if not offsets.shape[0]:
        raise ValueError("offsets has shape [0]; legal: [B] with B at least 1")
    check_shape("indptr", indptr, (offsets.shape[0] + 1,))
    for name, tensor in (("indptr", indptr), ("offsets", offsets)):
        check_dtype(name, tensor, INTEGERS)
        check_device(name, tensor, "q", q)
    indptr = indptr.long().contiguous()
    tokens = torch.arange(q.shape[0], dtype=torch.int64, device=q.device)
    segments = torch.searchsorted(indptr[:-1], tokens, right=True) - 1  # equal starts: the non-empty segment
    positions = tokens - indptr[segments] + offsets[segments]
    return torch.where(tokens < indptr[-1], positions, 0)


def _frequencies(
    q: Tensor,
    rotary_dim: int | None,
    rope_scale: float,
    rope_theta: float,
    scaling: tuple[float, float, float] | None = None,
) -> Tensor:
    """[R/2] fp32, radians per position. scaling: Llama 3.1's low and high factor, and the context it was trained on."""
    check_tensors(q=q)
    check_shape("q", q, ("T", "Hq", "D"))
    if rotary_dim is not None:
        check_integer("rotary_dim", rotary_dim, 2)
    size = q.shape[2] if rotary_dim is None else rotary_dim
    if size % 2 or not 0 < size <= q.shape[2]:
        raise ValueError(
            f"rotary_dim is {rotary_dim}; legal for heads of {q.shape[2]}: None where that is even, or an "
            "even number from 2 to it"
        )
    _check_positive("rope_scale", rope_scale)
    _check_positive("rope_theta", rope_theta)
    exponents = torch.arange(0, size, 2, dtype=torch.float64, device=q.device) / size
    inv_freq = rope_theta**-exponents
    if scaling is None:
        return (inv_freq / rope_scale).float()
    low, high, context = scaling
    _check_positive("low_freq_factor", low)
    _check_positive("old_context_len", context)
    if not low < high < math.inf:
        raise ValueError(f"high_freq_factor is {high}; legal: above low_freq_factor, {low}")
    turns = inv_freq * (context / (2 * math.pi))
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (kept * inv_freq + (1 - kept) * inv_freq / rope_scale).float()


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; legal: a finite number above 0")
