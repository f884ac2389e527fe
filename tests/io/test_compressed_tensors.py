"""compressed-tensors files are read value by value as the package itself compressed them, from any layout."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastllama.io.checkpoint import open_checkpoint
from fastllama.io.load import load_model, open_model
from fastllama.layers import packing
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.quantized import QuantizedLinear
from fastllama.layers.weights import kept_tensors
from fastllama.quant.weight import QuantizedWeight
from tests.io import compressed
from tests.io.checkpoints import random_llama
from tests.io.compressed import TOKENS, group, weights

WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8}


def kept(model: LlamaForCausalLM) -> dict[str, Tensor | QuantizedWeight]:
    return {name: make() for name, make in kept_tensors(model)}


def quantized(model: LlamaForCausalLM) -> dict[str, QuantizedWeight]:
    return {name: weight for name, weight in kept(model).items() if isinstance(weight, QuantizedWeight)}


SCHEMES: dict[str, dict[str, Any]] = {
    **{f"int4 {size}{'' if sym else ' asym'}": weights(4, size, sym) for size in (32, 64, 128, None) for sym in (1, 0)},
    "int4 tensor": weights(4, strategy="tensor"),
    "int4 tensor asym": weights(4, strategy="tensor", symmetric=False),
    **{f"int8 {size}": weights(8, size) for size in (32, 64, 128, None)},
    "int8 tensor": weights(8, strategy="tensor"),
}
FORMATS = ["pack-quantized", "int-quantized", "naive-quantized"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_weights_are_those_that_the_package_decompresses(
    tmp_path: Path, scheme: dict[str, Any], layout: str, dtype: torch.dtype
) -> None:
    original = random_llama(kv_heads=4, dtype=dtype, **WIDE)
    expected = compressed.write(original, tmp_path / "model", group(scheme, format=layout))
    checkpoint, _ = open_model(tmp_path / "model")
    assert checkpoint.quantization == ("int4" if scheme["num_bits"] == 4 else "int8")
    found = quantized(load_model(tmp_path / "model"))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.scales.dtype == dtype
        assert torch.equal(weight.dequantize().to(dtype), expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_w8a8_is_what_rounds_rows_of_its_input(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    original = random_llama(dtype=dtype)
    scheme = group(weights(8, None), input_activations=TOKENS, format=layout)
    expected = compressed.write(original, tmp_path / "model", scheme)
    assert open_model(tmp_path / "model")[0].quantization == "w8a8"
    found = quantized(load_model(tmp_path / "model"))
    assert {weight.kind for weight in found.values()} == {"w8a8"}
    for name, weight in found.items():
        assert torch.equal(weight.dequantize().to(dtype), expected[name]), name


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("size", [256, 384])
def test_larger_groups_are_split_without_loss(tmp_path: Path, size: int, symmetric: bool) -> None:
    original = random_llama(hidden_size=768, intermediate_size=2 * 768, num_hidden_layers=1)
    expected = compressed.write(original, tmp_path / "model", group(weights(4, size, symmetric)))
    found = quantized(load_model(tmp_path / "model"))
    assert {weight.group_size for weight in found.values()} == {128}
    for name, weight in found.items():
        assert torch.equal(weight.dequantize(), expected[name]), name


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("size", [64, None])
def test_eight_bits_with_zero_points_that_are_all_zero_are_symmetric(
    tmp_path: Path, size: int | None, layout: str
) -> None:
    scheme, original = group(weights(8, size, False), format=layout), random_llama()
    with torch.no_grad():  # each group from -128 to 127 steps
        for parameter in original.parameters():
            if parameter.ndim == 2:
                parameter.clamp_(-1.28, 1.27)
                parameter[:, 0::64], parameter[:, 1::64] = -1.28, 1.27
    expected = compressed.write(original, tmp_path / "zeros", scheme)
    found = quantized(load_model(tmp_path / "zeros"))
    assert all(torch.equal(weight.dequantize(), expected[name]) for name, weight in found.items())
    compressed.write(random_llama(), tmp_path / "others", scheme)
    with pytest.raises(ValueError, match=r"weight_zero_point holds -?\d+; legal for weights of 8 bits: 0"):
        load_model(tmp_path / "others")


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_rows_that_share_a_tile_with_others_are_kept(tmp_path: Path, kv_heads: int, tied: bool) -> None:
    """Heads have 16 rows, so k and v have 16, 32 and 128; a tile has 64."""
    original = random_llama(kv_heads=kv_heads, tied=tied, hidden_size=128, head_dim=16)
    expected = compressed.write(original, tmp_path / "model", group(weights(4, 32, False)))
    model = load_model(tmp_path / "model")
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    found = quantized(model)
    assert len(found) == 2 * 7
    assert all(torch.equal(weight.dequantize(), expected[name]) for name, weight in found.items())


def test_columns_that_fill_no_word_are_counted_by_weight_shape(tmp_path: Path) -> None:
    original = random_llama(intermediate_size=90)
    expected = compressed.write(original, tmp_path / "model", group(weights(4, None, False)))
    words = load_file(tmp_path / "model" / "model.safetensors")["model.layers.0.mlp.down_proj.weight_packed"]
    assert words.shape == (64, 12)
    found = quantized(load_model(tmp_path / "model"))
    assert all(torch.equal(weight.dequantize(), expected[name]) for name, weight in found.items())


MIXED = [
    group(weights(8, None), ["re:.*self_attn.*"], format="int-quantized"),
    group(weights(4, 32, False), ["Linear"], format="pack-quantized"),
    group(
        weights(4, 64), ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"], format="naive-quantized"
    ),
]


def test_a_name_counts_before_a_pattern_and_a_pattern_before_a_class(tmp_path: Path) -> None:
    compressed.write(original := random_llama(), tmp_path / "model", *MIXED, ignore=("re:.*0.mlp.gate.*", "lm_head"))
    expected = compressed.decompressed(original)
    with pytest.raises(ValueError, match=r"and what it is fused (or tied )?with is"):
        load_model(tmp_path / "model")
    tensors = dict(open_checkpoint(tmp_path / "model").tensors())
    found = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, QuantizedWeight)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(weight.dequantize(), expected[name]) for name, weight in found.items())
    kinds = {name: (weight.kind, weight.group_size) for name, weight in found.items()}
    assert kinds["model.layers.0.self_attn.o_proj.weight"] == ("int8", 64)
    assert kinds["model.layers.1.self_attn.o_proj.weight"] == ("int4", 64)
    assert kinds["model.layers.0.mlp.down_proj.weight"] == ("int4", 32)
    assert kinds["model.layers.1.mlp.down_proj.weight"] == ("int4", 64)
    assert isinstance(tensors["model.layers.0.mlp.gate_proj.weight"], Tensor)


def test_layers_of_several_schemes_run(tmp_path: Path) -> None:
    original = random_llama()
    compressed.write(original, tmp_path / "model", *MIXED)
    with torch.inference_mode():
        theirs = original(torch.arange(12).view(2, 6)).logits
    model = load_model(tmp_path / "model")
    assert {module.kind for module in model.modules() if isinstance(module, QuantizedLinear)} == {"int4", "int8"}
    back = random_llama()
    back.load_state_dict({name: w if isinstance(w, Tensor) else w.dequantize() for name, w in kept(model).items()})
    with torch.inference_mode():
        assert torch.equal(back(torch.arange(12).view(2, 6)).logits, theirs)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("first", "ignore"),
    [("o_proj", ()), ("o_proj", ("re:.*(q|k|v)_proj",)), ("lm_head", ("re:.*layers.*",))],
    ids=["q comes first", "o is the first quantized", "the head alone"],
)
def test_the_kind_is_that_of_the_first_quantized_layer(
    tmp_path: Path, first: str, ignore: tuple[str, ...], tied: bool
) -> None:
    """However few there are of it; LLM and its model then name the same."""
    few = group(weights(8, None), [f"re:.*0.*{first}", "lm_head"])
    others = group(weights(4, 32), [r"re:.*mlp.*", r"re:.*1\.self_attn\.o_proj", r"re:.*(q|k|v)_proj"])
    ignored = (*ignore, "lm_head") if tied and first != "lm_head" else ignore
    compressed.write(random_llama(tied=tied), tmp_path / "model", few, others, ignore=ignored)
    kind = open_model(tmp_path / "model")[0].quantization
    assert kind == packing.kind_of(load_model(tmp_path / "model"))
    assert kind == ("int4" if not ignore else "int8")


@pytest.mark.parametrize("count", [2, 5])
def test_parts_of_a_weight_may_lie_in_several_shards(tmp_path: Path, count: int) -> None:
    expected = compressed.write(random_llama(), tmp_path / "model", group(weights(4, 32, False)))
    compressed.shards(tmp_path / "model", count)
    found = quantized(load_model(tmp_path / "model"))
    assert all(torch.equal(weight.dequantize(), expected[name]) for name, weight in found.items())
    index = open_checkpoint(tmp_path / "model")
    assert index.file_of("model.layers.0.mlp.up_proj.weight").suffix == ".safetensors"


def test_names_without_the_prefix_of_the_model_are_read(tmp_path: Path) -> None:
    expected = compressed.write(random_llama(tied=True), tmp_path / "model", group(weights(4, 32, False)))
    compressed.edit_tensors(
        tmp_path / "model", lambda state: {name.removeprefix("model."): tensor for name, tensor in state.items()}
    )
    found = quantized(load_model(tmp_path / "model"))
    assert found.keys() == expected.keys()


def test_a_state_dict_of_torch_is_read(tmp_path: Path) -> None:
    expected = compressed.write(random_llama(), tmp_path / "model", group(weights(4, 32, False)))
    file = tmp_path / "model" / "model.safetensors"
    torch.save(load_file(file), tmp_path / "model" / "pytorch_model.bin")
    file.unlink()
    assert quantized(load_model(tmp_path / "model")).keys() == expected.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_scale_is_rounded_whatever_the_dtype(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    compressed.write(random_llama(), tmp_path / "model", group(weights(4, 32)), scale_dtype=stored)
    scales = load_file(tmp_path / "model" / "model.safetensors")["model.layers.0.mlp.up_proj.weight_scale"]
    assert scales.dtype == stored
    model = load_model(tmp_path / "model", dtype=dtype)
    assert model.dtype == dtype
    found = quantized(model)["model.layers.0.mlp.up_proj.weight"].scales
    assert found.dtype == (stored if stored == dtype else torch.float32)
    assert torch.equal(found.double(), scales.double())


def test_the_dtype_is_that_of_unquantized_tensors_where_the_file_has_none(tmp_path: Path) -> None:
    scheme = group(weights(8, None), format="int-quantized")
    compressed.write(random_llama(dtype=torch.bfloat16), tmp_path / "model", scheme, scale_dtype=torch.float16)
    file = tmp_path / "model" / "config.json"
    content = json.loads(file.read_text())
    content.pop("dtype", None)
    file.write_text(json.dumps(content))
    weights_file = tmp_path / "model" / "model.safetensors"
    state = sorted(load_file(weights_file).items(), key=lambda item: item[1].dtype == torch.bfloat16)
    torch.save(dict(state), weights_file.with_name("pytorch_model.bin"))  # in this order: int8 and fp16 come first
    weights_file.unlink()
    assert load_model(tmp_path / "model").dtype == torch.bfloat16


def test_a_quantized_head_is_read(tmp_path: Path) -> None:
    expected = compressed.write(random_llama(), tmp_path / "model", group(weights(4, 32)), ignore=())
    model = load_model(tmp_path / "model")
    assert isinstance(model.lm_head, QuantizedLinear)
    assert torch.equal(model.lm_head.weight, expected["lm_head.weight"])


@pytest.mark.parametrize("layout", FORMATS[:2])
def test_a_quantized_head_unties_it(tmp_path: Path, caplog: pytest.LogCaptureFixture, layout: str) -> None:
    original = random_llama()
    expected = compressed.write(original, tmp_path / "model", group(weights(4, 32), format=layout), ignore=())
    file = tmp_path / "model" / "config.json"
    file.write_text(file.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    model = load_model(tmp_path / "model")
    assert "tie_word_embeddings is true, but lm_head is quantized: not tied" in caplog.text
    assert torch.equal(model.lm_head.weight, expected["lm_head.weight"])
    assert torch.equal(model.embed_tokens.weight, original.model.embed_tokens.weight)


def test_a_tied_head_that_is_not_in_the_file_is_the_embedding_although_a_target_matches_it(tmp_path: Path) -> None:
    compressed.write(random_llama(tied=True), tmp_path / "model", group(weights(4, 32)))
    compressed.edit_config(tmp_path / "model", ignore=[])
    model = load_model(tmp_path / "model")
    assert model.lm_head.weight is model.embed_tokens.weight
    compressed.edit_config(tmp_path / "model", ignore=["re:.*_proj"])
    assert open_checkpoint(tmp_path / "model").quantization is None


def test_scales_of_a_kv_cache_are_logged_and_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compressed.write(random_llama(), tmp_path / "model", group(weights(4, 32)))
    compressed.edit_config(tmp_path / "model", kv_cache_scheme={"num_bits": 8, "type": "float", "dynamic": False})

    def add(state: dict[str, Tensor]) -> None:
        for i in range(2):
            state |= {f"model.layers.{i}.self_attn.{kind}_scale": torch.ones(1) for kind in "kv"}
            state[f"model.layers.{i}.self_attn.k_proj.output_scale"] = torch.ones(1)

    compressed.edit_tensors(tmp_path / "model", add)
    with caplog.at_level(logging.WARNING):
        load_model(tmp_path / "model")
    assert "kv_cache_scheme is not used: the KV cache is not quantized" in caplog.text
    assert " and 5 more are for a quantized KV cache, ignored" in caplog.text


def test_zero_points_of_symmetric_weights_are_passed_over_where_they_are_zeros(tmp_path: Path) -> None:
    """Written by earlier versions of the package."""
    compressed.write(random_llama(), tmp_path / "model", group(weights(8, None), input_activations=TOKENS))
    name = "model.layers.0.mlp.up_proj.weight_zero_point"

    def add(state: dict[str, Tensor]) -> None:
        state[name] = torch.zeros(192, 1, dtype=torch.int8)

    def change(state: dict[str, Tensor]) -> None:
        state[name][5] = 1

    compressed.edit_tensors(tmp_path / "model", add)
    assert len(quantized(load_model(tmp_path / "model"))) == 14
    compressed.edit_tensors(tmp_path / "model", change)
    with pytest.raises(ValueError, match=r"weight_zero_point is not zero, and config_groups\.group_0 has symm"):
        load_model(tmp_path / "model")


class FloatsMade(TorchDispatchMode):
    """The numbers of the largest floating-point tensor that an op gives back, views of files apart."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor) and each.is_floating_point() and not each.is_meta:
                self.largest = max(self.largest, each.numel())
        return result


