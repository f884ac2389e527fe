"""LlamaRMSNorm as one op, named like the stock class it replaces."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from fastllama import kernels

_STOCK = modeling_llama.LlamaRMSNorm
_FORWARD = _STOCK.forward  # other libraries replace it for all models of a process


class LlamaRMSNorm(_STOCK):
    """A norm on our op, where it is not fused into a matmul."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        weight = self.weight
        gradients = torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad)
        plain = type(hidden_states) is Tensor and type(weight) is nn.Parameter and weight.device.type != "meta"
        if gradients or not plain or weight.dtype != hidden_states.dtype or _STOCK.forward is not _FORWARD:
            return super().forward(hidden_states)
        return kernels.rms_norm(hidden_states.contiguous(), weight, self.variance_epsilon)
