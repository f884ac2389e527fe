"""Settings of scaled rotary frequencies, and their formats in a config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastllama.errors import check_choice
from fastllama.layers.fields import check_flag, check_object, check_positive, check_size, field, first_of, logger

_ORIGINAL = "original_max_position_embeddings"
# The settings of each kind. Other keys are logged as unused; "finetuned" occurs in Yarn-Llama-2's files.
_SETTINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor", _ORIGINAL),
    "dynamic": ("factor",),
    "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", _ORIGINAL, "beta_fast", "beta_slow", "attention_factor", "truncate"),
}
_BESIDE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_OF_YARN = {"mscale", "mscale_all_dim", "finetuned"}
ROPE_KINDS = tuple(kind for kind in _SETTINGS if kind != "default")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context of original_max_position_embeddings.

    linear: position interpolation (Chen et al. 2023, arXiv 2306.15595); dynamic: NTK-aware base change with the length;
    llama3: Llama 3.1's split by wavelength, with low_freq_factor and high_freq_factor; yarn: a ramp between dimensions
    that turn beta_slow and beta_fast times (Peng et al. 2023, arXiv 2309.00071), its bounds whole where `truncate`,
    with cosines and sines times attention_factor, None for the paper's. llama3 and yarn need the trained context;
    linear uses it for `LlamaConfig.context_length` alone, and dynamic always takes max_position_embeddings.
    """

    kind: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ROPE_KINDS)
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            check_positive(name, getattr(self, name))
        if self.attention_factor is not None:
            check_positive("attention_factor", self.attention_factor)
        check_flag("truncate", self.truncate)
        original = self.original_max_position_embeddings
        if original is not None:
            check_size(_ORIGINAL, original)
        elif self.kind in ("llama3", "yarn"):
            raise ValueError(f"{_ORIGINAL} is None; legal for {self.kind}: at least 1")
        if self.kind == "dynamic" and original is not None:
            raise ValueError(f"{_ORIGINAL} is {original}; legal for dynamic: None, it takes max_position_embeddings")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor is {self.high_freq_factor}; legal: above low_freq_factor={self.low_freq_factor}"
            )
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast is {self.beta_fast}; legal: at least beta_slow={self.beta_slow}")


def rope_from_hf(d: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """rope_theta and the scaling, as transformers 5 reads the same config.json.

    rope_scaling (transformers 4), unless it is empty, replaces all of rope_parameters (transformers 5). In either,
    rope_type takes precedence over type, and rope_theta and partial_rotary_factor over those at the root; the root's
    original_max_position_embeddings takes precedence. Different values that are unused for this reason are logged.
    Raises ValueError or TypeError that names the key, also for settings that transformers ignores but no Llama of
    Meta's has: a partial rotation, or settings for each type of layer.
    """
    parts = {name: d.get(name) or {} for name in ("rope_scaling", "rope_parameters")}  # false, 0, "" and [] are none
    for name, part in parts.items():
        check_object(name, part)
    at, rope = first_of({name: part or None for name, part in parts.items()}, {})
    for name, value in rope.items():
        if isinstance(value, Mapping):
            raise ValueError(f"{at}.{name} is {value!r}; legal: one rope for all layers, not nested")

    kind_at, kind = first_of({f"{at}.{name}": rope.get(name) for name in ("rope_type", "type")}, "default")
    check_choice(kind_at, kind, _SETTINGS)
    theta_at, theta = first_of({f"{at}.rope_theta": rope.get("rope_theta"), "rope_theta": d.get("rope_theta")}, 10000.0)
    check_positive(theta_at, theta)
    name = "partial_rotary_factor"
    partial_at, partial = first_of({f"{at}.{name}": rope.get(name), name: d.get(name)}, 1.0)
    if isinstance(partial, bool) or partial != 1.0:
        raise ValueError(f"{partial_at} is {partial!r}; legal: 1, as a Llama rotates whole heads")

    read = {*_SETTINGS[kind], *_BESIDE, *(_OF_YARN if kind == "yarn" else ())}
    unread = [f"{at}.{name}" for name, value in rope.items() if value is not None and name not in read]
    if _ORIGINAL not in read and d.get(_ORIGINAL) is not None:
        unread.append(_ORIGINAL)
    for name in unread:
        logger.warning("%s is not used, as rope_type is %r", name, kind)
    return theta, None if kind == "default" else _scaling_from_hf(d, rope, at, kind, max_positions)


def rope_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    """The rope_scaling of a config.json: all settings of its kind, in the format that transformers 4 and 5 read."""
    settings = {name: getattr(scaling, name) for name in _SETTINGS[scaling.kind]}
    for name in settings.keys() - {_ORIGINAL, "truncate"}:  # transformers warns about integer factors
        settings[name] = None if settings[name] is None else float(settings[name])
    return {"rope_type": scaling.kind} | {name: value for name, value in settings.items() if value is not None}


def _scaling_from_hf(
    d: Mapping[str, Any], rope: Mapping[str, Any], at: str, kind: str, max_positions: int
) -> RopeScaling:
    settings = {name: rope[name] for name in _SETTINGS[kind] if rope.get(name) is not None}
    if _ORIGINAL in _SETTINGS[kind]:
        trained = None if kind == "linear" else max_positions
        name, original = first_of({_ORIGINAL: d.get(_ORIGINAL), f"{at}.{_ORIGINAL}": rope.get(_ORIGINAL)}, trained)
        if isinstance(original, float) and original.is_integer():
            original = int(original)
        if original is not None:
            check_size(name, original)
            settings[_ORIGINAL] = original
    if kind == "yarn":
        settings = _yarn_from_hf(rope, at, max_positions, settings)
    if "factor" not in settings:
        raise ValueError(f"{at} lacks factor, which rope_type {kind!r} needs")
    try:
        return RopeScaling(kind, **settings)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{at}.{error}") from None


def _yarn_from_hf(rope: Mapping[str, Any], at: str, max_positions: int, given: dict[str, Any]) -> dict[str, Any]:
    """The settings, completed as in transformers, which derives some from others and treats null and 0 as missing."""
    settings = {name: value for name, value in given.items() if not (name.startswith("beta") and _is_zero(value))}
    settings.setdefault("factor", max_positions / settings[_ORIGINAL])
    settings.setdefault("truncate", "truncate" not in rope)
    scales = {name: rope[name] for name in ("mscale", "mscale_all_dim") if not _is_zero(field(rope, name, 0))}
    for name, value in (scales | {"factor": settings["factor"]}).items():
        check_positive(f"{at}.{name}", value)
    if len(scales) == 2 and "attention_factor" not in settings:
        above, below = (yarn_attention_factor(settings["factor"], scale) for scale in scales.values())
        settings["attention_factor"] = above / below
    return settings


def _is_zero(value: Any) -> bool:
    return value == 0 and not isinstance(value, bool)


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """The factor of cosines and sines, section 3.4 of the paper, which preserves the entropy of longer attention."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
