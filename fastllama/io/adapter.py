"""PEFT LoRA adapters, merged into the base model's weights while these are loaded."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fastllama.errors import CheckpointError, counted, shown
from fastllama.io.formats.base import Checkpoint
from fastllama.io.formats.json_files import AGAIN
from fastllama.io.formats.recognise import what_is
from fastllama.io.formats.tensor_files import read_tensors
from fastllama.io.hub import resolve_model
from fastllama.io.lora import ADAPTER_CONFIG, LoraSettings
from fastllama.kernels.dispatch.isolation import no_autocast
from fastllama.layers.config import LlamaConfig
from fastllama.layers.weights import EMBEDDING, HEAD, slots

_LOG = logging.getLogger("fastllama")
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # in peft's order
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Groups: the module, then A or B; an adapter's name may follow.
_FACTORS = (
    re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.([^.]+))?\.weight"),
    re.compile(r"base_model\.model\.(.+)\.lora_embedding_([AB])(?:\.([^.]+))?"),
)
_REPLACEMENT = re.compile(
    r"base_model\.model\.(.+?)(?:\.(base_layer|original_module|modules_to_save)(?:\.([^.]+))?)?\.(weight|bias)"
)
# Precedence of several tensors for one parameter: peft writes three of a trained embedding. It never merges the lowest,
# which is the base's.
_PRECEDENCE = {"modules_to_save": 2, None: 1, "base_layer": 1, "original_module": 0}
_CHECKPOINTS = re.compile(r"checkpoint-\d+")  # folders of transformers' Trainer, each with an adapter


@dataclass
class _Change:
    """An adapter's change to one parameter: a replacement, then scale * B A added, or one of them."""

    replacement: Tensor | None = None
    factors: dict[str, Tensor] = field(default_factory=dict)  # "A" [rank, in], "B" [out, rank]
    keys: dict[str, str] = field(default_factory=dict)  # names in the adapter's file of "A", "B", the replacement "W"

    @property
    def names(self) -> str:
        return f"{self.keys['A']} and {self.keys['B']}"


def is_adapter(path: Path) -> bool:
    """Whether a folder is an adapter: adapter_config.json, and its weights where there is a config.json, too."""
    try:
        given = [name for name in (ADAPTER_CONFIG, "config.json", *_WEIGHTS) if (path / name).is_file()]
    except PermissionError:  # reported where the folder is opened
        return False
    return (ADAPTER_CONFIG in given and given[1:2] != ["config.json"]) or len(given) > 2


def base_of(adapter: Path) -> Path:
    """The folder of an adapter's base model: a path (from the working directory or the adapter's), or from the Hub.

    Raises the errors of `resolve_model`, with the path of adapter_config.json.
    """
    settings = LoraSettings(adapter)
    name, revision = settings.base
    if not Path(name).exists() and (adapter / name).exists():
        return adapter / name
    try:
        return resolve_model(name if revision is None or Path(name).exists() else f"{name}@{revision}")
    except (FileNotFoundError, ValueError) as error:
        trouble = str(error).removeprefix("model is ")
        raise type(error)(f"{settings.file}: base_model_name_or_path is {trouble}, or give the base as model") from None


def locate(model: str | Path, adapter: str | Path | None) -> tuple[Path, Path | None]:
    """The paths of a model and of the adapter to merge into it. A model that is an adapter resolves to its base."""
    path = resolve_model(str(model))
    if is_adapter(path):
        if adapter is not None:
            raise CheckpointError(
                f"{path} is an adapter itself; give its base as model beside adapter {str(adapter)!r}"
            )
        if (path / "config.json").is_file():
            _LOG.warning("%s is read as an adapter of its base, as in transformers, though it has a config.json", path)
        return base_of(path), path
    return path, None if adapter is None else resolve_model(str(adapter), argument="adapter")


