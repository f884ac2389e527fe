"""Quantized linear layers for a transformers model: called like nn.Linear, one matmul op each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastllama.layers.quantized import Int4Linear, Int8Linear, QuantizedLinear, W8A8Linear


class _HfLinear(QuantizedLinear):
    """A quantized layer without fused prologue or epilogue."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in_features] -> [..., out_features], both in the scales' dtype, or any if the scales are fp32.

        Raises RuntimeError where x requires grad: the ops have no backward.
        """
        return self.matmul(x.contiguous(), None, residual=None, out=None, gated=False)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, group_size={self.group_size}, bias={self.bias is not None}"


class HfInt4Linear(_HfLinear, Int4Linear):
    """4 bits: W4A16."""


class HfInt8Linear(_HfLinear, Int8Linear):
    """8 bits: W8A16."""


class HfW8A8Linear(_HfLinear, W8A8Linear):
    """8-bit weights, and rows of x rounded to 8 bits at each call: W8A8."""


HF_LINEARS: dict[str, type[_HfLinear]] = {each.kind: each for each in (HfInt4Linear, HfInt8Linear, HfW8A8Linear)}
