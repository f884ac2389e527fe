"""adjust_logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama.errors import check_shape
from fastllama.kernels import reference
from fastllama.kernels.dispatch.checks import FLOATS, check_elements, check_tensor
from fastllama.kernels.dispatch.op import Op
from fastllama.kernels.ops.compiled import numba_kernels, triton_kernels
from fastllama.kernels.ops.values import check_adjust_logits
from fastllama.kernels.reference.numerics import wide_dtype


def _check(
    logits: Tensor,
    tokens: Tensor,
    starts: Tensor,
    ends: Tensor,
    slots: Tensor,
    bias: Tensor,
    counts: Tensor,
    repetition_penalty: Tensor,
    presence_penalty: Tensor,
    frequency_penalty: Tensor,
    out: Tensor,
) -> None:
    shape = logits.shape
    if len(shape) != 2 or not shape[1]:
        raise ValueError(f"logits has shape {list(shape)}; legal: [R, V] with V >= 1")
    check_elements("logits", logits, FLOATS)
    check_shape("tokens", tokens, ("T",))
    check_elements("tokens", tokens, (torch.int64,))
    rows, vocab = shape
    for name, each in (("starts", starts), ("ends", ends), ("slots", slots)):
        check_tensor(name, each, (rows,), (torch.int64,))
    check_shape("bias", bias, ("S", vocab))
    check_elements("bias", bias, (torch.float32,))
    check_tensor("counts", counts, bias.shape, (torch.int32,))
    for name, each in (
        ("repetition_penalty", repetition_penalty),
        ("presence_penalty", presence_penalty),
        ("frequency_penalty", frequency_penalty),
    ):
        check_tensor(name, each, (rows,), (torch.float32,))
    check_tensor("out", out, shape, (wide_dtype(logits),))


_ADJUST_LOGITS = Op(
    "adjust_logits(Tensor logits, Tensor tokens, Tensor starts, Tensor ends, Tensor slots, Tensor bias, Tensor counts, "
    "Tensor repetition_penalty, Tensor presence_penalty, Tensor frequency_penalty, Tensor(a!) out) -> ()",
    check=_check,
    reference=reference.adjust_logits,
    values=check_adjust_logits,
    numba=numba_kernels,
    triton=triton_kernels,
)


def adjust_logits(
    logits: Tensor,
    tokens: Tensor,
    starts: Tensor,
    ends: Tensor,
    slots: Tensor,
    bias: Tensor,
    counts: Tensor,
    repetition_penalty: Tensor,
    presence_penalty: Tensor,
    frequency_penalty: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Add each request's logit bias and apply its repetition, presence and frequency penalties, before `sample`.

    Which tokens a request has seen stands in a row of a table, so that the cost does not grow with its context.
    logits: [R, V], fp32, fp16 or bf16 (fp64 on the CPU). slots: [R] int64, each row's place in the tables; a negative
    one leaves its row as it is, for requests that ask for nothing.
    bias: [S, V] fp32, added first; -inf bans a token. counts: [S, V] int32: bit 0 says whether the prompt holds the
    token, the bits above how often it was generated. tokens: [T] int64; those of a row from starts to before ends,
    [R] int64 each, have been generated and are not in its counts yet: a few, as each is compared with all of V. Ids
    outside of the vocabulary are left out.
    repetition_penalty: [R] fp32, above 0: divides positive and multiplies negative logits of tokens in the prompt or
    generated; 1 is off. presence_penalty, frequency_penalty: [R] fp32, subtracted from the logits of generated tokens,
    once and as often as each was generated; 0 is off.
    out: [R, V] fp32 (fp64 where logits are), memory of its own; allocated when None. Returns out.
    Computed in fp32. What would overflow from a finite logit ends at a quarter of the largest number, so that a penalty
    makes neither an infinity nor NaN; logits that are not finite stay so.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then. A slot past the
    tables makes its row NaN.
    Source: repetition: Keskar et al., CTRL (2019); presence and frequency: OpenAI's API reference; their order is that
    of Hugging Face's processors, bias before penalties.
    """
    if out is None:
        out = torch.empty(logits.shape, dtype=wide_dtype(logits), device=logits.device)
    _ADJUST_LOGITS(
        logits,
        tokens,
        starts,
        ends,
        slots,
        bias,
        counts,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        out,
    )
    return out
