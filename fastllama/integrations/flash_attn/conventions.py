"""Shared by flash-attn's functions: refused arguments, checks, row layouts, bounds, and log-sum-exps."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastllama.errors import brief, check_device, check_dtype, check_shape
from fastllama.integrations.arguments import refuse_arguments
from fastllama.kernels.dispatch.checks import INTEGERS, check_tensor
from fastllama.kernels.reference.numerics import wide_dtype

Result = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
Window = Sequence[int | None] | None  # tokens to the left and to the right; negative or None: all
_THEIRS = {"k_pages": "k_cache", "v_pages": "v_cache", "page_table": "block_table", "seq_lens": "cache_seqlens"}


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
    """Raise NotImplementedError for the first unsupported argument; those in `absent` must be None."""
    if not isinstance(window_size, (tuple, list, type(None))):
        raise TypeError(f"window_size is {brief(window_size)}; legal: a pair, (-1, -1)")
    window = tuple(-1 if side is None else side for side in window_size or (-1, -1))
    windows = [(-1, -1), (-1, 0)] if causal else [(-1, -1)]  # causal means nothing to the right
    refuse_arguments(
        function,
        dropout_p=(dropout_p, 0.0),
        window_size=(window, *windows),
        softcap=(softcap, 0.0, None),
        attention_chunk=(attention_chunk, 0, None),
        **{name: (given, None) for name, given in absent.items()},
    )


def check_tensors(required: Mapping[str, Any], **optional: Any) -> None:
    """Raise TypeError for the first argument that is not a strided tensor; None is legal for `optional`."""
    for name, x in {**required, **optional}.items():
        if isinstance(x, Tensor):
            if x.layout is not torch.strided:
                raise TypeError(f"{name} has layout {x.layout}; legal: {torch.strided}")
        elif x is not None or name in required:
            legal = "a tensor" if name in required else "a tensor or None"
            raise TypeError(f"{name} is {brief(x)} of type {type(x).__name__}; legal: {legal}")


def check_inputs(function: str, required: Mapping[str, Any], **optional: Any) -> None:
    """`check_tensors`, and RuntimeError for the first tensor that needs a backward."""
    check_tensors(required, **optional)
    if torch.is_grad_enabled():
        for name, tensor in {**required, **optional}.items():
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{name} requires grad, and {function} has no backward here: call it under torch.inference_mode() "
                    "or torch.no_grad(), and train with flash-attn itself"
                )


def flag(name: str, value: Any) -> bool:
    """The value as bool. Raises TypeError unless it is True or False, of Python or NumPy."""
    if isinstance(value, Tensor) or value not in (True, False):
        raise TypeError(f"{name} is {brief(value)} of type {type(value).__name__}; legal: True or False")
    return bool(value)


def any_flag(**flags: Any) -> bool:
    """Whether any flag is set; None counts as not set."""
    given = [flag(name, False if value is None else value) for name, value in flags.items()]
    return any(given)


def scale_of(softmax_scale: float | None, q: Tensor) -> float:
    """softmax_scale, or for None the default 1 / sqrt(D) of q."""
    if softmax_scale is None:
        return 1.0 / math.sqrt(q.shape[-1] or 1)
    if isinstance(softmax_scale, (float, torch.SymFloat)):
        return softmax_scale
    if not isinstance(softmax_scale, Real):
        raise TypeError(f"softmax_scale is {brief(softmax_scale)}; legal: a number or None")
    try:
        return float(softmax_scale)
    except OverflowError:
        raise ValueError(f"softmax_scale is {brief(softmax_scale)}; legal: a number that a float holds") from None


def with_their_names(call: Callable[..., None], *args: Any) -> None:
    """Call an op so that its errors name flash-attn's arguments instead of the op's."""
    if is_compiling():
        call(*args)
        return
    try:
        call(*args)
    except (TypeError, ValueError, RuntimeError) as error:
        said = re.sub("|".join(_THEIRS), lambda found: _THEIRS[found[0]], str(error))
        if said == str(error):
            raise
        raise type(error)(said) from None


def check_integers(name: str, x: Tensor | None, shape: Sequence[int | str], q: Tensor) -> None:
    """Raise unless x is None, or int32 or int64 on q's device, with any strides."""
    if x is not None:
        check_shape(name, x, shape)
        check_dtype(name, x, INTEGERS)
        check_device(name, x, "q", q)