@pytest.mark.parametrize(("bits", "layout"), [(4, "pack-quantized"), (8, "int-quantized")])
def test_no_weight_is_ever_made_in_floating_point(tmp_path: Path, bits: int, layout: str) -> None:
    """The largest is the embedding, of which each matrix here is a multiple."""
    original = random_llama(hidden_size=256, num_attention_heads=4, kv_heads=4, intermediate_size=512, vocab_size=20)
    compressed.write(original, tmp_path / "model", group(weights(bits, 64), format=layout))
    with FloatsMade() as made:
        model = load_model(tmp_path / "model")
    smallest = min(weight.shape.numel() for weight in quantized(model).values())
    assert made.largest == 20 * 256 < smallest
    with FloatsMade() as made:
        quantized(model)["model.layers.0.self_attn.q_proj.weight"].dequantize()
    assert made.largest >= 256 * 256, "the measure sees nothing"


def test_the_file_may_be_half_as_large_as_what_it_declares(tmp_path: Path) -> None:
    original = random_llama(hidden_size=512, num_attention_heads=4, kv_heads=4, intermediate_size=2048, vocab_size=20)
    compressed.write(original, tmp_path / "model", group(weights(4, None)))
    checkpoint, _ = open_model(tmp_path / "model")
    assert checkpoint.nbytes < checkpoint.config.num_parameters < 2 * checkpoint.nbytes
    assert checkpoint.numbers_per_byte == 2
