"""compressed-tensors: what vLLM, transformers and llm-compressor read and write of integers with scales."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fastllama.layers.quantized import QuantizedLinear, QuantizedWeight


class Scheme(NamedTuple):
    """How a linear layer's weight is quantized. group_size: columns that share a scale; None: all of a row."""

    kind: str
    group_size: int | None
    has_zeros: bool

    @classmethod
    def of(cls, weight: QuantizedWeight | QuantizedLinear) -> Scheme:
        """That of a weight, or of a layer."""
        columns = weight.shape[1] if isinstance(weight, QuantizedWeight) else weight.in_features
        group = None if weight.group_size == columns else weight.group_size
        return cls(weight.kind, group, weight.zeros is not None)


def to_config(schemes: Mapping[str, Scheme], dense: Iterable[str]) -> dict[str, Any]:
    """The quantization_config of a model whose linear layers, by name, have these schemes; dense: the other layers."""
    raise NotImplementedError


def to_tensors(module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that a file holds of a linear layer's weight: weight_packed, weight_scale, ..."""
    raise NotImplementedError
