"""What a Llama is made of: sizes, rotary settings and special tokens, read from every spelling a checkpoint may use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastllama.errors import check_choice, check_range

DTYPES = ("bfloat16", "float16", "float32")
ROPE_KINDS = ("linear", "dynamic", "llama3")

# Meta's params.json of Llama 1, 2, Code Llama and 3; the last three steer Meta's own runtime, not the model's shape.
_META_KEYS = {"dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "vocab_size"}
_META_KEYS |= {"rope_theta", "use_scaled_rope", "max_seq_len", "max_batch_size"}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    linear: position interpolation (Chen et al. 2023, arXiv 2306.15595); dynamic: NTK-aware base change with the length;
    llama3: Llama 3.1's split by wavelength, which alone uses the last three fields.
    """

    kind: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        check_choice("rope scaling kind", self.kind, ROPE_KINDS)
        _check_positive("rope scaling factor", self.factor)
        if self.original_max_position_embeddings is not None:
            _check_size("rope scaling original_max_position_embeddings", self.original_max_position_embeddings)
        elif self.kind == "llama3":
            raise ValueError("rope scaling original_max_position_embeddings is None; legal for llama3: at least 1")
        _check_positive("rope scaling low_freq_factor", self.low_freq_factor)
        _check_positive("rope scaling high_freq_factor", self.high_freq_factor)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope scaling high_freq_factor is {self.high_freq_factor}; legal: above low_freq_factor="
                f"{self.low_freq_factor}"
            )


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama model, in Hugging Face's names. Raises ValueError or TypeError where it cannot be one."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int = 1
    eos_token_ids: tuple[int, ...] = (2,)
    dtype: str | None = None  # the checkpoint's own, None when it does not say

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            _check_size(name, getattr(self, name))
        for name in ("num_key_value_heads", "head_dim", "max_position_embeddings"):
            _check_size(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}; legal: a divisor of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; legal: an even number, rotary embedding turns pairs")
        _check_positive("rms_norm_eps", self.rms_norm_eps)
        _check_positive("rope_theta", self.rope_theta)
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; legal: true or false")
        if not isinstance(self.eos_token_ids, tuple):
            raise TypeError(f"eos_token_ids is {self.eos_token_ids!r}; legal: a tuple of token ids")
        for name, token in (("bos_token_id", self.bos_token_id), *(("eos_token_ids", t) for t in self.eos_token_ids)):
            _check_integer(name, token)
            check_range(name, token, 0, self.vocab_size - 1)
        check_choice("dtype", self.dtype, (*DTYPES, None))

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_key_value_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query, key and value projection."""
        return self.q_size + 2 * self.kv_size

    @property
    def num_queries_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @classmethod
    def preset(cls, name: str) -> LlamaConfig:
        """A published shape by name, such as "llama-2-7b"; ValueError lists the names."""
        check_choice("preset", name, PRESETS)
        return PRESETS[name]

    @classmethod
    def from_hf(cls, d: Mapping[str, Any]) -> LlamaConfig:
        """From a Hugging Face config.json, as transformers 4 or 5 writes it. Raises ValueError if it is no Llama."""
        _refuse_foreign(d)
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if missing := [name for name in required if d.get(name) is None]:
            raise ValueError(f"the configuration lacks {', '.join(missing)}")
        for name in required:
            _check_size(name, d[name])
        heads, head_dim = d["num_attention_heads"], d.get("head_dim")
        if head_dim is None:
            if d["hidden_size"] % heads:
                raise ValueError(f"hidden_size is {d['hidden_size']}; legal: a multiple of num_attention_heads={heads}")
            head_dim = d["hidden_size"] // heads
        max_positions = _get(d, "max_position_embeddings", 2048)
        theta, scaling = _rope_from_hf(d, max_positions)
        eos = d.get("eos_token_id", 2)
        return cls(
            **{name: d[name] for name in required},
            num_key_value_heads=_get(d, "num_key_value_heads", heads),
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=_get(d, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=_get(d, "tie_word_embeddings", False),
            attention_bias=_get(d, "attention_bias", False),
            mlp_bias=_get(d, "mlp_bias", False),
            bos_token_id=_get(d, "bos_token_id", 1),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            dtype=_dtype_from_hf(d),
        )

    @classmethod
    def from_meta(cls, params: Mapping[str, Any], *, vocab_size: int) -> LlamaConfig:
        """From Meta's params.json; `vocab_size` counts the rows of the embedding, as the file often says -1.

        The file does not hold the context length: it is 16384 where rope_theta was raised to 1e6 (Code Llama), else
        8192 where it was raised at all (Llama 3), else 4096 (Llama 2).
        """
        if unknown := sorted(set(params) - _META_KEYS):
            raise ValueError(f"params.json has {unknown[0]!r}, which no Llama of Meta's has")
        if missing := [name for name in ("dim", "n_layers", "n_heads") if params.get(name) is None]:
            raise ValueError(f"params.json lacks {', '.join(missing)}")
        if params.get("use_scaled_rope"):
            raise ValueError("params.json sets use_scaled_rope without its factor; use its Hugging Face files")
        declared = _get(params, "vocab_size", -1)
        if declared not in (-1, vocab_size):
            raise ValueError(f"params.json says vocab_size={declared}, but the embedding has {vocab_size} rows")
        dim, heads, layers = params["dim"], params["n_heads"], params["n_layers"]
        multiple = _get(params, "multiple_of", 256)
        for name, value in (("dim", dim), ("n_layers", layers), ("n_heads", heads), ("multiple_of", multiple)):
            _check_size(name, value)
        if dim % heads:
            raise ValueError(f"dim is {dim}; legal: a multiple of n_heads={heads}")
        multiplier = _get(params, "ffn_dim_multiplier", 1.0)
        _check_positive("ffn_dim_multiplier", multiplier)
        theta = _get(params, "rope_theta", 10000.0)
        _check_positive("rope_theta", theta)
        # Two thirds of 4 * dim keep SwiGLU's three matrices at the parameters of two (Shazeer 2020, arXiv 2002.05202).
        inner = int(multiplier * (8 * dim // 3))
        return cls(
            vocab_size=vocab_size,
            hidden_size=dim,
            intermediate_size=-(-inner // multiple) * multiple,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=_get(params, "n_kv_heads", heads),
            head_dim=dim // heads,
            max_position_embeddings=16384 if theta >= 1e6 else 8192 if theta > 1e4 else 4096,
            rms_norm_eps=_get(params, "norm_eps", 1e-5),
            rope_theta=theta,
        )

    def to_hf(self) -> dict[str, Any]:
        """The contents of a config.json. Rope and dtype in the older spelling, which transformers 4 and 5 both read."""
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"} | asdict(self)
        eos = list(config.pop("eos_token_ids"))
        config["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
        config["rope_scaling"] = None if self.rope_scaling is None else _rope_to_hf(self.rope_scaling)
        config["torch_dtype"] = config.pop("dtype")
        return config


def _refuse_foreign(d: Mapping[str, Any]) -> None:
    kind, names = d.get("model_type"), _get(d, "architectures", [])
    if kind != "llama" and not (kind is None and "LlamaForCausalLM" in names):
        raise ValueError(f"the model is of type {kind!r} (architectures {names}); legal: model_type 'llama'")
    if (activation := _get(d, "hidden_act", "silu")) not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {activation!r}; legal: 'silu'")


def _rope_from_hf(d: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):  # transformers 4 and 5
        part = _get(d, name, {})
        if not isinstance(part, Mapping):
            raise TypeError(f"{name} is {part!r}; legal: an object with rope_type and its settings")
        rope |= part
    theta = _get(rope, "rope_theta", _get(d, "rope_theta", 10000.0))
    if (partial := _get(rope, "partial_rotary_factor", _get(d, "partial_rotary_factor", 1.0))) != 1.0:
        raise ValueError(f"partial_rotary_factor is {partial!r}; legal: 1, as a Llama rotates whole heads")
    kind = _get(rope, "rope_type", _get(rope, "type", "default"))
    check_choice("rope_type", kind, ("default", *ROPE_KINDS))
    if kind == "default":
        return theta, None
    if rope.get("factor") is None:
        raise ValueError(f"rope scaling of type {kind!r} lacks its factor")
    if kind != "llama3":
        return theta, RopeScaling(kind, rope["factor"])
    original = _get(rope, "original_max_position_embeddings", max_positions)
    return theta, RopeScaling(
        kind, rope["factor"], original, _get(rope, "low_freq_factor", 1.0), _get(rope, "high_freq_factor", 4.0)
    )


def _rope_to_hf(rope: RopeScaling) -> dict[str, Any]:
    known = {"rope_type": rope.kind, "factor": float(rope.factor)}
    if rope.kind != "llama3":
        return known
    known["original_max_position_embeddings"] = rope.original_max_position_embeddings
    return known | {"low_freq_factor": float(rope.low_freq_factor), "high_freq_factor": float(rope.high_freq_factor)}


def _dtype_from_hf(d: Mapping[str, Any]) -> str | None:
    name = _get(d, "dtype", d.get("torch_dtype"))
    if name is None or name == "auto":
        return None
    check_choice("dtype", name, DTYPES)
    return str(name)


def _get(d: Mapping[str, Any], name: str, default: Any) -> Any:
    """`d[name]`, where JSON's null counts as absent."""
    value = d.get(name)
    return default if value is None else value


