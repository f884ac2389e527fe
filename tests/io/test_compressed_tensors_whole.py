"""Files and configurations of compressed-tensors that do not fit together, refused with the cause."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastllama.errors import CheckpointError
from fastllama.io.checkpoint import open_checkpoint
from fastllama.io.load import load_model, open_model
from tests.io import compressed
from tests.io.checkpoints import random_llama
from tests.io.compressed import TOKENS, group, weights

UP = "model.layers.0.mlp.up_proj"
LARGE = {"hidden_size": 512, "num_attention_heads": 4, "kv_heads": 4, "intermediate_size": 2048, "vocab_size": 20}


def write(path: Path, kind: str, **settings: int) -> Path:
    """A folder: "words" of four bits, "words of 8", or "w8a8", which are plain integers."""
    arguments = weights(4 if kind == "words" else 8, None)
    scheme = group(arguments, input_activations=TOKENS) if kind == "w8a8" else group(arguments)
    compressed.write(random_llama(**settings), path, scheme)
    return path


@pytest.mark.parametrize("status", ["frozen", None, "compressed"])
@pytest.mark.parametrize("kind", ["words", "w8a8"])
def test_a_model_whose_quantization_is_simulated_is_refused(tmp_path: Path, kind: str, status: str | None) -> None:
    """Weights in floating point, beside scales: what compressed-tensors has before it compresses."""
    path = write(tmp_path / "model", kind)
    compressed.edit_config(path, quantization_status=status)

    def simulated(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if name.endswith(("weight_packed", "weight_shape"))]:
            del state[name]
        for scale in [name for name in state if name.endswith(".weight_scale")]:
            state[scale.removesuffix("_scale")] = torch.zeros(64, 64, dtype=torch.bfloat16)

    compressed.edit_tensors(path, simulated)
    with pytest.raises(
        CheckpointError,
        match=r"_proj\.weight has dtype torch\.bfloat16, expected integers: config_groups\.group_0 has weight.*"
        r"Quantization was only simulated, on weights in floating point; legal: weights that are compressed$",
    ):
        load_model(path)


def rename(path: Path, name: str | None, before: str = "quantization_config") -> None:
    """Rename or remove the quantization_config."""
    file = path / "config.json"
    content = json.loads(file.read_text())
    quantization = content.pop(before)
    file.write_text(json.dumps(content if name is None else content | {name: quantization}))


def test_files_that_the_configuration_does_not_cover_are_named_by_their_first_tensor(tmp_path: Path) -> None:
    """The files are too small for what is declared, which alone would not name the cause."""
    path = write(tmp_path / "model", "words", **LARGE)
    rename(path, None)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.num_parameters > checkpoint.nbytes
    first = next(name for name, _ in checkpoint.tensors() if ".weight_" in name)
    message = f"{path / 'model.safetensors'}: tensor {first} is of a quantized weight, and the model's config.json does"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)} not specify its quantization$"):
        open_model(path)


def test_files_whose_targets_match_nothing_are_named_by_their_first_tensor(tmp_path: Path) -> None:
    path = write(tmp_path / "model", "words", **LARGE)
    compressed.edit_config(path, ignore=["re:.*"])
    with pytest.raises(
        CheckpointError, match=r"is of a quantized weight, and no target of quantization_config matches"
    ):
        open_model(path)


def test_files_that_are_too_small_and_not_quantized_do_not_belong_to_the_configuration(tmp_path: Path) -> None:
    random_llama().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 10_000_000}))
    with pytest.raises(CheckpointError, match=r"declares [\d,]+ numbers, but .* bytes; do they belong together\?$"):
        open_model(tmp_path / "model")


def test_the_older_spelling_of_the_configuration_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "model", "words")
    rename(path, "compression_config")
    with pytest.raises(
        CheckpointError,
        match=rf"^{re.escape(str(path / 'config.json'))}: compression_config specifies the quantization of the "
        r"weights, in an older spelling; "
        r"legal: the same under the name quantization_config, as current writers have it$",
    ):
        open_checkpoint(path)
    rename(path, "quantization_config", "compression_config")
    assert load_model(path).layers[0].mlp.down_proj.kind == "int4"


def test_a_part_that_comes_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "model", "w8a8")
    name = f"{UP}.weight_scale"
    scale = compressed.load_file(path / "model.safetensors")[name]
    compressed.shards(path, 2)
    for file in path.glob("*.safetensors"):
        compressed.save_file(compressed.load_file(file) | {name: scale}, file, {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"model-00002-of-00002\.safetensors: tensor {name} appears twice; legal"
    ):
        load_model(path)


def test_a_weight_that_is_not_in_the_files_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "model", "words")

    def drop(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if name.startswith(f"{UP}.")]:
            del state[name]

    compressed.edit_tensors(path, drop)
    with pytest.raises(CheckpointError, match=rf"tensor {UP}.weight is missing; the checkpoint is incomplete"):
        load_model(path)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", None])
def test_other_methods_are_refused_by_name(tmp_path: Path, method: str | None) -> None:
    path = write(tmp_path / "model", "words")
    compressed.edit_config(path, quant_method=method)
    with pytest.raises(CheckpointError, match=rf"by {method!r}; expected bf16, fp16, fp32 or compressed-tensors"):
        open_checkpoint(path)
