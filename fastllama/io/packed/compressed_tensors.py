"""Writes compressed-tensors: integers with scales, as vLLM, transformers and llm-compressor read them.

int4 and int8 become "pack-quantized": words of eight or four values along the columns, with weight_shape; zeros are
packed along the rows. w8a8 becomes "int-quantized": plain int8. Scales keep their dtype.
Source: compressed-tensors 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllama.io.packed.words import pack_bytes, pack_nibbles
from fastllama.kernels.reference.int4 import LARGEST
from fastllama.layers.quantized import QuantizedLinear
from fastllama.quant.weight import QuantizedWeight

PACKED, INTEGERS, MIXED = "pack-quantized", "int-quantized", "mixed-precision"  # values of "format"
_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "group_size": None, "dynamic": True}


class Scheme(NamedTuple):
    """The quantization of a linear layer's weight. group_size: columns that share a scale; None: a whole row."""

    kind: str
    group_size: int | None
    has_zeros: bool

    @classmethod
    def of(cls, weight: QuantizedWeight | QuantizedLinear) -> Scheme:
        """The scheme of a weight, or of a layer."""
        form = weight.form
        group = None if form.group_size == form.columns else form.group_size
        return cls(form.kind, group, form.zeros is not None)

    @property
    def format(self) -> str:
        """The storage format that compressed-tensors uses, and the only one that vLLM has kernels for."""
        return INTEGERS if self.kind == "w8a8" else PACKED

    def to_group(self, targets: list[str]) -> dict[str, Any]:
        """The entry of config_groups for the layers that `targets` match."""
        weights = {
            "num_bits": 4 if self.kind == "int4" else 8,
            "type": "int",
            "symmetric": not self.has_zeros,
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
            "dynamic": False,
        }
        inputs = dict(_TOKENS) if self.kind == "w8a8" else None
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": self.format,
        }


def to_config(schemes: Mapping[str, Scheme], dense: Iterable[str]) -> dict[str, Any]:
    """The quantization_config of a model. schemes: of linear layers, by name. dense: the other layers.

    There must be at least one scheme. A single one targets the class "Linear". Of several, each names its layers: vLLM
    looks up the class of the layer into which it fuses q, k and v before their names.
    """
    dense = list(dense)
    found = list(dict.fromkeys(schemes.values()))
    alone = len(found) == 1
    groups = [each.to_group(["Linear"] if alone else _targets(each, schemes, dense)) for each in found]
    formats = {group["format"] for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": dense,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _targets(scheme: Scheme, schemes: Mapping[str, Scheme], dense: Iterable[str]) -> list[str]:
    """Targets that match exactly a scheme's layers: a pattern for each last part of their names, else the names."""
    leaves: dict[str, dict[str, Scheme | None]] = {}
    for name in dense:
        leaves.setdefault(name.rpartition(".")[2], {})[name] = None
    for name, found in schemes.items():
        leaves.setdefault(name.rpartition(".")[2], {})[name] = found
    targets = []
    for leaf, named in leaves.items():
        mine = [name for name, found in named.items() if found == scheme]
        alone = len(mine) == len(named) and all(name != leaf for name in named)
        targets += [rf"re:.*\.{re.escape(leaf)}$"] if alone else mine
    return targets


def to_tensors(module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that store a linear layer's weight: weight_packed, weight_scale, ...

    Raises the ValueError of `check_zeros`.
    """
    scales = {f"{module}.weight_scale": weight.scales.contiguous()}
    if weight.kind == "w8a8":
        return {f"{module}.weight": weight.values.contiguous()} | scales
    pack = pack_nibbles if weight.kind == "int4" else pack_bytes
    found = {
        f"{module}.weight_packed": pack(weight.values),
        f"{module}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64, device="cpu"),
    }
    if weight.zeros is not None:
        check_zeros(module, weight.zeros)
        found[f"{module}.weight_zero_point"] = pack_nibbles(weight.zeros.to(torch.uint8), 0)
    return found | scales


def check_zeros(module: str, zeros: Tensor) -> None:
    """Raise ValueError for a layer's zeros that are not whole numbers from 0 to 15: files cannot store them."""
    if zeros.is_meta or (zeros.dtype == torch.uint8 and not (zeros > LARGEST).any()):
        return
    numbers = zeros.float()
    wrong = ~((numbers >= 0) & (numbers <= LARGEST) & (numbers == numbers.round()))
    if wrong.any():
        raise ValueError(f"{module} has a zero of {numbers[wrong][0].item():.6g}; legal in a file: 0, 1 ... {LARGEST}")
