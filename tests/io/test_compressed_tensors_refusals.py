"""compressed-tensors is refused where it holds other than integers with scales, or a damaged file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.errors import CheckpointError
from fastllama.io.checkpoint import open_checkpoint
from fastllama.io.load import load_model
from tests.io import compressed
from tests.io.checkpoints import random_llama
from tests.io.compressed import TOKENS, group, weights

WEIGHTS, INPUTS = "config_groups.group_0.weights", "config_groups.group_0.input_activations"
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """int4 with zeros in words; int4 as plain integers; and 8 bits of weights and of activations."""
    path = tmp_path_factory.mktemp("compressed")
    compressed.write(random_llama(), path / "words", group(weights(4, 32, False)))
    compressed.write(random_llama(), path / "plain", group(weights(4, 32, False), format="int-quantized"))
    compressed.write(random_llama(), path / "w8a8", group(weights(8, None), input_activations=TOKENS))
    return {folder.name: folder for folder in path.iterdir()}


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / "copy"))


def changed(key: str, value: Any, kind: str = "words") -> tuple[str, dict[str, Any]]:
    return kind, {key: value}


ONE = {"group_0": {"targets": ["Linear"], "weights": weights(4, 32)}}
CONFIGS: dict[str, tuple[tuple[str, dict[str, Any]], str]] = {
    "format": (
        changed("format", "nvfp4-pack-quantized"),
        "format is 'nvfp4-pack-quantized'; legal: 'pack-quantized', ",
    ),
    "no format": (changed("format", None), "format is None; legal: 'pack-quantized', 'int-quantized', 'naive"),
    "own format": (
        changed("config_groups.group_0.format", "marlin-24"),
        "config_groups.group_0.format is 'marlin-24'; legal: 'pack-quantized', 'int-quantized', 'naive-quantized'",
    ),
    "mixed as own format": (changed("config_groups.group_0.format", "mixed-precision"), "format is 'mixed-precision'"),
    "status": (
        changed("quantization_status", "calibration"),
        "quantization_status is 'calibration'; legal: 'compressed', 'frozen'",
    ),
    "first status": (changed("quantization_status", "initialized"), "quantization_status is 'initialized'; le"),
    "sparse": (
        changed("sparsity_config", {"format": "sparse-24-bitmask"}),
        "sparsity_config is {'format': 'sparse-24-bitmask'}; legal: none",
    ),
    "rotated": (changed("transform_config", {"config_groups": {"R1": {"type": "hadamard"}}}), "transform_config is {"),
    "experts": (changed("moe_sparsity_config", {"sparsity": 0.5}), "moe_sparsity_config is {'sparsity': 0.5}; legal"),
    "groups are a list": (changed("config_groups", ["W4A16"]), "config_groups is ['W4A16']; legal: an object"),
    "a preset": (
        changed("config_groups", {"W4A16": ["Linear"]}),
        "config_groups.W4A16 is ['Linear']; legal: an object with targets and weights",
    ),
    "3 bits": (changed(f"{WEIGHTS}.num_bits", 3), f"{WEIGHTS}.num_bits is 3; legal: 4 or 8"),
    "bits are text": (changed(f"{WEIGHTS}.num_bits", "4"), f"{WEIGHTS}.num_bits is '4'; legal: 4 or 8"),
    "bits are true": (changed(f"{WEIGHTS}.num_bits", True), f"{WEIGHTS}.num_bits is True; legal: 4 or 8"),
    "fp8": (changed(f"{WEIGHTS}.type", "float"), f"{WEIGHTS}.type is 'float'; legal: \"int\""),
    "blocks": (changed(f"{WEIGHTS}.strategy", "block"), f'{WEIGHTS}.strategy is \'block\'; legal: "group" or "cha'),
    "block structure": (
        changed(f"{WEIGHTS}.block_structure", [128, 128]),
        "block_structure is [128, 128]; legal: null",
    ),
    "dynamic weights": (changed(f"{WEIGHTS}.dynamic", True), f"{WEIGHTS}.dynamic is True; legal: false"),
    "act-order": (changed(f"{WEIGHTS}.actorder", "group"), f"{WEIGHTS}.actorder is 'group'; legal: null or false or"),
    "old act-order": (changed(f"{WEIGHTS}.actorder", True), f"{WEIGHTS}.actorder is True; legal: null or false or"),
    "unknown argument": (changed(f"{WEIGHTS}.codebook", "nf4"), f"{WEIGHTS}.codebook is 'nf4'; legal: the keys act"),
    "unknown key": (changed("config_groups.group_0.rotation", 1), "config_groups.group_0.rotation is 1; legal: the k"),
    "no weights": (changed(WEIGHTS, None), f"{WEIGHTS} is None; legal: an object with num_bits, type"),
    "group of 16": (
        changed(f"{WEIGHTS}.group_size", 16),
        f"{WEIGHTS}.group_size is 16; legal: 32, 64, 128 or a multiple of 128 that divides the 64 columns of model.lay",
    ),
    "group that does not divide": (changed(f"{WEIGHTS}.group_size", 128), "group_size is 128; legal: 32, 64, 128 or a"),
    "no group size": (changed(f"{WEIGHTS}.group_size", None), f"{WEIGHTS}.group_size is None; legal: a number of col"),
    "group size of rows": (changed(f"{WEIGHTS}.strategy", "channel"), f"{WEIGHTS}.group_size is 32; legal: null or -1"),
    "group size is text": (changed(f"{WEIGHTS}.group_size", "32"), f"{WEIGHTS}.group_size is '32'; legal: a number"),
    "rounded outputs": (
        changed("config_groups.group_0.output_activations", TOKENS),
        "config_groups.group_0.output_activations is {",
    ),
    "4 bits with activations": (changed(INPUTS, TOKENS), f"{WEIGHTS}.num_bits is 4; legal: 8"),
    "targets are text": (
        changed("config_groups.group_0.targets", "Linear"),
        "targets is 'Linear'; legal: a list of na",
    ),
    "targets are numbers": (changed("config_groups.group_0.targets", [1]), "targets is [1]; legal: a list of names"),
    "a pattern that is none": (changed("ignore", ["re:("]), "ignore is 're:('; legal: a regular expression (missing"),
    "a pattern of too much": (changed("ignore", ["re:a{9999999999}"]), "legal: a regular expression (the repetition n"),
    "a pattern that is a target": (
        changed("config_groups.group_0.targets", ["Linear", r"re:(\w+|\.)+(\w+|\.)+!"]),
        r"config_groups.group_0.targets is 're:(\\w+|\\.)+(\\w+|\\.)+!'; legal: a pattern in which no group is",
    ),
    "activations are empty": (changed(INPUTS, {}), f"{INPUTS} is {{}}; legal: null, or an object with num_bits"),
    "activations are a list": (changed(INPUTS, []), f"{INPUTS} is []; legal: null, or an object with num_bits"),
    "ignore is text": (changed("ignore", "lm_head"), "ignore is 'lm_head'; legal: a list of names"),
    "embedding by class": (
        changed("config_groups.group_0.targets", ["Linear", "Embedding"]),
        "config_groups.group_0.targets is 'Embedding'; legal: linear layers, and it matches model.embed_tokens",
    ),
    "embedding by pattern": (
        changed("config_groups.group_0.targets", ["re:.*"]),
        "config_groups.group_0.targets is 're:.*'; legal: linear layers, and it matches model.embed_tokens",
    ),
    "static activations": (changed(f"{INPUTS}.dynamic", False, "w8a8"), f"{INPUTS}.dynamic is False; legal: true"),
    "fp8 activations": (changed(f"{INPUTS}.type", "float", "w8a8"), f"{INPUTS}.type is 'float'; legal: \"int\""),
    "4 bit activations": (changed(f"{INPUTS}.num_bits", 4, "w8a8"), f"{INPUTS}.num_bits is 4; legal: 8"),
    "activations by tensor": (
        changed(f"{INPUTS}.strategy", "tensor", "w8a8"),
        f"{INPUTS}.strategy is 'tensor'; legal: \"token\"",
    ),
    "asymmetric activations": (
        changed(f"{INPUTS}.symmetric", False, "w8a8"),
        f"{INPUTS}.symmetric is False; legal: true",
    ),
    "activations with groups of weights": (
        changed(WEIGHTS, weights(8, 32), "w8a8"),
        f'{WEIGHTS}.strategy is \'group\'; legal: "channel" or "tensor"',
    ),
    "activations with zeros of weights": (
        changed(f"{WEIGHTS}.symmetric", False, "w8a8"),
        f"{WEIGHTS}.symmetric is False; legal: true",
    ),
}


@pytest.mark.parametrize(("change", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_is_refused_when_opened_by_key_value_and_what_is_legal(
    copy: Callable[[str], Path], change: tuple[str, dict[str, Any]], message: str
) -> None:
    kind, changes = change
    path = copy(kind)
    open_checkpoint(path)
    compressed.edit_config(path, **changes)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(path)
    assert str(raised.value).startswith(f"{path / 'config.json'}: quantization_config: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


LEGAL: dict[str, tuple[str, dict[str, Any]]] = {
    "no strategy, a group size": changed(f"{WEIGHTS}.strategy", None),
    "upper case": changed(f"{WEIGHTS}.type", "INT"),
    "columns ordered before rounding": changed(f"{WEIGHTS}.actorder", "static"),
    "an observer": changed(f"{WEIGHTS}.observer", "mse"),
    "sparse in name alone": changed("sparsity_config", {"format": "dense"}),
    "sparse in name alone, as llm-compressor writes it": changed(
        "sparsity_config",
        {"format": "dense", "global_sparsity": 0.14, "ignore": [], "sparsity_structure": "unstructured", "targets": []},
    ),
    "frozen": changed("quantization_status", "frozen"),
    "no status": changed("quantization_status", None),
    "no status of plain integers": changed("quantization_status", None, "w8a8"),
    "no transform": changed("transform_config", {"config_groups": {}}),
    "nothing ignored by name": changed("ignore", ["re:lm_.*"]),
    "the class of all modules, ignored": changed("ignore", ["lm_head", "LlamaRMSNorm"]),
    "rows as -1": changed(f"{WEIGHTS}.group_size", -1, "w8a8"),
    "the file's format": changed("config_groups.group_0.format", None),
}


@pytest.mark.parametrize(("kind", "changes"), LEGAL.values(), ids=LEGAL)
def test_what_changes_nothing_is_legal(copy: Callable[[str], Path], kind: str, changes: dict[str, Any]) -> None:
    path = copy(kind)
    before = load_model(path).state_dict()
    compressed.edit_config(path, **changes)
    after = load_model(path).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def put(leaf: str, make: Callable[[Tensor], Tensor], module: str = UP) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        state[f"{module}.{leaf}"] = make(state[f"{module}.{leaf}"]).contiguous()

    return change


def without(leaf: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__delitem__(f"{UP}.{leaf}")


def added(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__setitem__(name, tensor)


def holding(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_put((torch.tensor(3), torch.tensor(0)), torch.tensor(value, dtype=tensor.dtype))


def unpacked(state: dict[str, Tensor]) -> None:
    for leaf in ("packed", "shape", "scale", "zero_point"):
        del state[f"{UP}.weight_{leaf}"]
    state[f"{UP}.weight"] = torch.zeros(192, 64)


TENSORS: dict[str, tuple[str, Callable[[dict[str, Tensor]], None], str]] = {
    "no scale": ("words", without("weight_scale"), f"{UP}.weight_scale is missing, beside {UP}.weight_"),
    "no words": ("words", without("weight_packed"), f"{UP}.weight_packed is missing, beside {UP}.weight_"),
    "no shape": ("words", without("weight_shape"), f"{UP}.weight_shape is missing, beside {UP}.weight_"),
    "no zeros": ("words", without("weight_zero_point"), f"{UP}.weight_zero_point is missing, beside {UP}.weight_"),
    "no plain weight": ("plain", without("weight"), f"{UP}.weight is missing, beside {UP}.weight_"),
    "not quantized": (
        "words",
        unpacked,
        f"{UP}.weight has dtype torch.float32, expected integers: config_groups.group_0 has weight_packed, weight_",
    ),
    "not quantized, plain": (
        "plain",
        put("weight", lambda each: each.float()),
        f"{UP}.weight has dtype torch.float32, expected integers: config_groups.group_0 has weight, weight_sc",
    ),
    "fp8": (
        "w8a8",
        put("weight", lambda each: each.to(torch.float8_e4m3fn)),
        f"{UP}.weight has dtype torch.float8_e4m3fn, expected torch.int8",
    ),
    "no columns": (
        "plain",
        put("weight", lambda each: each[:, :0]),
        f"{UP}.weight has shape [192, 0], expected rows and columns",
    ),
    "no rows": ("w8a8", put("weight", lambda each: each[:0]), f"{UP}.weight has shape [0, 64], expected rows and col"),
    "a shape without columns": (
        "words",
        put("weight_shape", lambda each: each * torch.tensor([1, 0])),
        f"{UP}.weight_shape holds [192, 0], expected a number of rows and one of columns",
    ),
    "a shape that is negative": (
        "words",
        put("weight_shape", lambda each: -each),
        f"{UP}.weight_shape holds [-192, -6",
    ),
    "words cut off": (
        "words",
        put("weight_packed", lambda each: each[:0]),
        "weight_packed has shape [0, 8], expected [192",
    ),
    "empty scales": ("w8a8", put("weight_scale", lambda each: each[:0]), "weight_scale has shape [0, 1], expected [1"),
    "empty zeros": (
        "plain",
        put("weight_zero_point", lambda each: each[:, :0]),
        "weight_zero_point has shape [192, 0], expected [192, 2]",
    ),
    "act-order": (
        "words",
        added(f"{UP}.weight_g_idx", torch.zeros(64, dtype=torch.int32)),
        f"{UP}.weight_g_idx is unexpected: config_groups.group_0 has weight_packed",
    ),
    "static activations": ("w8a8", added(f"{UP}.input_scale", torch.ones(1)), f"{UP}.input_scale is unexpected"),
    "scale of a layer that no target matches": (
        "words",
        added("lm_head.weight_scale", torch.ones(40, 2)),
        "lm_head.weight_scale is of a quantized weight, and no target of quantization_config matches its layer",
    ),
    "words of 64": (
        "words",
        put("weight_packed", lambda each: each.long()),
        "weight_packed has dtype torch.int64, exp",
    ),
    "rows cut off": (
        "words",
        put("weight_packed", lambda each: each[:-1]),
        "weight_packed has shape [191, 8], expecte",
    ),
    "columns cut off": (
        "words",
        put("weight_packed", lambda each: each[:, 1:]),
        "has shape [192, 7], expected [192, 8]",
    ),
    "another shape": (
        "words",
        put("weight_shape", lambda each: each - 1),
        "weight_packed has shape [192, 8], expected [191, 8] by the weight's",
    ),
    "a shape that groups do not divide": (
        "words",
        put("weight_shape", lambda each: each - torch.tensor([0, 1])),
        f"{UP}.weight_shape gives 63 columns; config_groups.group_0 has groups of 32",
    ),
    "a shape of three": (
        "words",
        put("weight_shape", lambda each: each.repeat(2)),
        "weight_shape has shape [4], expec",
    ),
    "a shape of floats": (
        "words",
        put("weight_shape", lambda each: each.float()),
        "weight_shape has dtype torch.float",
    ),
    "a plain weight of one dimension": (
        "plain",
        put("weight", lambda each: each[0]),
        "has shape [64], expected two di",
    ),
    "rows of another layer": (
        "plain",
        lambda state: [put(each, lambda tensor: tensor[:64])(state) for each in ("weight", "weight_scale")] and None,
        "weight_zero_point has shape [192, 2], expected [64, 2] by the weight's",
    ),
    "a matrix of another size": (
        "w8a8",
        lambda state: [put(each, lambda tensor: tensor[:64])(state) for each in ("weight", "weight_scale")] and None,
        f"{UP}.weight has shape [64, 64], expected [192, 64] by the configuration (intermediate_size, hidden_size)",
    ),
    "scales of integers": ("words", put("weight_scale", lambda each: each.int()), "weight_scale has dtype torch.int32"),
    "scales of fp64": (
        "words",
        put("weight_scale", lambda each: each.double()),
        "weight_scale has dtype torch.float64",
    ),
    "too few scales": (
        "words",
        put("weight_scale", lambda each: each[:, :1]),
        "weight_scale has shape [192, 1], expecte",
    ),
    "a scale of NaN": (
        "words",
        put("weight_scale", holding(float("nan"))),
        "weight_scale holds NaN or infinity; the fi",
    ),
    "an infinite scale": (
        "w8a8",
        put("weight_scale", holding(float("inf"))),
        "weight_scale holds NaN or infinity; the",
    ),
    "zeros that are not packed": (
        "words",
        put("weight_zero_point", lambda each: each.to(torch.int8)),
        "has dtype torch",
    ),
    "too few zeros": (
        "words",
        put("weight_zero_point", lambda each: each[:-1]),
        "weight_zero_point has shape [23, 2], e",
    ),
    "zeros of 5 bits": (
        "plain",
        put("weight_zero_point", holding(8)),
        "weight_zero_point holds 8, expected integers of",
    ),
    "values of 5 bits": (
        "plain",
        put("weight", holding(-9)),
        f"{UP}.weight holds -9, expected integers of 4 bits, -8 to",
    ),
    "NaN in a norm": (
        "words",
        put("weight", lambda each: each * float("nan"), "model.norm"),
        "model.norm.weight holds NaN or infinity",
    ),
}


@pytest.mark.parametrize(("kind", "change", "message"), TENSORS.values(), ids=TENSORS)
def test_damaged_tensors_are_refused_by_name_and_file(
    copy: Callable[[str], Path], kind: str, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    path = copy(kind)
    compressed.edit_tensors(path, change)
    with pytest.raises(CheckpointError) as raised:
        load_model(path)
    assert str(raised.value).startswith(f"{path / 'model.safetensors'}: tensor ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
