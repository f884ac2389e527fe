"""The weight files of a Hugging Face folder: one file, or the shards that an index names."""

from __future__ import annotations

from pathlib import Path

from fastllama.errors import CheckpointError
from fastllama.io.formats.base import AGAIN, read_json

# In the order transformers looks for them.
_NAMES = tuple(f"{stem}{end}" for stem in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))


def weight_files(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """The weight files in order, and which of them an index promises for each tensor name."""
    found = next((path / name for name in _NAMES if (path / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path} holds no weights; expected one of {', '.join(_NAMES)}")
    if found.suffix != ".json":
        return [found], {}
    weight_map = read_json(found).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{found} has no weight_map; {AGAIN}")
    suffix = Path(found.stem.removesuffix(".index")).suffix
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or Path(file).suffix != suffix:
            raise CheckpointError(
                f"{found}: tensor {name} is in {file!r}, expected the name of a {suffix} file beside it"
            )
        if not (path / file).is_file():
            raise FileNotFoundError(f"{path / file} does not exist, but {found.name} has tensor {name} in it; {AGAIN}")
    return [path / file for file in sorted(set(weight_map.values()))], {n: path / f for n, f in weight_map.items()}
