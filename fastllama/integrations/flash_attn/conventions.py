"""What all of flash-attn's functions share: what they refuse, how they take rows and bounds, and their log-sum-exps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastllama.errors import check_shape
from fastllama.integrations.arguments import refuse_arguments

Window = Sequence[int | None] | None  # tokens to the left and to the right; negative or None: all


def refuse(
    function: str,
    *,
    causal: bool,
    window_size: Window,
    softcap: float | None,
    dropout_p: float = 0.0,
    attention_chunk: int | None = 0,
    **absent: Any,
) -> None:
    """NotImplementedError for the first argument that asks for what no op here computes; `absent`: unless None."""
    window = tuple(-1 if side is None else side for side in window_size or (-1, -1))
    windows = [(-1, -1), (-1, 0)] if causal else [(-1, -1)]  # nothing to the right is what causal means
    refuse_arguments(
        function,
        dropout_p=(dropout_p, 0.0),
        window_size=(window, *windows),
        softcap=(softcap, 0.0, None),
        attention_chunk=(attention_chunk, 0, None),
        **{name: (given, None) for name, given in absent.items()},
    )


def check_no_grad(function: str, **tensors: Tensor | None) -> None:
    """RuntimeError for the first tensor through which autograd would go back; before anything is written."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{name} requires grad, and {function} has no backward here: call it under torch.inference_mode() "
                    "or torch.no_grad(), and train with flash-attn itself"
                )


def check_heads(name: str, keys: Tensor, q: Tensor) -> None:
    """ValueError unless keys [..., Hkv, D] have q's head dimension, and heads that divide q's."""
    num_heads, head_dim = q.shape[-2:]
    if not keys.shape[-2] or num_heads % keys.shape[-2] or keys.shape[-1] != head_dim:
        raise ValueError(
            f"{name} has shape {list(keys.shape)}; legal: a number of heads that divides q's {num_heads}, "
            f"and q's head dimension {head_dim}"
        )


def one_of(first: str, a: Tensor | None, second: str, b: Tensor | None) -> Tensor | None:
    """An argument that FlashAttention 2 and 3 name differently. ValueError where both names are given."""
    if a is not None and b is not None:
        raise ValueError(f"{first} and {second} are both given; legal: one of them, they are two names of one argument")
    return b if a is None else a


def as_rows(x: Tensor) -> Tensor:
    """[..., S, H, D] as [T, H, D] whose heads lie within a token, copied where they do not.

    The distance between heads is a constant of the Triton kernels: head-major keys of a growing length would be
    compiled anew for each.
    """
    if x.stride(-1) != 1 or (x.shape[-3] > 1 and x.stride(-2) > x.stride(-3)):
        x = x.contiguous()
    return x.reshape(-1, *x.shape[-2:])


def out_rows(out: Tensor | None, q: Tensor) -> Tensor | None:
    """`out`, which is like q [..., H, D], as [T, H, D] in the same memory."""
    if out is None:
        return None
    check_shape("out", out, q.shape)
    try:
        return out.view(-1, *q.shape[-2:])
    except RuntimeError:
        raise ValueError(f"out has strides {list(out.stride())}; legal: all tokens at one stride") from None


def even_bounds(num_seqs: int, length: int, device: torch.device) -> Tensor:
    """[B + 1] int32: bounds of sequences that are all as long."""
    return torch.arange(num_seqs + 1, dtype=torch.int32, device=device) * length


def lse_rows(q: Tensor, num_seqs: int | None = None) -> Tensor:
    """Memory for the log-sum-exps of q's rows [T, H], such that `softmax_lse` copies as little as it can."""
    rows, num_heads, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if rows == num_seqs:
        return torch.empty((rows, num_heads), dtype=dtype, device=q.device)
    return torch.empty((num_heads, rows), dtype=dtype, device=q.device).T


def softmax_lse(lse: Tensor, num_seqs: int | None = None, length: int = 1) -> Tensor:
    """[T, H] of an op in flash-attn's shape: [H, T], or [B, H, S] of `num_seqs` sequences that are all as long.

    +inf for rows without keys, as FlashAttention 2 has it where the ops say -inf.
    """
    lse = lse.T
    if num_seqs is not None:
        lse = lse.unflatten(1, (num_seqs, length)).transpose(0, 1).contiguous()  # a copy where both are more than 1
    return lse.masked_fill_(lse == -math.inf, math.inf)
