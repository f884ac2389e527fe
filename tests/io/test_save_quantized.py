"""save_model of quantized models: compressed-tensors' files, which hold the integers and scales as they are."""

from __future__ import annotations

import itertools
import json
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastllama.io import save
from fastllama.io.load import load_model
from fastllama.io.packed.compressed_tensors import Scheme, to_config, to_tensors
from fastllama.io.packed.words import pack_bytes, unpack_bytes
from fastllama.io.save import save_model
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.quantized import LINEARS, QuantizedLinear
from fastllama.layers.weights import kept_tensors
from fastllama.quant.weight import QuantizedWeight
from tests.io import compressed
from tests.io.checkpoints import random_llama
from tests.io.compressed import group, pack_to_int32, weights

PARTS = ("weight_packed", "weight_shape")


def written(path: Path, kind: str | None = "int4", *, zeros: int = 0, **settings: Any) -> LlamaForCausalLM:
    """A model as LLM(quantization=) makes one; zeros: of int4, in groups of so many columns, with zeros."""
    original = random_llama(**settings)
    if zeros:
        compressed.write(original, path, group(weights(4, zeros, False)))
        return load_model(path)
    original.save_pretrained(path)
    return load_model(path, quantization=kind)


def equal(one: Tensor | QuantizedWeight, another: Tensor | QuantizedWeight) -> bool:
    if isinstance(one, QuantizedWeight) and isinstance(another, QuantizedWeight):
        return one.form == another.form and one.equals(another)
    return isinstance(one, Tensor) and isinstance(another, Tensor) and torch.equal(one, another)


