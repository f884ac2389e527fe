"""FlashInfer's activation of Llama's MLP: silu_and_mul."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.errors import check_dtype, check_rows
from fastllama.integrations.flashinfer.checks import check_optional, check_tensors

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def silu_and_mul(input: Tensor, out: Tensor | None = None, enable_pdl: bool | None = None) -> Tensor:
    """silu(input[..., :I]) * input[..., I:], computed in fp32 and rounded once. Returns out.

    input: [..., 2I], bfloat16, float16 or fp32, last dimension contiguous, rows at one stride. out: [..., I]; allocated
    when None. enable_pdl: unused.
    Raises ValueError for a shape, stride or device, TypeError for a dtype; nothing is written then.
    """
    check_tensors(input=input)
    check_optional(out=out)
    if not input.dim() or input.shape[-1] % 2:
        raise ValueError(f"input has shape {list(input.shape)}; legal: [..., 2I], an even last dimension")
    check_dtype("input", input, _FLOATS)
    check_rows("input", input)
    return kernels.silu_mul(input, out=out)
