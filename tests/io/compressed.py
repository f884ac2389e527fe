"""Folders that the package compressed-tensors itself has quantized and described, and its decompressed weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("compressed_tensors", reason="compressed-tensors asks for Python 3.11")

from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32 as pack_to_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.utils import match_named_modules, match_targets

State = dict[str, Tensor]
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def weights(bits: int = 4, group_size: int | None = 32, symmetric: bool = True, strategy: str = "") -> dict[str, Any]:
    """Arguments for weights; a group size of None: one scale per row, or by the strategy."""
    strategy = strategy or ("channel" if group_size is None else "group")
    sizes = {"group_size": group_size} if strategy == "group" else {}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy} | sizes


def group(arguments: dict[str, Any], targets: list[str] | None = None, **others: Any) -> dict[str, Any]:
    """One of config_groups."""
    return {"targets": targets or ["Linear"], "weights": arguments} | others


def write(
    model: transformers.LlamaForCausalLM,
    path: Path,
    *groups: dict[str, Any],
    ignore: tuple[str, ...] = ("lm_head",),
    scale_dtype: torch.dtype | None = None,
) -> State:
    """A folder of the model, changed in place, compressed: by minima and maxima. Returns its weights, decompressed."""
    config = QuantizationConfig(
        config_groups={f"group_{i}": each for i, each in enumerate(groups)}, ignore=list(ignore)
    )
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            _calibrate(module, module.quantization_scheme.weights, scale_dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    dense = decompressed(model)
    path.mkdir()
    model.config.save_pretrained(path)
    tied = model.config.tie_word_embeddings
    state = {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    save_file(state, path / "model.safetensors", {"format": "pt"})
    compressor.update_config(str(path))
    return dense


def decompressed(model: torch.nn.Module) -> State:
    """What compressed-tensors makes of each quantized layer's weight, in the dtype of its scales."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "quantization_scheme"):
            compressor = BaseCompressor.get_value_from_registry(module.quantization_scheme.format.value)
            state = {key: tensor.detach() for key, tensor in module.state_dict().items()}
            found[f"{name}.weight"] = compressor.decompress(state, module.quantization_scheme)["weight"]
    return found


def schemes(model: torch.nn.Module, quantization: dict[str, Any]) -> dict[str, QuantizationScheme]:
    """The scheme of each layer by a quantization_config, as apply_quantization_config finds it."""
    config = QuantizationConfig.model_validate(quantization)
    targets: dict[str, Any] = {target: each for each in config.config_groups.values() for target in each.targets}
    matched = match_named_modules(model, targets, config.ignore)
    return {name: targets[match_targets(name, module, targets)[0]] for name, module in matched}


def _calibrate(module: Any, arguments: QuantizationArgs, scale_dtype: torch.dtype | None) -> None:
    weight = module.weight.detach().float()
    rows = {
        "group": (weight.shape[0], -1, arguments.group_size),
        "channel": (weight.shape[0], 1, -1),
        "tensor": (1, -1),
    }
    parts = weight.reshape(rows[str(arguments.strategy)])
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), arguments)
    module.weight_scale.data = scale.to(scale_dtype or module.weight.dtype)
    if not arguments.symmetric:
        module.weight_zero_point.data = zero.to(torch.int8)


def edit_config(path: Path, **changes: Any) -> None:
    """Change the quantization_config; a key may be a path of keys, with dots."""
    file = path / "config.json"
    content = json.loads(file.read_text())
    for key, value in changes.items():
        *outer, last = key.split(".")
        place = content["quantization_config"]
        for each in outer:
            place = place[each]
        place[last] = value
    file.write_text(json.dumps(content))


def edit_tensors(path: Path, change: Any) -> None:
    """Replace the tensors of the one file by what `change` makes of them, in place or as a new dictionary."""
    state = load_file(path / "model.safetensors")
    state = change(state) or state
    save_file(state, path / "model.safetensors", {"format": "pt"})


def shards(path: Path, count: int) -> None:
    """Spread the one file's tensors over several, so that neighbours by name, as parts of a weight are, lie apart."""
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {}
    for i, names in enumerate(_dealt(sorted(state), count), 1):
        file = f"model-{i:05d}-of-{count:05d}.safetensors"
        save_file({name: state[name] for name in names}, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _dealt(names: list[str], count: int) -> Iterator[list[str]]:
    return (names[i::count] for i in range(count))
