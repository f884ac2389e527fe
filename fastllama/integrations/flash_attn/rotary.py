"""The rotation within flash_attn_with_kvcache: cosines and sines apart, and positions of queries and of keys."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.weak import WeakIdKeyDictionary

from fastllama.kernels import rope
from fastllama.kernels.dispatch.plainness import is_plain

_JOINED = WeakIdKeyDictionary()  # by cosines: sines, what both looked like, and the two side by side


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
    cos_sin = joined(cos, sin)
    if positions_q is positions_k:
        return rope(q, k, cos_sin, positions_q, interleaved=interleaved)
    q, _ = rope(q, q[:, :0], cos_sin, positions_q, interleaved=interleaved)
    k, _ = rope(k, k[:, :0], cos_sin, positions_k, interleaved=interleaved)
    return q, k


def joined(cos: Tensor, sin: Tensor) -> Tensor:
    """[max_position, R], cosines and then sines, as `rope` reads them: made once for a pair that does not change.

    Kept as long as the cosines live. Made anew where nobody can say that they did not change, inference tensors, and
    where the result is not memory to keep: while a graph is compiled, recorded or captured.
    """
    if (
        is_compiling()
        or not is_plain((cos, sin))
        or cos.is_inference()
        or sin.is_inference()
        or (cos.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return torch.cat((cos, sin), 1)
    looks = (cos._version, cos.data_ptr(), cos.shape, sin._version, sin.data_ptr())
    known = _JOINED.get(cos)
    if known is None or known[0]() is not sin or known[1] != looks:
        known = _JOINED[cos] = weakref.ref(sin), looks, torch.cat((cos.detach(), sin.detach()), 1)
    result: Tensor = known[2]
    return result
