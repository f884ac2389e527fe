"""The weight files of a Hugging Face folder: one file, or the shards that an index names."""

from __future__ import annotations

import re
from pathlib import Path

from fastllama.errors import CheckpointError, shown
from fastllama.io.formats.json_files import AGAIN, json_kind, read_json
from fastllama.io.formats.recognise import what_is

# In transformers' order of precedence.
_NAMES = tuple(f"{stem}{end}" for stem in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")
# Weights in other formats, and advice on them, for the error about a folder without readable weights; specific first.
_OTHERS = {
    "*.gguf": "GGUF is not read; give the Hugging Face folder that it was made from",
    "adapter_model.*": "those of an adapter alone; adapter_config.json belongs beside it, and config.json does not",
    "consolidated*.safetensors": "Mistral's own layout is not read; give the Hugging Face one",
    "consolidated.*.pth": "Meta's layout has params.json and no config.json",
    "*.safetensors": "expected the name model.safetensors; rename it",
    "*.ckpt": "a trainer's checkpoint; save its state dict as model.safetensors",
    "*.bin": "expected the name pytorch_model.bin; rename it",
    "*.pt": "expected a state dict under the name pytorch_model.bin",
    "*.pth": "expected a state dict under the name pytorch_model.bin",
    "*.distcp": "shards of torch.distributed.checkpoint; save the state dict as model.safetensors",
    "*.h5": "TensorFlow's weights are not read; save them as model.safetensors",
    "*.msgpack": "Flax's weights are not read; save them as model.safetensors",
    "*.npz": "MLX's or NumPy's weights are not read; save them as model.safetensors",
    "*.onnx": "ONNX is not read; give the Hugging Face folder that it was made from",
}


def weight_files(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """The weight files in order, and the file of each tensor name where there is an index.

    Raises FileNotFoundError or CheckpointError with what is there instead and what to do.
    """
    found = next((path / name for name in _NAMES if (path / name).is_file()), None)
    if found is None:
        raise _no_weights(path)
    if found.suffix != ".json":
        return [found], {}
    weight_map = read_json(found).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        had = "an empty" if weight_map == {} else "no" if weight_map is None else f"{json_kind(weight_map)} as"
        raise CheckpointError(f"{found} has {had} weight_map, expected a file name for each tensor; {AGAIN}")
    suffix = Path(found.stem.removesuffix(".index")).suffix
    for name, file in weight_map.items():
        inside = isinstance(file, str) and not Path(file).is_absolute() and ".." not in Path(file).parts
        if not inside or Path(file).suffix != suffix:
            raise CheckpointError(
                f"{found}: tensor {shown(name)} is in {shown(repr(file))}, expected a {suffix} file in its folder"
            )
    files = [path / file for file in sorted(set(weight_map.values()))]
    if missing := [file for file in files if not file.is_file()]:
        raise _missing_shards(found, weight_map, missing)
    return files, {name: path / file for name, file in weight_map.items()}


def _missing_shards(index: Path, weight_map: dict[str, str], missing: list[Path]) -> Exception:
    first, *others = missing
    tensor = shown(next(name for name, file in weight_map.items() if index.parent / file == first))
    more = f", and {len(others)} more of its files are missing" if others else ""
    if (what := what_is(first)) is not None:
        return CheckpointError(f"{first} is {what} ({index.name} has tensor {tensor} in it{more})")
    return FileNotFoundError(f"{first} does not exist, but {index.name} has tensor {tensor} in it{more}; {AGAIN}")


def _no_weights(path: Path) -> Exception:
    for name in _NAMES:
        if (what := what_is(path / name)) is not None:  # a folder, or a link that leads nowhere
            return CheckpointError(f"{path / name} is {what}")
    if shards := sorted(file.name for file in path.iterdir() if _SHARD.fullmatch(file.name)):
        match = _SHARD.fullmatch(shards[0])
        assert match is not None
        index = f"{match[1]}{match[4]}.index.json"
        # Complete shards would be unambiguous without an index, but transformers does not read them either.
        return FileNotFoundError(
            f"{path / index} is missing: {len(shards)} of {int(match[3])} shards are there ({shards[0]} ...), "
            "and the index names the tensors of each; get it from where they came from"
        )
    for pattern, what in _OTHERS.items():
        if found := sorted(file.name for file in path.glob(pattern) if not file.name.startswith("._")):
            return CheckpointError(f"{path} holds no weights that are read, but {found[0]}: {what}")
    return FileNotFoundError(f"{path} holds no weights; expected one of {', '.join(_NAMES)}")
