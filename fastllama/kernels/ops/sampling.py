"""The op sample and its workspace."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.kernels import reference
from fastllama.kernels.dispatch.checks import FLOATS, INTEGERS, check_elements, check_tensor, check_workspace
from fastllama.kernels.dispatch.op import Op
from fastllama.kernels.ops.compiled import numba_kernels, triton_kernels

_PARAMETERS = (
    ("temperature", (torch.float32,)),
    ("top_k", INTEGERS),
    ("top_p", (torch.float32,)),
    ("min_p", (torch.float32,)),
    ("seed", (torch.int64,)),
    ("offset", (torch.int64,)),
    ("tokens", (torch.int64,)),
    ("logprobs", (torch.float32,)),
)


def _check(logits: Tensor, *others: Tensor | None) -> None:
    shape = logits.shape
    if len(shape) != 2 or not shape[1]:
        raise ValueError(f"logits has shape {list(shape)}; legal: [B, V] with V >= 1")
    check_elements("logits", logits, FLOATS)
    *parameters, workspace = others
    for (name, dtypes), tensor in zip(_PARAMETERS, parameters, strict=True):
        assert tensor is not None
        check_tensor(name, tensor, (shape[0],), dtypes)
    check_workspace(workspace, torch.int64)


_SAMPLE = Op(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, Tensor offset, "
    "Tensor(a!) tokens, Tensor(b!) logprobs, Tensor(c!)? workspace) -> ()",
    check=_check,
    reference=reference.sample,
    numba=numba_kernels,
    triton=triton_kernels,
)


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
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample one token for each row, each row with its own parameters and its own random number.

    logits: [B, V], fp32, fp16 or bf16 (fp64 on the CPU). A row whose largest logit is not finite (NaN, +inf, or all
    -inf) returns token 0 and logprob NaN. temperature: [B] fp32, 0 is greedy (the first of the largest logits). top_k:
    [B] int32 or int64, 0 is off. top_p: [B] fp32, 1 is off. min_p: [B] fp32, a fraction of the largest probability, 0
    is off. seed, offset: [B] int64: key and counter (its low 32 bits) of Philox4x32-10, so that a row samples the same
    token in any batch.
    tokens: [B] int64, logprobs: [B] fp32; allocated when None. Returns (tokens, logprobs): the sampled ids and their
    natural-log probabilities under softmax(logits), before temperature and filters.
    workspace: scratch memory from `sample_workspace` for as many rows or more; allocated when None and needed.
    Filters apply in the order temperature, top-k, top-p, min-p, each to the renormalised rest; all ties at a threshold
    are kept. Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    Source: top-p: Holtzman et al., The Curious Case of Neural Text Degeneration (2020); min-p: Nguyen et al., Turning
    Up the Heat (2024); Philox: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).

    Example:
        >>> zero, one = torch.zeros(2), torch.ones(2)
        >>> temperature, top_k = torch.tensor([0.0, 1.0]), torch.tensor([0, 1])  # greedy; top-1
        >>> logits, seed = torch.tensor([[0.0, 3.0, 1.0]] * 2), torch.tensor([7, 8])
        >>> tokens, logprobs = kernels.sample(logits, temperature, top_k, one, zero, seed, seed)
        >>> tokens.tolist()
        [1, 1]
    """
    if tokens is None:
        tokens = torch.empty_like(seed)
    if logprobs is None:
        logprobs = torch.empty_like(temperature)
    _SAMPLE(logits, temperature, top_k, top_p, min_p, seed, offset, tokens, logprobs, workspace)
    return tokens, logprobs


def sample_workspace(logits: Tensor) -> Tensor:
    """Scratch memory for `sample` of logits [B, V] like these, or of fewer rows, reused from call to call: [N] int64.

    About 4 bytes for each logit where a Triton kernel runs; empty elsewhere. Not to be shared by overlapping calls.

    Example:
        >>> kernels.sample_workspace(torch.zeros(2, 32000)).shape  # a CPU needs none
        torch.Size([0])
    """
    return _SAMPLE.workspace(logits.device, torch.int64, logits)
