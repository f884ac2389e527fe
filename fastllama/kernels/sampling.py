"""sample."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.errors import check_dtype, check_shape
from fastllama.kernels import reference
from fastllama.kernels.op import Op

_SAMPLE = Op(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, Tensor offset, "
    "Tensor(a!) tokens, Tensor(b!) logprobs) -> ()",
    reference=reference.sample,
)
_PARAMETERS = {
    "temperature": (torch.float32,),
    "top_k": (torch.int32, torch.int64),
    "top_p": (torch.float32,),
    "min_p": (torch.float32,),
    "seed": (torch.int64,),
    "offset": (torch.int64,),
}


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    offset: Tensor,
    *,
    tokens: Tensor | None = None,
    logprobs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token for each row, each row with its own parameters and its own random number.

    logits: [B, V], any floating dtype, at least one finite in each row. temperature: [B] fp32, 0 means greedy (the
    first largest logit). top_k: [B] int32 or int64, 0 means off. top_p: [B] fp32, 1 means off. min_p: [B] fp32, a
    fraction of the largest probability, 0 means off. seed, offset: [B] int64: key and counter (its low 32 bits) of
    Philox4x32-10, so a row draws the same token alone and in any batch.
    tokens: [B] int64, logprobs: [B] fp32; allocated when None. Returns (tokens, logprobs): the drawn ids and their
    natural-log probabilities under softmax(logits), before temperature and filters.
    Filters act in the order temperature, top-k, top-p, min-p, each on the renormalised rest; ties at a threshold are
    all kept. Raises ValueError for a shape, TypeError for a dtype.
    Source: top-p: Holtzman et al., The Curious Case of Neural Text Degeneration (2020); min-p: Nguyen et al., Turning
    Up the Heat (2024); Philox: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
    """
    check_shape("logits", logits, ("B", "V"))
    if logits.shape[1] == 0:
        raise ValueError(f"logits has shape {list(logits.shape)}; legal: [B, V] with V >= 1")
    rows = (logits.shape[0],)
    given = (temperature, top_k, top_p, min_p, seed, offset)
    for (name, legal), tensor in zip(_PARAMETERS.items(), given, strict=True):
        if tensor.shape != rows:
            check_shape(name, tensor, rows)
        if tensor.dtype not in legal:
            check_dtype(name, tensor, legal)
    if tokens is None:
        tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if logprobs is None:
        logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    check_shape("tokens", tokens, rows)
    check_shape("logprobs", logprobs, rows)
    _SAMPLE(logits, *given, tokens, logprobs)
    return tokens, logprobs
