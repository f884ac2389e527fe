"""The ops rope and rope_and_write_kv, and the cos/sin cache that both read."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.errors import check_shape
from fastllama.kernels import reference
from fastllama.kernels.dispatch.checks import CODES, FLOATS, INTEGERS, check_elements, check_scales, check_tensor
from fastllama.kernels.dispatch.op import Op
from fastllama.kernels.ops import values
from fastllama.kernels.ops.compiled import numba_kernels, triton_kernels

_FP32 = (torch.float32,)


def _check_rope(
    q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool, q_out: Tensor, k_out: Tensor
) -> None:
    q_shape, k_shape, dtype = q.shape, k.shape, (q.dtype,)
    check_shape("q", q, ("T", "Hq", "D"))
    check_shape("k", k, (q_shape[0], "Hkv", q_shape[2]))
    check_elements("q", q, FLOATS)
    check_elements("k", k, dtype)
    _check_angles(cos_sin, positions, q_shape[0], q_shape[2], dtype)
    check_tensor("q_out", q_out, q_shape, dtype)
    check_tensor("k_out", k_out, k_shape, dtype)


def _check_rope_and_write_kv(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    interleaved: bool,
    q_out: Tensor,
) -> None:
    heads, dtype = _query_heads(qkv, k_pages), (qkv.dtype,)
    check_elements("qkv", qkv, FLOATS)
    check_elements("k_pages", k_pages, (*CODES, *dtype))
    check_tensor("v_pages", v_pages, k_pages.shape, (k_pages.dtype,))
    check_scales("k_scales", k_scales, k_pages)
    check_scales("v_scales", v_scales, k_pages)
    _check_angles(cos_sin, positions, heads[0], heads[2], dtype)
    check_tensor("slots", slots, heads[:1], INTEGERS)
    check_tensor("q_out", q_out, heads, dtype)


def _query_heads(qkv: Tensor, k_pages: Tensor) -> tuple[int, int, int]:
    """T, Hq and D of the queries in qkv. Raises ValueError for a shape."""
    pages, shape = k_pages.shape, qkv.shape
    if len(pages) != 4 or 0 in pages:
        raise ValueError(f"k_pages has shape {list(pages)}; legal: [P, Hkv, page_size, D], each at least 1")
    _, num_kv_heads, _, head_dim = pages
    if len(shape) != 2 or shape[1] % head_dim or shape[1] // head_dim <= 2 * num_kv_heads:
        raise ValueError(
            f"qkv has shape {list(shape)}; legal: [T, (Hq + 2 * {num_kv_heads}) * {head_dim}] with Hq >= 1, "
            "by the shape of k_pages"
        )
    return shape[0], shape[1] // head_dim - 2 * num_kv_heads, head_dim


def _check_angles(
    cos_sin: Tensor, positions: Tensor, tokens: int, head_dim: int, dtype: tuple[torch.dtype, ...]
) -> None:
    shape = cos_sin.shape
    if len(shape) != 2 or shape[1] % 2 or shape[1] > head_dim:
        raise ValueError(
            f"cos_sin has shape {list(shape)}; legal: [max_position, R] with R even and at most {head_dim}"
        )
    check_elements("cos_sin", cos_sin, _FP32 if dtype == _FP32 else (*_FP32, *dtype))
    check_tensor("positions", positions, (tokens,), INTEGERS)


_ROPE = Op(
    "rope(Tensor q, Tensor k, Tensor cos_sin, Tensor positions, bool interleaved, "
    "Tensor(a!) q_out, Tensor(b!) k_out) -> ()",
    check=_check_rope,
    reference=reference.rope,
    values=values.check_rope,
    in_place={"q_out": {"q": 1}, "k_out": {"k": 1}},
    triton=triton_kernels,
)
_ROPE_AND_WRITE_KV = Op(
    "rope_and_write_kv(Tensor qkv, Tensor cos_sin, Tensor positions, Tensor slots, "
    "Tensor(c!) k_pages, Tensor(d!) v_pages, Tensor(e!)? k_scales, Tensor(f!)? v_scales, bool interleaved, "
    "Tensor(a!) q_out) -> ()",
    check=_check_rope_and_write_kv,
    reference=reference.rope_and_write_kv,
    values=values.check_rope_and_write_kv,
    in_place={"q_out": {"qkv": 1}},
    numba=numba_kernels,
    triton=triton_kernels,
)


def cos_sin_cache(inv_freq: Tensor, num_positions: int) -> Tensor:
    """The cos/sin cache for `rope`: [num_positions, R] fp32, cosines then sines of position * inv_freq.

    inv_freq: [R/2] fp32, radians per position; scaled rope changes only these. Angles are multiplied in fp32, as Meta
    and Hugging Face do: more exact angles would differ from those of training (by 6e-5 at position 1000). Returns the
    cache on inv_freq's device. Raises ValueError for a shape.

    Example:
        >>> cache = kernels.cos_sin_cache(torch.tensor([1.0, 0.01]), num_positions=16)
        >>> cache.shape, cache[0].tolist()
        (torch.Size([16, 4]), [1.0, 1.0, 0.0, 0.0])
    """
    check_shape("inv_freq", inv_freq, ("R/2",))
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32, device=inv_freq.device), inv_freq.float())
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rope(
    q: Tensor,
    k: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    *,
    interleaved: bool = False,
    q_out: Tensor | None = None,
    k_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys.

    q: [T, Hq, D], k: [T, Hkv, D], one floating dtype, last dimension contiguous. cos_sin: [max_position, R] in fp32
    (`cos_sin_cache`) or q's dtype, R even, R <= D; dimensions past R pass through. positions: [T] int32 or int64, each
    below max_position; any other returns NaN.
    interleaved: pairs (x_2i, x_2i+1), Meta's layout; otherwise (x_i, x_{i+R/2}), Hugging Face's.
    q_out, k_out: like q and k, may be q and k themselves; allocated when None. Returns (q_out, k_out).
    Rotates in fp32 and rounds once. Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is
    written then.
    Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding (2021).

    Example:
        >>> q, k = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
        >>> cache = kernels.cos_sin_cache(torch.tensor([torch.pi / 2]), num_positions=2)  # 90 degrees a position
        >>> q, k = kernels.rope(q, k, cache, torch.tensor([1]))
        >>> torch.allclose(torch.cat([q, k]), torch.tensor([[[0.0, 1.0]], [[-2.0, 0.0]]]), atol=1e-6)
        True
    """
    if q_out is None:
        q_out = torch.empty_like(q)
    if k_out is None:
        k_out = torch.empty_like(k)
    _ROPE(q, k, cos_sin, positions, interleaved, q_out, k_out)
    return q_out, k_out


