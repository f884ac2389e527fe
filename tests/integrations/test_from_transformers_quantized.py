"""fastllama.from_transformers of a model that FastLlamaConfig quantized: the packed weights are in memory once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import fastllama
from fastllama.integrations.transformers.linears import HF_LINEARS
from fastllama.layers.quantized import LINEARS, QuantizedLinear
from fastllama.quant.rounding import round_to_nearest
from tests.integrations.models import IDS, SIZES, llama
from tests.integrations.test_from_transformers import answers, endless, running, tensors

TILED: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
TILED |= {"intermediate_size": 192, "attention_bias": True}  # 128, 64, 64 and 192 rows, of tiles of 64
CUT: dict[str, Any] = {"intermediate_size": 160, "attention_bias": True}  # and k, v of 32 rows


def quantized(folder: Path, sizes: dict[str, Any], *given: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A model that was saved in the folder, quantized as it is loaded."""
    llama(dtype, **sizes).save_pretrained(folder)
    config = fastllama.FastLlamaConfig(*given)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def storages(model: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors(model)}


@pytest.mark.parametrize("sizes", [TILED, CUT], ids=["tiled", "cut"])
@pytest.mark.parametrize("scheme", LINEARS)
def test_tokens_are_those_of_the_same_quantization(scheme: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    theirs = quantized(tmp_path, sizes, scheme)
    with torch.inference_mode():
        logits = theirs(IDS).logits
        with running(theirs) as llm, running(tmp_path, quantization=scheme) as of_folder:
            assert llm.quantization == of_folder.quantization == scheme
            found = answers(llm)
            assert found == answers(of_folder)
        assert torch.equal(theirs(IDS).logits, logits)
        if scheme != "w8a8":  # where a rounding of what is multiplied may fall otherwise
            assert found == endless(theirs)


@pytest.mark.parametrize("first", ["patch", "from_transformers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", LINEARS)
def test_packed_weights_are_shared(scheme: str, dtype: torch.dtype, first: str, tmp_path: Path) -> None:
    theirs = quantized(tmp_path, TILED, scheme, dtype=dtype)
    if first == "patch":
        fastllama.patch(theirs, strict=True)
    ours = fastllama.from_transformers(theirs)
    places = [tensor.data_ptr() for tensor in tensors(theirs)]
    assert fastllama.patch(theirs, strict=True).patched == SIZES["num_hidden_layers"]
    assert [tensor.data_ptr() for tensor in tensors(theirs)] == places
    assert storages(ours) <= storages(theirs)
    linears = [module for module in ours.layers.modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 4 * SIZES["num_hidden_layers"]
    assert ours.dtype == dtype


def test_weights_that_end_within_a_tile_are_copied_and_no_others(tmp_path: Path) -> None:
    theirs = quantized(tmp_path, CUT, "int4")
    before = [tensor.data_ptr() for tensor in tensors(theirs)]
    ours = fastllama.from_transformers(theirs)
    assert [tensor.data_ptr() for tensor in tensors(theirs)] == before
    own = {name for name, tensor in ours.named_buffers() if tensor.untyped_storage().data_ptr() not in storages(theirs)}
    fused = [
        f"layers.{i}.{name}" for i in range(len(ours.layers)) for name in ("self_attn.qkv_proj", "mlp.gate_up_proj")
    ]
    assert own == {f"{name}.{buffer}" for name in fused for buffer in ("packed", "scales")}


def test_some_layers_may_be_quantized(tmp_path: Path) -> None:
    theirs = quantized(tmp_path, TILED, "int4", 32, ["layers.0", "down_proj"])
    with torch.inference_mode(), running(theirs) as llm:
        assert answers(llm) == endless(theirs)


def test_what_is_fused_must_be_quantized_alike(tmp_path: Path) -> None:
    theirs = quantized(tmp_path, TILED, "int8", 128, ["k_proj"])
    places = [tensor.data_ptr() for tensor in tensors(theirs)]
    reason = r"model.layers.0 and \d+ more \(q_proj, k_proj, v_proj are not quantized alike\)"
    with pytest.raises(ValueError, match=reason):
        fastllama.from_transformers(theirs)
    assert [tensor.data_ptr() for tensor in tensors(theirs)] == places


def test_groups_of_what_is_fused_must_be_of_one_size(tmp_path: Path) -> None:
    theirs = quantized(tmp_path, TILED, "int4")
    layer = theirs.model.layers[1].mlp
    layer.up_proj = HF_LINEARS["int4"].of(round_to_nearest(layer.up_proj.weight, "int4", 32), None)
    with pytest.raises(ValueError, match=r"model.layers.1 \(gate_proj, up_proj are not quantized alike\)"):
        fastllama.from_transformers(theirs)


def test_another_quantization_is_refused(tmp_path: Path) -> None:
    theirs = quantized(tmp_path, TILED, "int8")
    with pytest.raises(ValueError, match=r"quantization is 'int4' for weights in int8; legal: 'auto', None or 'int8'"):
        running(theirs, quantization="int4")
