"""Reads adapter_config.json of a PEFT LoRA adapter: target modules, rank and scale."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastllama.errors import CheckpointError
from fastllama.io.formats.json_files import json_kind, read_json

ADAPTER_CONFIG = "adapter_config.json"
_DEFAULT = 8  # peft's, of r and of lora_alpha
# Settings that change more than W + scale * B A; refused where they are set.
_REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "a bias of its own",
    "layer_replication": "repeated layers",
    "target_parameters": "parameters without a module",
    "trainable_token_indices": "single trained tokens",
    "alora_invocation_tokens": "activated LoRA, which follows the text",
    "arrow_config": "Arrow's routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron's layers",
}
# Initializations that also change the base's weights; peft can convert them (path_initial_model_for_weight_...).
_INITS_OF_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class LoraSettings:
    """The settings of one adapter. Raises CheckpointError, naming the key, for anything but plain LoRA."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / ADAPTER_CONFIG
        self._raw = read_json(self.file)
        kind = self._raw.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(f"{self.file}: peft_type is {_shown(kind)}; legal: 'LORA'")
        for key, meaning in _REFUSED.items():
            if value := self._raw.get(key):
                raise CheckpointError(f"{self.file}: {key} is {_shown(value)} ({meaning}), which cannot be merged here")
        init = self._raw.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_INITS_OF_THE_BASE):
            raise CheckpointError(
                f"{self.file}: init_lora_weights is {init!r}, which also changed the base; convert it to plain LoRA "
                "(peft: save_pretrained with path_initial_model_for_weight_conversion)"
            )
        self._rank, self._alpha = self._number("r", whole=True), self._number("lora_alpha")
        self._layers = self._layer_numbers()
        self._layer_patterns = self._names("layers_pattern") or r"[^.]*"
        self._ranks, self._alphas = self._pattern("rank_pattern"), self._pattern("alpha_pattern")
        self._targets = self._names("target_modules")
        self._excluded = self._names("exclude_modules") or []
        saved = self._names("modules_to_save") or []
        self.saved_modules = [saved] if isinstance(saved, str) else saved
        """Suffixes of the names of modules that are replaced whole."""
        self.ensures_tie = bool(self._raw.get("ensure_weight_tying"))

    @property
    def base(self) -> tuple[str, str | None]:
        """The adapter's base model, a path or a Hub id, and the revision of the latter."""
        name, revision = self._raw.get("base_model_name_or_path"), self._raw.get("revision")
        if not isinstance(name, str) or not name:
            raise CheckpointError(f"{self.file}: base_model_name_or_path is {_shown(name)}; give the base as model")
        return name, revision if isinstance(revision, str) and revision else None

    @property
    def names_targets(self) -> bool:
        """Whether target_modules names modules, and is not "all-linear"."""
        return self._targets is not None and self._targets != "all-linear"

    def rank(self, module: str) -> int:
        """Columns of B and rows of A for a module: the first pattern that its name ends with, else `r`."""
        return int(self._of(module, self._ranks, self._rank))

    def scale(self, module: str) -> float:
        """The factor of B A: alpha / rank, or alpha / sqrt(rank) with use_rslora (arXiv:2312.03732)."""
        alpha, rank = self._of(module, self._alphas, self._alpha), self.rank(module)
        return alpha / (math.sqrt(rank) if self._raw.get("use_rslora") else rank)

    def targets(self, modules: Iterable[str]) -> list[str]:
        """The modules that target_modules selects, by peft's rules; none where it is absent."""
        if not self.names_targets:
            return []
        return [module for module in modules if self._is_target(module)]

    def _is_target(self, module: str) -> bool:
        if self._matches(self._excluded, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved_modules):
            return False
        assert self._targets is not None
        return self._matches(self._targets, module) and (isinstance(self._targets, str) or self._is_in_layers(module))

    def _is_in_layers(self, module: str) -> bool:
        if not self._layers:
            return True
        patterns = self._layer_patterns
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
                return int(found[1]) in self._layers
        return False

    @staticmethod
    def _matches(names: str | list[str], module: str) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    @staticmethod
    def _of(module: str, patterns: dict[str, float], default: float) -> float:
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)

    def _number(self, key: str, *, whole: bool = False) -> float:
        value = self._raw.get(key, _DEFAULT)
        number = not isinstance(value, bool) and isinstance(value, int if whole else (int, float))
        if not number or not math.isfinite(value) or (whole and value < 1):
            legal = "an integer of at least 1" if whole else "a number"
            raise CheckpointError(f"{self.file}: {key} is {_shown(value)}; legal: {legal}")
        return value

    def _pattern(self, key: str) -> dict[str, float]:
        value = self._raw.get(key) or {}
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.file}: {key} is {_shown(value)}; legal: numbers by module name")
        least = 1 if key == "rank_pattern" else -math.inf
        for name, number in value.items():
            if type(number) not in (int, float) or not math.isfinite(number) or number < least:
                legal = "a number" if key == "alpha_pattern" else "a number of at least 1"
                raise CheckpointError(f"{self.file}: {key} of {name!r} is {_shown(number)}; legal: {legal}")
        self._check_expressions(key, value)
        return value

    def _layer_numbers(self) -> list[int]:
        value = self._raw.get("layers_to_transform")
        numbers = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(number) is not int for number in numbers):
            raise CheckpointError(
                f"{self.file}: layers_to_transform is {_shown(value)}; legal: a layer's number, or several"
            )
        return numbers

    def _names(self, key: str) -> str | list[str] | None:
        value = self._raw.get(key)
        if value is None or isinstance(value, str):
            self._check_expressions(key, [value or ""])
        elif not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise CheckpointError(f"{self.file}: {key} is {_shown(value)}; legal: a list of module names, or a pattern")
        return value

    def _check_expressions(self, key: str, expressions: Iterable[str]) -> None:
        for expression in expressions:
            try:
                re.compile(expression)
            except re.error:
                raise CheckpointError(f"{self.file}: {key} is {expression!r}; legal: a regular expression") from None


def _shown(value: Any) -> str:
    """A JSON value for a message: strings and numbers literally, other values by their type."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, (str, int, float)) else json_kind(value)