class AdaptedCheckpoint(Checkpoint):
    """A base checkpoint that merges a LoRA adapter into each tensor as it is read.

    Results equal peft's merge_and_unload on a CPU (peft 0.21): W is cast to `dtype`, then scale * (B A), computed in
    fp32, is added and the sum rounded once; on an embedding scale * (B A) is rounded before the addition, too.
    Raises where peft is silent: every tensor of the adapter must be used, every target module must have its tensors,
    and LoRA on the embedding or head of a tied model is refused, as peft merges each into both. Where embedding and
    head were both trained with more tokens, their vocabulary is used; peft asks to resize the base first.
    """

    def __init__(self, base: Checkpoint, folder: Path, dtype: torch.dtype) -> None:
        self.path = base.path
        if base.quantization is not None:
            raise CheckpointError(
                f"{base.path} has weights in {base.quantization}, and an adapter is merged before weights are "
                "quantized: give the model that it was made from"
            )
        self._base, self._dtype = base, dtype
        self._file = _weights_of(folder)
        self._settings = LoraSettings(folder)
        self._modules = [_module(name) for name in {**slots(base.config), HEAD: None} if name.endswith(".weight")]
        self._changes = self._read_changes()
        self._keep_targets()
        self.config = self._adapted_config()
        self._check()

    @property
    def nbytes(self) -> int:
        return self._base.nbytes + self._file.stat().st_size

    def file_of(self, name: str) -> Path:
        change = self._changes.get(name)
        return self._base.file_of(name) if change is None or change.replacement is None else self._file

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        met = set()
        for name, tensor in self._named():
            met.add(name)
            yield name, self._changed(name, tensor, self._changes.get(name))
        for name in self._changes.keys() - met:
            change = self._changes[name]
            raise self._wrong(next(iter(change.keys.values())), f"is for {name}, which {self.path} does not hold")

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """The base's tensors; the one matrix of a tied model appears under each name that it has after the merge."""
        tied, met = self._base.config.tie_word_embeddings, False
        for name, tensor in self._base.tensors():
            assert isinstance(tensor, Tensor)  # the base is not quantized
            if not tied or name not in (EMBEDDING, HEAD):
                yield name, tensor
            elif not met:
                met = True
                yield EMBEDDING, tensor
                if not self.config.tie_word_embeddings:
                    yield HEAD, tensor

    def _changed(self, name: str, tensor: Tensor, change: _Change | None) -> Tensor:
        if change is None:
            return tensor
        if change.replacement is not None:
            tensor = change.replacement
        if not change.factors or not tensor.is_floating_point():
            return tensor
        weight = tensor.to(self._dtype, copy=True)
        if not torch.isfinite(weight).all():  # the loader reports what is wrong with the tensor itself
            return tensor
        a, b = change.factors["A"].float(), change.factors["B"].float()
        with no_autocast():
            delta = (b @ a if name != EMBEDDING else (b @ a).T) * self._settings.scale(_module(name))
        if delta.shape != weight.shape:
            raise CheckpointError(
                f"{self._file}: tensors {change.names} make {list(delta.shape)}, but {name} of the base has shape "
                f"{list(weight.shape)}; was the adapter trained on this base?"
            )
        weight += delta.to(self._dtype) if name == EMBEDDING else delta
        if not torch.isfinite(weight).all():
            raise CheckpointError(f"{self._file}: merging {change.names} into {name} gives NaN or infinity")
        return weight

    def _read_changes(self) -> dict[str, _Change]:
        """The adapter's changes, by the name of the base's tensor."""
        changes: dict[str, _Change] = defaultdict(_Change)
        precedence: dict[str, int] = {}
        adapters = set()
        for key, tensor in read_tensors(self._file):
            if tensor.dtype not in _FLOATS:
                raise self._wrong(key, f"has dtype {tensor.dtype}, expected float32, bfloat16 or float16")
            if not torch.isfinite(tensor).all():
                raise self._wrong(key, "holds NaN or infinity; the training diverged or the file is damaged")
            if factor := next((found for pattern in _FACTORS if (found := pattern.fullmatch(key))), None):
                module, part, adapter = factor.groups()
                change = changes[f"{module}.weight"]
                change.factors[part] = tensor
                if (".lora_embedding_" in key) != (f"{module}.weight" == EMBEDDING):
                    raise self._wrong(key, "is for the other kind of layer: lora_embedding is for embed_tokens alone")
            elif whole := _REPLACEMENT.fullmatch(key):
                (module, place, adapter, kind), part = whole.groups(), "W"
                if tensor.ndim == 0:
                    raise self._wrong(key, "is a single number, expected a vector or a matrix")
                name, known = f"{module}.{kind}", precedence.get(f"{module}.{kind}", 0)
                if _PRECEDENCE[place] < max(known, 1):
                    continue
                change = changes[name]
                if _PRECEDENCE[place] > known:
                    change.keys.pop("W", None)
                precedence[name], change.replacement = _PRECEDENCE[place], tensor
            else:
                raise self._wrong(key, "is no part of a plain LoRA; expected base_model.model.MODULE.lora_A.weight ...")
            if part in change.keys:
                raise self._wrong(key, f"is the same part as {change.keys[part]}; one adapter is merged")
            change.keys[part] = key
            adapters |= {adapter} if adapter else set()
            if len(adapters) > 1:
                raise self._wrong(key, f"is of a second adapter ({', '.join(sorted(adapters))}); one is merged")
        return dict(changes)

    def _keep_targets(self) -> None:
        """Drop factors of modules that target_modules does not name, as peft does."""
        if not self._settings.names_targets:
            return
        targets = self._settings.targets(self._modules)
        if not targets:
            raise CheckpointError(f"{self._settings.file}: target_modules names no module of the base")
        unused = [name for name, change in self._changes.items() if change.factors and _module(name) not in targets]
        unused = [name for name in unused if _module(name) in self._modules]
        for name in unused:
            self._changes[name].factors.clear()
            if self._changes[name].replacement is None:
                del self._changes[name]
        if unused:
            _LOG.warning(
                "%s: %s not used, as target_modules does not name them: %s%s",
                self._file,
                counted(len(unused), "module of the adapter is", "modules of the adapter are"),
                shown(_module(unused[0])),
                ", ..." if unused[1:] else "",
            )

    def _adapted_config(self) -> LlamaConfig:
        """The base's configuration, with the merged model's vocabulary size and tie_word_embeddings."""
        config, changes = self._base.config, self._changes
        embedding, head = (changes[name].replacement if name in changes else None for name in (EMBEDDING, HEAD))
        if config.tie_word_embeddings and (embedding is not None or head is not None):
            if self._separates(embedding, head):
                config = replace(config, tie_word_embeddings=False)
            elif head is not None:
                changes.setdefault(EMBEDDING, changes.pop(HEAD))
                embedding = changes[EMBEDDING].replacement
        rows = {None if tensor is None else tensor.shape[0] for tensor in (embedding, head)}
        if config.tie_word_embeddings:
            rows.discard(None)
        if len(rows) == 1 and (count := rows.pop()) not in (None, config.vocab_size):
            _LOG.info("%s: the vocabulary has %d tokens, the base's %d", self._file, count, config.vocab_size)
            config = replace(config, vocab_size=count)
        return config

    def _separates(self, embedding: Tensor | None, head: Tensor | None) -> bool:
        """Whether modules_to_save gives a tied model an embedding and a head that differ, as peft's wrappers do."""
        wrapped = [
            name for name in (EMBEDDING, HEAD) if _module(name).endswith(tuple(self._settings.saved_modules or [" "]))
        ]
        if not wrapped or (wrapped == [EMBEDDING] and head is None and self._settings.ensures_tie):
            return False
        return embedding is None or head is None or not torch.equal(embedding, head)

    def _check(self) -> None:
        """Raises CheckpointError where the adapter does not fit its settings or its base, before any weight is read."""
        table, tied = slots(self.config), self._base.config.tie_word_embeddings
        for name, change in self._changes.items():
            first = next(iter(change.keys.values()))
            if tied and name in (EMBEDDING, HEAD) and change.factors:
                raise self._wrong(first, "would change head and embedding, which are one matrix in the base")
            if name not in table and not (tied and name == HEAD):
                raise self._wrong(first, f"is for {name}, which the base does not have")
            if len(change.factors) == 1:
                (part,) = change.factors
                raise self._wrong(change.keys[part], f"has no lora_{'B' if part == 'A' else 'A'} beside it")
            if change.factors:
                self._check_rank(name, change)
        for module in self._settings.targets(self._modules):
            if not self._changes.get(f"{module}.weight", _Change()).factors:
                raise CheckpointError(
                    f"{self._file} holds no lora_A and lora_B of {module}, which {self._settings.file.name} names as a "
                    "target; was the adapter trained on this base?"
                )
        replaced = [f".{_module(name)}." for name, change in self._changes.items() if change.replacement is not None]
        for ending in self._settings.saved_modules:
            # a module (lm_head), or the modules inside it (mlp)
            if not any(f"{ending}." in module for module in replaced):
                raise CheckpointError(
                    f"{self._file} holds no weight of {shown(ending)}, one of modules_to_save; {AGAIN}"
                )

    def _check_rank(self, name: str, change: _Change) -> None:
        rank = self._settings.rank(_module(name))
        for part, tensor in change.factors.items():
            if tensor.ndim != 2 or tensor.shape[0 if part == "A" else 1] != rank:
                shape = list(tensor.shape)
                raise self._wrong(
                    change.keys[part], f"has shape {shape}, expected rank {rank} by {self._settings.file.name}"
                )

    def _wrong(self, key: str, trouble: str) -> CheckpointError:
        return CheckpointError(f"{self._file}: tensor {shown(key)} {trouble}")


