"""Models of quantized linear layers, patched and as transformers runs them, and helpers that compare them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fastllama
from fastllama import kernels
from fastllama.integrations.transformers.linears import HF_LINEARS
from fastllama.layers.quantized import QuantizedLinear
from fastllama.quant.rounding import round_to_nearest
from tests.integrations.models import IDS, SIZES, llama

NUM_LAYERS = SIZES["num_hidden_layers"]
TILES = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 192}
# Where rows of q, k, v and of gate, up are whole tiles of 64 or not.
SHAPES: dict[str, dict[str, Any]] = {
    "fused": TILES,
    "apart": {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160},
    "fused with biases": TILES | {"attention_bias": True, "mlp_bias": True},
    "apart with biases": {"attention_bias": True, "mlp_bias": True},
    "only q, k, v fused": TILES | {"intermediate_size": 160},
}
FORMS: dict[str, dict[str, Any]] = {
    "int4": {"kind": "int4"},
    "int4 in rows": {"kind": "int4", "group_size": 1},
    "int4 with zeros": {"kind": "int4", "zeros": True},
    "int8": {"kind": "int8"},
    "w8a8": {"kind": "w8a8"},
}
KINDS = ["int4", "int8", "w8a8"]
# w8a8 rounds x: what is between two integers may become either.
BOUNDS = {"int4": 1e-5, "int8": 1e-5, "w8a8": 2e-3}


def quantized(model: Any, kind: str, *, group_size: int = 32, zeros: bool = False, names: str = "") -> Any:
    """A model whose blocks' linear layers are ours, in place: those whose name ends with one of `names`, or all."""
    endings = (*names.split(),) or ("_proj",)
    for name, linear in [*model.model.layers.named_modules()]:
        if not name.endswith("_proj") or not name.endswith(endings):
            continue
        weight = linear.weight.detach()
        rounded = round_to_nearest(weight, kind, group_size, symmetric=not zeros)
        owner, _, attribute = name.rpartition(".")
        setattr(model.model.layers.get_submodule(owner), attribute, HF_LINEARS[kind].of(rounded, linear.bias))
    return model


def pair(kind: str = "int4", dtype: torch.dtype = torch.float32, sizes: Any = TILES, **form: Any) -> tuple[Any, Any]:
    """The same quantized model twice: as transformers runs it, and patched."""
    plain = quantized(llama(dtype, **sizes), kind, **form)
    patched = copy.deepcopy(plain)
    report = fastllama.patch(patched, strict=True)
    assert report.patched == report.layers
    return plain, patched


def dequantized(model: Any) -> Any:
    """A model with its dequantized weights, in fp32."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name, linear in owner.named_children():
                if isinstance(linear, QuantizedLinear):
                    dense = nn.Linear(linear.in_features, linear.out_features)
                    dense.weight, dense.bias = nn.Parameter(linear.weight), linear.bias
                    setattr(owner, name, dense)
    return model


def logits(model: Any, **given: Any) -> Tensor:
    with torch.inference_mode():
        return model(IDS, **given).logits


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """The number of calls of each matmul op, and of torch's linear."""
    found: Counter[str] = Counter()
    names = [name for name in vars(kernels) if name.startswith("matmul") and not name.endswith("workspace")]

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return function(*args, **kwargs)

        return run

    with mock.patch.multiple(kernels, **{name: noting(name, getattr(kernels, name)) for name in names}):
        yield found


def layers_of(model: Any) -> list[Any]:
    """The weight of each decoder layer, as it was read."""
    return [layer._fastllama.linears for layer in model.model.layers]


def addresses(linears: Any) -> list[int]:
    return [tensor.data_ptr() for linear in linears for tensor in (*linear.buffers(), *linear.parameters())]