def check_pages(q: Tensor, k_name: str, k: Tensor, v_name: str, v: Tensor) -> None:
    """Raise unless keys and values have one shape [P, page_size, Hkv, D] and q's dtype; any strides but the last."""
    if 0 in k.shape:
        raise ValueError(f"{k_name} has shape {list(k.shape)}; legal: each dimension at least 1")
    check_heads(k_name, k, q)
    for name, pages in ((k_name, k), (v_name, v)):
        check_tensor(name, pages, k.shape, (q.dtype,))
        check_device(name, pages, "q", q)


def check_heads(name: str, keys: Tensor, q: Tensor) -> None:
    """Raise ValueError unless keys [..., Hkv, D] have q's head dimension, and Hkv divides q's heads."""
    num_heads, head_dim = q.shape[-2:]
    if not (num_heads and head_dim):
        raise ValueError(f"q has shape {list(q.shape)}; legal: at least one head of at least one number")
    if not keys.shape[-2] or num_heads % keys.shape[-2] or keys.shape[-1] != head_dim:
        raise ValueError(
            f"{name} has shape {list(keys.shape)}; legal: a number of heads that divides q's {num_heads}, "
            f"and q's head dimension {head_dim}"
        )


def one_of(first: str, a: Tensor | None, second: str, b: Tensor | None) -> Tensor | None:
    """An argument with different names in FlashAttention 2 and 3. ValueError where both are given."""
    if a is not None and b is not None:
        raise ValueError(f"{first} and {second} are both given; legal: one of them, they are two names of one argument")
    return b if a is None else a


def as_rows(x: Tensor) -> Tensor:
    """[..., S, H, D] as [T, H, D] in token-major order, copied where it is head-major.

    The stride between heads is a compile-time constant of the Triton kernels: head-major keys would cause a compile for
    each length.
    """
    if x.stride(-1) != 1 or (x.shape[-3] > 1 and x.stride(-2) > x.stride(-3)):
        x = x.contiguous()
    return x.flatten(0, -3)


def result_rows(out: Tensor | None, q: Tensor) -> tuple[Tensor, Tensor]:
    """The result [..., H, D], allocated like q where `out` is None, and its memory as [T, H, D]."""
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        return out, out.flatten(0, -3)
    check_shape("out", out, q.shape)
    try:
        return out, out.view(-1, *q.shape[-2:])
    except RuntimeError:
        raise ValueError(f"out has strides {list(out.stride())}; legal: all tokens at one stride") from None


def even_bounds(num_seqs: int, length: int, device: torch.device) -> Tensor:
    """[B + 1] int32: bounds of sequences of equal length."""
    return torch.arange(num_seqs + 1, dtype=torch.int32, device=device) * length


def lse_rows(q: Tensor, num_seqs: int | None = None) -> Tensor:
    """Memory for the log-sum-exps of q's rows [T, H], laid out so that `softmax_lse` rarely copies."""
    rows, num_heads, _ = q.shape
    dtype = wide_dtype(q)
    if rows == num_seqs:
        return torch.empty((rows, num_heads), dtype=dtype, device=q.device)
    return torch.empty((num_heads, rows), dtype=dtype, device=q.device).T


def delivered(
    out: Tensor, lse: Tensor | None, num_seqs: int | None, length: int, return_attn_probs: bool = False
) -> Result:
    """A function's result: out, with log-sum-exps where the op wrote them, and flash-attn's empty probabilities."""
    if lse is None:
        return out
    lse = softmax_lse(lse, num_seqs, length)
    return (out, lse, out.new_empty(0)) if return_attn_probs else (out, lse)


def softmax_lse(lse: Tensor, num_seqs: int | None, length: int) -> Tensor:
    """An op's log-sum-exps [T, H] in flash-attn's shape: [H, T], or [B, H, S] of `num_seqs` sequences of equal length.

    +inf for rows without keys, as in FlashAttention 2; the ops give -inf.
    """
    lse = lse.T
    if num_seqs is not None:
        lse = lse.unflatten(1, (num_seqs, length)).transpose(0, 1).contiguous()  # copies where both are above 1
    return lse.masked_fill_(lse == -math.inf, math.inf)