def _weights_of(folder: Path) -> Path:
    """The weight file of an adapter's folder. Raises FileNotFoundError or CheckpointError, naming what is there."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is {what_is(folder)}; give the adapter's folder, with {ADAPTER_CONFIG}")
    if not (folder / ADAPTER_CONFIG).is_file():
        if (what := what_is(folder / ADAPTER_CONFIG)) is not None:
            raise CheckpointError(f"{folder / ADAPTER_CONFIG} is {what}")
        if nested := sorted(child.name for child in folder.iterdir() if (child / ADAPTER_CONFIG).is_file()):
            raise CheckpointError(
                f"{folder} holds {len(nested)} adapters ({', '.join(nested)}); give {folder / nested[0]}"
            )
        raise FileNotFoundError(f"{folder} holds no {ADAPTER_CONFIG}; expected the folder of a PEFT LoRA adapter")
    nested = sorted(child.name for child in folder.iterdir() if (child / ADAPTER_CONFIG).is_file())
    if nested := [name for name in nested if not _CHECKPOINTS.fullmatch(name)]:
        raise CheckpointError(
            f"{folder} holds several adapters, its own and {', '.join(map(shown, nested))}; give a folder with one"
        )
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
        if (what := what_is(folder / name)) is not None:
            raise CheckpointError(f"{folder / name} is {what}")
    if (folder / "adapters.safetensors").is_file():
        raise CheckpointError(f"{folder} holds adapters.safetensors, as MLX writes it; expected PEFT's {_WEIGHTS[0]}")
    raise FileNotFoundError(f"{folder} holds no {_WEIGHTS[0]}, nor {_WEIGHTS[1]}; {AGAIN}")


def _module(name: str) -> str:
    return name.rpartition(".")[0]