def _check_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; legal: an integer")


def _check_size(name: str, value: Any) -> None:
    _check_integer(name, value)
    check_range(name, value, 1)


def _check_positive(name: str, value: Any) -> None:
    check_range(name, value, 0)
    if value == 0 or math.isinf(value):
        raise ValueError(f"{name} is {value!r}; legal: a positive number")


def _llama(
    layers: int, hidden: int, inner: int, heads: int, kv_heads: int, *, vocab_size: int = 32000, **other: Any
) -> LlamaConfig:
    return LlamaConfig(vocab_size, hidden, inner, layers, heads, kv_heads, hidden // heads, **other)


# arXiv 2307.09288 (Llama 2), 2308.12950 (Code Llama: 7B and 13B add 16 tokens for infilling), 2401.02385 (TinyLlama).
_CODE: dict[str, Any] = {"rope_theta": 1e6, "max_position_embeddings": 16384}
PRESETS: dict[str, LlamaConfig] = {
    "llama-2-7b": _llama(32, 4096, 11008, 32, 32),
    "llama-2-13b": _llama(40, 5120, 13824, 40, 40),
    "llama-2-70b": _llama(80, 8192, 28672, 64, 8),
    "codellama-7b": _llama(32, 4096, 11008, 32, 32, vocab_size=32016, **_CODE),
    "codellama-13b": _llama(40, 5120, 13824, 40, 40, vocab_size=32016, **_CODE),
    "codellama-34b": _llama(48, 8192, 22016, 64, 8, **_CODE),
    "tinyllama-1.1b": _llama(22, 2048, 5632, 32, 4, max_position_embeddings=2048),
}
