"""Reads the quantization_config of compressed-tensors: how files store the weight of each linear layer.

Defaults and the precedence of targets are those of compressed-tensors 0.20 (quant_args.py, match.py and
lifecycle/apply.py there). Anything but integers with scales is refused.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastllama.errors import CheckpointError, brief
from fastllama.io.packed.compressed_tensors import INTEGERS, MIXED, PACKED
from fastllama.kernels.reference.int4 import GROUPS

logger = logging.getLogger("fastllama")

METHOD = "compressed-tensors"
LARGEST_GROUP = max(GROUPS)
_NAIVE = "naive-quantized"
_STATUSES = "compressed", "frozen", None  # for the last two, the tensors' dtypes decide whether they are compressed
_LARGEST_PATTERN = 5  # quantifiers and groups of a pattern, so that no name takes long to match
_CLASSES = {"Linear", "Module"}  # class names that targets give linear layers
_EMBEDDINGS = "model.embed_tokens", {"Embedding", "Module"}
_ACTORDER = (None, False, "weight", "static")  # irrelevant once weights are rounded
_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_ARGUMENTS: dict[str, Any] = {  # with defaults
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "group_size": None,
    "strategy": None,
    "block_structure": None,
    "dynamic": False,
    "actorder": None,
    "scale_dtype": None,
    "zp_dtype": None,
    "observer": None,
    "observer_kwargs": None,
}


class Storage(NamedTuple):
    """How files store a layer's weight, which becomes one of `quantized.LINEARS`.

    strategy: the values that share a scale: "group", "channel" (a row) or "tensor". group_size: of "group". packed:
    whether values are packed in words, and zero points too unless the strategy is "tensor". group: its key in the file.
    """

    kind: str
    bits: int
    symmetric: bool
    strategy: str
    group_size: int | None
    packed: bool
    group: str


def read_config(quantization: Mapping[str, Any], file: Path, columns: Mapping[str, int]) -> dict[str, Storage]:
    """The storage of each quantized linear layer, by name; columns: of the weights of all linear layers.

    Raises CheckpointError naming the file, the key, its value and what is legal.
    """
    return _Reading(file).layers(quantization, columns)


class _Reading:
    def __init__(self, file: Path) -> None:
        self._file = file

    def layers(self, quantization: Mapping[str, Any], columns: Mapping[str, int]) -> dict[str, Storage]:
        self._look_at_whole(quantization)
        groups = quantization.get("config_groups") or {}
        if not isinstance(groups, dict):
            raise self._illegal("config_groups", groups, "an object")
        targets: dict[str, Storage] = {}
        for name, group in groups.items():
            storage = self._storage(f"config_groups.{name}", group, quantization)
            targets |= dict.fromkeys(self._names(f"config_groups.{name}.targets", group.get("targets")), storage)
        ignored = self._names("ignore", quantization.get("ignore") or [])
        embeddings = self._match(*_EMBEDDINGS, targets, ignored)
        if embeddings is not None:
            key = f"{targets[embeddings].group}.targets"
            raise self._illegal(key, embeddings, f"linear layers, and it matches {_EMBEDDINGS[0]}")
        found = {}
        for layer, size in columns.items():
            target = self._match(layer, _CLASSES, targets, ignored)
            if target is not None:
                found[layer] = self._fitting(targets[target], layer, size)
        return found

    def _look_at_whole(self, quantization: Mapping[str, Any]) -> None:
        """Refuse settings that change all weights; a setting of the KV cache is logged."""
        legal = (PACKED, INTEGERS, _NAIVE, MIXED)
        for key, choices in (("format", legal), ("quantization_status", _STATUSES)):
            if (value := quantization.get(key)) not in choices:
                raise self._illegal(key, value, ", ".join(repr(each) for each in choices if each is not None))
        for key in ("sparsity_config", "transform_config", "moe_sparsity_config"):
            value = quantization.get(key)
            dense = key == "sparsity_config" and isinstance(value, dict) and value.get("format") == "dense"
            if value and not dense and value != {"config_groups": {}}:
                raise self._illegal(key, value, "none: the weights as they are")
        if quantization.get("kv_cache_scheme") is not None:
            logger.warning("%s: kv_cache_scheme is not used: the KV cache is not quantized", self._file)

    def _storage(self, key: str, group: Any, quantization: Mapping[str, Any]) -> Storage:
        if not isinstance(group, dict):
            raise self._illegal(key, group, "an object with targets and weights")
        self._known(key, group, _GROUP_KEYS)
        if group.get("output_activations") is not None:
            raise self._illegal(f"{key}.output_activations", group["output_activations"], "null")
        weights, inputs = f"{key}.weights", group.get("input_activations")
        if inputs is not None and not (isinstance(inputs, dict) and inputs):
            raise self._illegal(
                f"{key}.input_activations", inputs, "null, or an object with num_bits, type, strategy ..."
            )
        found = self._arguments(weights, group.get("weights"))
        for name, choices in (
            ("type", ("int",)),
            ("num_bits", (4, 8) if inputs is None else (8,)),
            ("strategy", ("group", "channel", "tensor") if inputs is None else ("channel", "tensor")),
            ("symmetric", (True, False) if inputs is None else (True,)),
            ("dynamic", (False,)),
            ("actorder", _ACTORDER),
            ("block_structure", (None,)),
        ):
            self._check(weights, found, name, choices)
        size = found["group_size"] if found["strategy"] == "group" else None
        if found["strategy"] != "group":
            self._check(weights, found, "group_size", (None, -1))
        elif not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise self._illegal(f"{weights}.group_size", size, "a number of columns")
        if inputs is not None:
            activations = self._arguments(f"{key}.input_activations", inputs)
            for name, value in _TOKENS.items():
                self._check(f"{key}.input_activations", activations, name, (value,))
        kind = "w8a8" if inputs is not None else "int4" if found["num_bits"] == 4 else "int8"
        packed = self._format(key, group, quantization, inputs is None) == PACKED
        return Storage(kind, found["num_bits"], found["symmetric"], found["strategy"], size, packed, key)

    def _format(self, key: str, group: Mapping[str, Any], quantization: Mapping[str, Any], weight_only: bool) -> str:
        """The group's own format, else the file's; where that is mixed, the one compressed-tensors would write."""
        found = group.get("format") or quantization["format"]
        if group.get("format") is not None and found not in (PACKED, INTEGERS, _NAIVE):
            raise self._illegal(f"{key}.format", found, ", ".join(map(repr, (PACKED, INTEGERS, _NAIVE))))
        inferred = PACKED if weight_only else INTEGERS
        return inferred if found == MIXED else str(found)

    def _arguments(self, key: str, given: Any) -> dict[str, Any]:
        """Arguments of weights or activations, defaults filled in."""
        if not isinstance(given, dict):
            raise self._illegal(key, given, "an object with num_bits, type, strategy ...")
        self._known(key, given, _ARGUMENTS)
        found = _ARGUMENTS | given
        for name in ("type", "strategy"):
            found[name] = found[name].lower() if isinstance(found[name], str) else found[name]
        if found["strategy"] is None:
            size = found["group_size"]
            found["strategy"] = "tensor" if size is None else "channel" if size == -1 else "group"
        return found

    def _fitting(self, storage: Storage, layer: str, columns: int) -> Storage:
        """The storage of a layer with this number of columns."""
        size = storage.group_size
        if size is None:
            return storage
        if size == columns:
            return storage._replace(strategy="channel", group_size=None)
        if columns % size or (size not in GROUPS and size % LARGEST_GROUP):
            sizes = ", ".join(map(str, GROUPS))
            legal = f"{sizes} or a multiple of {LARGEST_GROUP} that divides the {columns} columns of {layer}, or all"
            raise self._illegal(f"{storage.group}.weights.group_size", size, legal)
        return storage

    def _match(
        self, name: str, classes: Iterable[str], targets: Mapping[str, Storage], ignored: Iterable[str]
    ) -> str | None:
        """The target that applies to a layer: an equal name, then a pattern, then a class, each in alphabetical order.

        None where the layer is ignored, or no target matches.
        """
        if any(self._matches(name, each) or each in classes for each in ignored):
            return None
        ordered = sorted(targets, key=lambda target: ("re:" in target, target))
        named = [target for target in ordered if self._matches(name, target)]
        return next(iter([*named, *(target for target in ordered if target in classes)]), None)

    def _matches(self, name: str, target: str) -> bool:
        if not target.startswith("re:"):
            return target == name
        return re.match(target.removeprefix("re:"), name) is not None

    def _names(self, key: str, given: Any) -> list[str]:
        if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
            raise self._illegal(key, given, "a list of names")
        for target in given:
            if target.startswith("re:"):
                self._check_pattern(key, target)
        return given

    def _check_pattern(self, key: str, target: str) -> None:
        """Refuse invalid patterns, and those that might take years to match: matching backtracks."""
        pattern = target.removeprefix("re:")
        quantifiers, groups = len(re.findall(r"[*+{]|(?<!\()\?", pattern)), pattern.count("(")
        if re.search(r"\)(\s|#.*\n)*[*+{]", pattern) or max(quantifiers, groups) > _LARGEST_PATTERN:
            few = f"at most {_LARGEST_PATTERN} of * + ? {{ and {_LARGEST_PATTERN} groups"
            raise self._illegal(key, target, f"a pattern in which no group is repeated, with {few}")
        try:
            re.compile(pattern)
        except (re.error, OverflowError) as error:
            raise self._illegal(key, target, f"a regular expression ({error})") from None

    def _known(self, key: str, given: Mapping[str, Any], legal: Iterable[str]) -> None:
        for name in given:
            if name not in legal:
                raise self._illegal(f"{key}.{name}", given[name], f"the keys {', '.join(sorted(legal))}")

    def _check(self, key: str, given: Mapping[str, Any], name: str, legal: Iterable[Any]) -> None:
        value, legal = given[name], tuple(legal)
        if not any(type(value) is type(each) and value == each for each in legal):
            raise self._illegal(f"{key}.{name}", value, " or ".join(map(json.dumps, legal)))

    def _illegal(self, key: str, value: Any, legal: str) -> CheckpointError:
        return CheckpointError(f"{self._file}: quantization_config: {key} is {brief(value)}; legal: {legal}")
