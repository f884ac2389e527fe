"""Folders of quantized models from save_model open in transformers, without any fastllama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fastllama.io.load import load_model
from fastllama.io.save import save_model
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.weights import kept_tensors
from fastllama.quant.weight import QuantizedWeight
from tests.io import compressed
from tests.io.checkpoints import random_llama
from tests.io.compressed import group, weights

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("int4", {}),
    "int4 of several groups": ("int4", {"hidden_size": 128, "intermediate_size": 160, "head_dim": 8}),
    "int4 of rows": ("int4", {"hidden_size": 48, "intermediate_size": 80, "head_dim": 4}),
    "int8": ("int8", {}),
    "tied": ("int4", {"tied": True}),
    "biased": ("int8", {"attention_bias": True, "mlp_bias": True}),
    "int8 of columns that fill no word": ("int8", {"intermediate_size": 90}),
    "mixture": ("mixture", {}),
    "w8a8": ("w8a8", {}),
}
GROUPS = {
    "zeros": [group(weights(4, 32, False))],
    "mixture": [
        group(weights(8, None), [r"re:.*self_attn\.[qkv]_proj"]),
        group(weights(4, 64), [r"re:.*1\.mlp.*"]),
        group(weights(4, 32), ["Linear"]),
    ],
}


def opened(path: Path, dtype: torch.dtype, **settings: Any) -> transformers.LlamaForCausalLM:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **settings).eval()


def logits(model: transformers.LlamaForCausalLM) -> Tensor:
    with torch.inference_mode():
        return model(torch.arange(24).view(2, 12)).logits


def saved(path: Path, kind: str, dtype: torch.dtype, settings: dict[str, Any]) -> LlamaForCausalLM:
    """A model in folder / "saved", and its dequantized weights in folder / "dense"."""
    original = random_llama(dtype=dtype, **settings)
    if kind in GROUPS:
        compressed.write(random_llama(dtype=dtype, **settings), path / "original", *GROUPS[kind])
        model = load_model(path / "original")
    else:
        original.save_pretrained(path / "original")
        model = load_model(path / "original", quantization=kind)
    save_model(model, path / "saved")
    kept = {name: make() for name, make in kept_tensors(model)}
    state = {
        name: each.dequantize().to(dtype) if isinstance(each, QuantizedWeight) else each for name, each in kept.items()
    }
    original.load_state_dict(state, strict=False)
    original.save_pretrained(path / "dense")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "settings"), MODELS.values(), ids=MODELS)
def test_transformers_computes_what_the_dequantized_model_computes(
    tmp_path: Path, kind: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    saved(tmp_path, kind, dtype, settings)
    theirs, dense = opened(tmp_path / "saved", dtype), opened(tmp_path / "dense", dtype)
    found, expected = logits(theirs), logits(dense)  # the first call unpacks the weights
    for name, weight in dense.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], weight), name
    assert torch.equal(found, expected) == (kind != "w8a8"), "w8a8 alone rounds what is multiplied, too"


@pytest.mark.skipif(transformers.__version__ < "5", reason="opens no zero points in words, the package's own neither")
@pytest.mark.filterwarnings("ignore:You passed `quantization_config` or equivalent:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_zeros_it_opens_what_it_opens_of_the_packages_own(tmp_path: Path, dtype: torch.dtype) -> None:
    """It unpacks the weights while loading: compressed-tensors 0.20 itself expects another shape."""
    saved(tmp_path, "zeros", dtype, {})
    unpacked = transformers.utils.quantization_config.CompressedTensorsConfig(dequantize=True)
    theirs, ours = (
        logits(opened(tmp_path / name, dtype, quantization_config=unpacked)) for name in ("original", "saved")
    )
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, logits(opened(tmp_path / "dense", dtype)))


@pytest.mark.parametrize("kind", ["int4", "int8", "w8a8"])
def test_what_transformers_saves_again_is_read(tmp_path: Path, kind: str) -> None:
    model = saved(tmp_path, kind, torch.float32, {"hidden_size": 128, "intermediate_size": 160, "head_dim": 8})
    opened(tmp_path / "saved", torch.float32).save_pretrained(tmp_path / "again")
    back = load_model(tmp_path / "again")
    for (name, make), (_, again) in zip(kept_tensors(model), kept_tensors(back), strict=True):
        one, another = make(), again()
        if isinstance(one, QuantizedWeight):
            assert isinstance(another, QuantizedWeight), name
            assert one.equals(another), name
        else:
            assert isinstance(another, Tensor), name
            assert torch.equal(one, another), name
