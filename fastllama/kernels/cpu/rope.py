"""rope_and_write_kv with q and k, neighbours in the fused projection, rotated by the same three operations."""

from __future__ import annotations

from torch import Tensor

from fastllama.kernels import reference
from fastllama.kernels.reference.numerics import wide


def rope_and_write_kv(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    interleaved: bool,
    q_out: Tensor,
) -> None:
    """See kernels.rope_and_write_kv. Interleaved pairs and partial rotation are rare and take the reference's way."""
    _, num_kv_heads, page_size, head_dim = k_pages.shape
    if interleaved or cos_sin.shape[1] != head_dim:
        q_out.copy_(reference.rope_and_write_kv(qkv, cos_sin, positions, slots, k_pages, v_pages, interleaved))
        return
    tokens, num_q_heads = q_out.shape[:2]
    num_rotated = num_q_heads + num_kv_heads
    halves = wide(qkv[:, : num_rotated * head_dim].view(tokens, num_rotated, 2, head_dim // 2))
    cos, sin = cos_sin.index_select(0, positions).view(tokens, 1, 2, head_dim // 2).unbind(2)
    turned = halves * cos[:, :, None]
    turned[:, :, 0].addcmul_(halves[:, :, 1], sin, value=-1)
    turned[:, :, 1].addcmul_(halves[:, :, 0], sin)
    rotated = turned.view(tokens, num_rotated, head_dim)
    q_out.copy_(rotated[:, :num_q_heads])
    k = rotated[:, num_q_heads:].to(qkv.dtype)
    v = qkv[:, num_rotated * head_dim :].view(tokens, num_kv_heads, head_dim)
    if tokens and int(slots.min()) < 0:
        kept = slots >= 0
        slots, k, v = slots[kept], k[kept], v[kept]
    page, offset = slots // page_size, slots % page_size
    k_pages[page, :, offset] = k
    v_pages[page, :, offset] = v