def rope_and_write_kv(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    *,
    interleaved: bool = False,
    q_out: Tensor | None = None,
) -> Tensor:
    """`rope` on the output of the fused qkv projection, fused with the write of k and v into their pages.

    qkv: [T, (Hq + 2 Hkv) * D], all q heads, then k, then v. cos_sin, positions, interleaved: as for `rope`.
    slots: [T] int32 or int64, page * page_size + offset of each token; nothing is written for a slot that is negative
    (padding) or past the last page.
    k_pages, v_pages: [P, Hkv, page_size, D], qkv's dtype, any strides but the last; written in place. Quantized pages
    are int8 or float8_e4m3fn, with k_scales, v_scales: [P, Hkv, page_size] fp32, one scale for each token and head: the
    largest magnitude (of k after its rotation) / 127 for int8, / 448 for fp8. Values are rounded to nearest even, so
    that value * scale is off by half a step at most. A head that holds an infinity or a NaN becomes zeros with an
    infinite or NaN scale, and is read back as NaN.
    q_out: [T, Hq, D], may be qkv's own q heads; allocated when None. Returns q_out.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: RoFormer (Su et al., 2021); pages as in Kwon et al., Efficient Memory Management for LLM Serving (2023).

    Example:
        >>> qkv, cache = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]), kernels.cos_sin_cache(torch.ones(1), 16)
        >>> k_pages, v_pages = torch.zeros(3, 1, 4, 2), torch.zeros(3, 1, 4, 2)  # 3 pages of 4 tokens, one head
        >>> q = kernels.rope_and_write_kv(qkv, cache, torch.tensor([0]), torch.tensor([9]), k_pages, v_pages)
        >>> q.tolist(), k_pages[2, 0, 1].tolist(), v_pages[2, 0, 1].tolist()  # position 0: not rotated
        ([[[1.0, 2.0]]], [3.0, 4.0], [5.0, 6.0])
    """
    if q_out is None:
        q_out = torch.empty(_query_heads(qkv, k_pages), dtype=qkv.dtype, device=qkv.device)
    _ROPE_AND_WRITE_KV(qkv, cos_sin, positions, slots, k_pages, v_pages, k_scales, v_scales, interleaved, q_out)
    return q_out
