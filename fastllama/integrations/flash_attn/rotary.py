"""The rotary embedding in flash_attn_with_kvcache: separate cosines and sines, separate positions of q and k."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastllama.kernels import rope


def rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions_q: Tensor,
    positions_k: Tensor,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """q [Tq, Hq, D] and k [Tk, Hkv, D] at their positions, in new memory; one op where the positions are one tensor."""
    cos_sin = side_by_side(cos, sin)
    if positions_q is positions_k:
        return rope(q, k, cos_sin, positions_q, interleaved=interleaved)
    q, _ = rope(q, q[:, :0], cos_sin, positions_q, interleaved=interleaved)
    k, _ = rope(k, k[:, :0], cos_sin, positions_k, interleaved=interleaved)
    return q, k


def side_by_side(cos: Tensor, sin: Tensor) -> Tensor:
    """[max_position, R], cosines and then sines, as `rope` reads them.

    Where they are the two halves of one tensor, as many stacks store them, that tensor is returned without a copy.
    Others are copied at each call, in one kernel: for Llama 2's 4096 positions in bf16 it reads and writes 1 MB each.
    The copy is not cached, as writes through `.data`, NumPy, DLPack or a custom kernel cannot be detected.
    """
    half = cos.shape[1]
    if (
        not is_compiling()
        and torch._C._is_alias_of(cos, sin)  # type: ignore[attr-defined]
        and cos.stride() == sin.stride()
        and cos.stride(1) == 1
        and sin.storage_offset() == cos.storage_offset() + half
    ):
        return cos.as_strided((cos.shape[0], 2 * half), cos.stride())
    return torch.cat((cos, sin), 1)