MODELS: dict[str, dict[str, Any]] = {
    **{
        f"{kind} {dtype}": {"kind": kind, "dtype": dtype}
        for kind in LINEARS
        for dtype in (torch.float32, torch.bfloat16)
    },
    "int4 of several groups": {"kind": "int4", "hidden_size": 128, "intermediate_size": 160, "head_dim": 8},
    "int4 of rows": {"kind": "int4", "hidden_size": 48, "intermediate_size": 80, "head_dim": 4},
    "int4 with zeros": {"zeros": 32},
    "int4 with zeros in bf16": {"zeros": 64, "dtype": torch.bfloat16},
    "tied": {"kind": "int4", "tied": True},
    "biased": {"kind": "int8", "attention_bias": True, "mlp_bias": True},
    "int8 of columns that fill no word": {"kind": "int8", "intermediate_size": 90},
    "rows that fill no tile": {"kind": "int4", "hidden_size": 128, "head_dim": 16, "kv_heads": 2},
}


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_what_is_saved_is_read_again_bit_by_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = written(tmp_path / "original", **settings)
    save_model(model, tmp_path / "first")
    back = load_model(tmp_path / "first")
    before, after = ({name: make() for name, make in kept_tensors(each)} for each in (model, back))
    assert before.keys() == after.keys()
    assert sum(isinstance(each, QuantizedWeight) for each in after.values()) == 2 * 7
    assert all(equal(tensor, after[name]) for name, tensor in before.items())
    save_model(back, tmp_path / "second")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_each_layer_has_its_scheme_by_the_packages_own_matching(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The package decompresses each by that scheme, which it checks for contradictions, to the same weight."""
    model = written(tmp_path / "original", **settings)
    save_model(model, tmp_path / "saved")
    written_config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    state = load_file(tmp_path / "saved" / "model.safetensors")
    skeleton = random_llama(**{key: value for key, value in settings.items() if key not in ("kind", "zeros", "dtype")})
    found = compressed.schemes(skeleton, written_config)
    expected = {name.removesuffix(".weight"): make() for name, make in kept_tensors(model)}
    expected = {name: weight for name, weight in expected.items() if isinstance(weight, QuantizedWeight)}
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        scheme = found[name]
        assert scheme.format == ("int-quantized" if weight.kind == "w8a8" else "pack-quantized")
        assert (scheme.input_activations is not None) == (weight.kind == "w8a8")
        parts = {key.rpartition(".")[2]: tensor for key, tensor in state.items() if key.rpartition(".")[0] == name}
        parts.pop("bias", None)
        compressor = compressed.BaseCompressor.get_value_from_registry(scheme.format)
        assert parts.keys() == set(compressor.compression_param_names(scheme))
        dense = compressor.decompress(parts, scheme)["weight"]
        assert dense.dtype == weight.scales.dtype
        assert torch.equal(dense, weight.dequantize().to(dense.dtype)), name


A, B, C = Scheme("int4", 128, False), Scheme("int4", None, True), Scheme("int8", None, False)
NAMES = [f"layers.{i}.{each}" for i in range(3) for each in ("q_proj", "o_proj", "down_proj")]


@pytest.mark.parametrize(
    ("schemes", "dense"),
    [
        (dict.fromkeys(NAMES, A), ["lm_head"]),
        ({name: B if name.endswith("down_proj") else A for name in NAMES}, ["lm_head"]),
        ({name: [A, B, C][int(name.split(".")[1])] for name in NAMES}, ["lm_head"]),
        ({name: C if name == NAMES[4] else A for name in NAMES}, ["lm_head"]),
        ({name: B if name.endswith("o_proj") else A for name in NAMES if name != NAMES[1]}, [NAMES[1], "lm_head"]),
        (dict.fromkeys(NAMES, A) | {"lm_head": C}, []),
    ],
    ids=["one", "by name's end", "by layer", "one layer apart", "a name's end that stays dense", "the head"],
)
def test_mixtures_are_described_so_that_each_layer_gets_its_own(schemes: dict[str, Scheme], dense: list[str]) -> None:
    described = to_config(schemes, dense)
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict() for _ in range(3)), "lm_head": nn.Linear(1, 1)})
    for name in NAMES:
        _, i, leaf = name.split(".")
        model["layers"][int(i)][leaf] = nn.Linear(1, 1)  # type: ignore[index,operator]
    found = {
        name: Scheme(
            "int4" if scheme.weights.num_bits == 4 else "int8", scheme.weights.group_size, not scheme.weights.symmetric
        )
        for name, scheme in compressed.schemes(model, described).items()
    }
    assert found == schemes
    formats = {scheme.format for scheme in schemes.values()}
    assert described["format"] == (formats.pop() if len(formats) == 1 else "mixed-precision")
    targets = [group["targets"] for group in described["config_groups"].values()]
    assert len(targets) == len(set(schemes.values()))
    assert ["Linear"] in targets if len(targets) == 1 else "Linear" not in itertools.chain(*targets)


def test_w8a8_alone_is_written_as_plain_integers(tmp_path: Path) -> None:
    """vLLM opens int-quantized where inputs are rounded, too, and words where they are not."""
    formats = {"int4": "pack-quantized", "int8": "pack-quantized", "w8a8": "int-quantized"}
    assert formats.keys() == LINEARS.keys()
    name = "model.layers.0.mlp.down_proj"
    for kind, layout in formats.items():
        model = written(tmp_path / kind, kind)
        save_model(model, tmp_path / f"{kind}-saved")
        config = json.loads((tmp_path / f"{kind}-saved" / "config.json").read_text())["quantization_config"]
        assert (config["format"], config["config_groups"]["group_0"]["format"]) == (layout, layout)
        state = load_file(tmp_path / f"{kind}-saved" / "model.safetensors")
        leaves = {key.removeprefix(f"{name}.") for key in state if key.startswith(name)}
        assert leaves == ({"weight", "weight_scale"} if kind == "w8a8" else {*PARTS, "weight_scale"})


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("rows", [1, 3])
def test_words_of_four_are_those_of_the_package(rows: int, columns: int) -> None:
    values = torch.randint(-128, 128, (rows, columns + 1), dtype=torch.int8)[:, :columns]
    words = pack_bytes(values)
    assert torch.equal(words, pack_to_int32(values, 8))
    assert torch.equal(unpack_bytes(words, columns), values)


@pytest.mark.parametrize("size", [150_000, 50_000])
def test_shards_are_made_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    model = written(tmp_path / "original", "int4", hidden_size=128, intermediate_size=512)
    made: list[weakref.ref[Tensor]] = []
    alive: list[set[int]] = []

    def to_tensors_noted(module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        tensors = to_tensors(module, weight)
        if not weight.values.is_meta:  # else only the plan is made
            made.extend(map(weakref.ref, tensors.values()))
        return tensors

    def save_noted(tensors: dict[str, Tensor], *arguments: Any) -> None:
        alive.append({id(found) for each in made if (found := each()) is not None})
        assert alive[-1] <= {id(tensor) for tensor in tensors.values()}, "of another shard"
        save_file(tensors, *arguments)

    monkeypatch.setattr(save, "to_tensors", to_tensors_noted)
    monkeypatch.setattr(save, "save_file", save_noted)
    save_model(model, tmp_path / "out", max_shard_size=size)
    assert len(alive) > 2
    assert sum(map(len, alive)) == len(made) > 2 * 7
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sizes = Counter[str]()
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        state = load_file(file)
        assert {index["weight_map"][name] for name in state} == {file.name}
        sizes[file.name] = sum(tensor.nbytes for tensor in state.values())
    assert len(sizes) == len(alive)
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    assert max(sizes.values()) <= size
    assert all(one + another > size for one, another in itertools.pairwise(sizes.values())), "closed too early"
    back = load_model(tmp_path / "out")
    for (name, one), (_, another) in zip(kept_tensors(model), kept_tensors(back), strict=True):
        assert equal(one(), another()), name


@pytest.mark.parametrize("after", [0, 2])
def test_an_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    model, calls = written(tmp_path / "original"), itertools.count()

    def interrupted(*arguments: Any) -> None:
        if next(calls) >= after:
            raise KeyboardInterrupt
        save_file(*arguments)

    monkeypatch.setattr(save, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(model, tmp_path / "out", max_shard_size=10_000)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


@pytest.mark.parametrize("zero", [7.5, -1.0, 16.0, float("nan")])
def test_zeros_that_no_file_can_hold_are_refused_before_anything_is_written(tmp_path: Path, zero: float) -> None:
    model = written(tmp_path / "original", zeros=32)
    layer = model.layers[1].self_attn.qkv_proj
    assert isinstance(layer, QuantizedLinear)
    assert layer.zeros is not None
    layer.zeros = layer.zeros.float()
    save_model(model, tmp_path / "whole")  # as floats
    assert [
        weight.zeros.dtype for weight in _quantized(load_model(tmp_path / "whole")) if weight.zeros is not None
    ] == [torch.uint8] * 14
    layer.zeros[64 + 3, 1] = zero
    with pytest.raises(ValueError, match=rf"^model\.layers\.1\.self_attn\.k_proj has a zero of {zero:g}; legal in a"):
        save_model(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "whole"]


def _quantized(model: LlamaForCausalLM) -> list[QuantizedWeight]:
    return [weight for _, make in kept_tensors(model) if isinstance(weight := make(), QuantizedWeight)]


def test_what_is_packed_without_loss_is_written_dense(tmp_path: Path) -> None:
    original = random_llama(dtype=torch.bfloat16, hidden_size=512, intermediate_size=512)
    original.save_pretrained(tmp_path / "original")
    save_model(load_model(tmp_path / "original"), tmp_path / "plain")
    packed = load_model(tmp_path / "original", quantization="bf12")
    assert all(type(block.mlp.down_proj).__name__ == "Bf12Linear" for block in packed.layers)
    save_model(packed, tmp_path / "packed", max_shard_size=10_000_000)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes()
    assert "quantization_config" not in json.loads((tmp_path / "packed" / "config.json").read_text())
    save_model(packed, tmp_path / "shards", max_shard_size=600_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert all(file.stat().st_size < 650_000 for file in (tmp_path / "shards").glob("*.safetensors"))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_head_is_ignored_by_name(tmp_path: Path, tied: bool) -> None:
    save_model(written(tmp_path / "original", "int8", tied=tied), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    assert (config["quant_method"], config["quantization_status"]) == ("compressed-tensors", "compressed")
