"""The configuration of a Llama: sizes, rotary settings and special tokens, in every format that checkpoints use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastllama.errors import check_choice, check_range, shown
from fastllama.layers.fields import check_flag, check_integer, check_positive, check_size, field, first_of, logger
from fastllama.layers.rope_scaling import ROPE_KINDS, RopeScaling, rope_from_hf, rope_to_hf

__all__ = ["DTYPES", "PRESETS", "ROPE_KINDS", "LlamaConfig", "RopeScaling", "token_ids"]

_DTYPE_ALIASES = {"half": "float16", "float": "float32"}  # torch's, which transformers reads too
# Of other architectures' attention: transformers' Llama ignores them, but the first two truncate its cache.
_NOT_USED = ("sliding_window", "attention_chunk_size", "layer_types")
DTYPES = ("bfloat16", "float16", "float32")

# Meta's params.json of Llama 1, 2, Code Llama and 3; max_seq_len and max_batch_size steer Meta's own runtime.
_META_KEYS = {"dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "vocab_size"}
_META_KEYS |= {"rope_theta", "use_scaled_rope", "max_seq_len", "max_batch_size"}
# Keys of other models in this layout, or of other weights: with them the model would compute something else.
_NOT_META: tuple[str, ...] = ("quantization_args", "lora_args", "moe", "moe_args", "sliding_window", "head_dim")
_NOT_META += ("hidden_dim", "vision_num_cross_attention_layers", "vision_args", "rope_scaling_factor")
# Constants of Meta's reference implementation of Llama 3.1. (Hugging Face's Llama 3.2 1B and 3B have a factor of 32.)
_LLAMA3_SCALING = RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
# <|begin_of_text|>; <|end_of_text|>, <|eom_id|>, <|eot_id|>: in Meta's tokenizer of Llama 3, not in params.json.
_LLAMA3_VOCABULARY, _LLAMA3_BOS, _LLAMA3_EOS = 128256, 128000, (128001, 128008, 128009)


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama model, in Hugging Face's names. Raises ValueError or TypeError for an illegal one."""

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
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    dtype: str | None = None  # of the checkpoint; None if not specified

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            check_size(name, getattr(self, name))
        for name in ("num_key_value_heads", "head_dim", "max_position_embeddings"):
            check_size(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}; legal: a divisor of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; legal: an even number, rotary embedding rotates pairs")
        check_positive("rms_norm_eps", self.rms_norm_eps)
        check_positive("rope_theta", self.rope_theta)
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            check_flag(name, getattr(self, name))
        if not isinstance(self.eos_token_ids, tuple):
            raise TypeError(f"eos_token_ids is {self.eos_token_ids!r}; legal: a tuple of token ids")
        bos = () if self.bos_token_id is None else (("bos_token_id", self.bos_token_id),)
        for name, token in (*bos, *(("eos_token_ids", token) for token in self.eos_token_ids)):
            check_integer(name, token)
            check_range(name, token, 0, self.vocab_size - 1)
        check_choice("dtype", self.dtype, (*DTYPES, None))
        if self.rope_scaling is not None:
            self._check_scaling(self.rope_scaling)

    def _check_scaling(self, scaling: RopeScaling) -> None:
        """Check the divisors of the formulas: the logarithm of the base, and head_dim - 2."""
        if scaling.kind == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"rope_theta is {self.rope_theta}; legal with yarn: above 1")
        if scaling.kind == "dynamic" and self.head_dim == 2:
            raise ValueError("head_dim is 2; legal with dynamic rope scaling: at least 4")
        check_size("max_position_embeddings times rope_scaling.factor", self.context_length)

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
    def num_parameters(self) -> int:
        """Elements of all matrices, a tied one once; norms and biases, which are few, are not counted."""
        attention = (self.qkv_size + self.q_size) * self.hidden_size
        layer = attention + 3 * self.intermediate_size * self.hidden_size
        tables = 1 if self.tie_word_embeddings else 2
        return self.num_hidden_layers * layer + tables * self.vocab_size * self.hidden_size

    @property
    def num_queries_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def context_length(self) -> int:
        """The default limit of tokens, prompt and output together.

        Linear and YaRN scaling multiply original_max_position_embeddings, or max_position_embeddings if that is not
        specified, by their factor, as in vLLM; a larger max_position_embeddings includes the factor already. Dynamic
        scaling is for longer prompts, so it does not change the default.
        """
        scaling = self.rope_scaling
        if scaling is None or scaling.kind not in ("linear", "yarn"):
            return self.max_position_embeddings
        trained = scaling.original_max_position_embeddings or self.max_position_embeddings
        return max(self.max_position_embeddings, int(trained * scaling.factor))

    @property
    def longest_context(self) -> int | None:
        """The largest legal max_model_len; None for dynamic rope scaling, which has no limit."""
        dynamic = self.rope_scaling is not None and self.rope_scaling.kind == "dynamic"
        return None if dynamic else self.context_length

    @classmethod
    def preset(cls, name: str) -> LlamaConfig:
        """A published shape by name, such as "llama-2-7b"; ValueError lists the names."""
        check_choice("preset", name, PRESETS)
        return PRESETS[name]

    @classmethod
    def from_hf(cls, d: Mapping[str, Any]) -> LlamaConfig:
        """From a Hugging Face config.json, as transformers 4 or 5 writes it. Raises ValueError if it is not a Llama."""
        _refuse_foreign(d)
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if missing := [name for name in required if d.get(name) is None]:
            raise ValueError(f"the configuration lacks {', '.join(missing)}")
        for name in required:
            check_size(name, d[name])
        heads, head_dim = d["num_attention_heads"], d.get("head_dim")
        if head_dim is None:
            if d["hidden_size"] % heads:
                raise ValueError(f"hidden_size is {d['hidden_size']}; legal: a multiple of num_attention_heads={heads}")
            head_dim = d["hidden_size"] // heads
        max_positions = field(d, "max_position_embeddings", 2048)
        check_size("max_position_embeddings", max_positions)
        theta, scaling = rope_from_hf(d, max_positions)
        for name in _NOT_USED:
            if d.get(name) and set(d[name] if isinstance(d[name], list) else [d[name]]) != {"full_attention"}:
                logger.warning("%s is %s, and not used: attention is over all tokens", name, shown(repr(d[name])))
        bos = token_ids("bos_token_id", d.get("bos_token_id", 1), d["vocab_size"])
        return cls(
            **{name: d[name] for name in required},
            num_key_value_heads=field(d, "num_key_value_heads", heads),
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=field(d, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=field(d, "tie_word_embeddings", False),
            attention_bias=field(d, "attention_bias", False),
            mlp_bias=field(d, "mlp_bias", False),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=token_ids("eos_token_id", d.get("eos_token_id", 2), d["vocab_size"]),
            dtype=_dtype_from_hf(d),
        )

    @classmethod
    def from_meta(cls, params: Mapping[str, Any], *, vocab_size: int) -> LlamaConfig:
        """From Meta's params.json; `vocab_size` counts the rows of the embedding, as the file often has -1.

        The file does not contain the context length: it is 131072 where use_scaled_rope is set (Llama 3.1), else 16384
        where rope_theta was raised to 1e6 (Code Llama), else 8192 where it was raised at all (Llama 3), else 2048 where
        norm_eps is 1e-6 (Llama 1, by llama.cpp's rule), else 4096 (Llama 2). The ids of special tokens are Llama 3's
        for Llama 3's vocabulary size. Unknown keys are logged and ignored, as by Meta.
        """
        if refused := [name for name in _NOT_META if params.get(name)]:
            raise ValueError(f"{refused[0]} is {params[refused[0]]!r}; legal: none, no plain Llama of Meta's has it")
        if unknown := sorted(params.keys() - _META_KEYS - {*_NOT_META}):
            logger.warning("params.json: %s is not used, no Llama of Meta's has such a key", ", ".join(unknown))
        if missing := [name for name in ("dim", "n_layers", "n_heads") if params.get(name) is None]:
            raise ValueError(f"params.json lacks {', '.join(missing)}")
        declared = field(params, "vocab_size", -1)
        check_integer("vocab_size", declared)
        if declared not in (-1, vocab_size):
            rows = f"tensor tok_embeddings.weight has {vocab_size} rows"
            raise ValueError(f"vocab_size is {declared}, but {rows}; are all files there?")
        scaled = field(params, "use_scaled_rope", False)
        check_flag("use_scaled_rope", scaled)
        dim, heads, layers = params["dim"], params["n_heads"], params["n_layers"]
        kv_heads, multiple = field(params, "n_kv_heads", heads), field(params, "multiple_of", 256)
        for name, value in (("dim", dim), ("n_layers", layers), ("n_heads", heads), ("n_kv_heads", kv_heads)):
            check_size(name, value)
        check_size("multiple_of", multiple)
        if dim % heads:
            raise ValueError(f"dim is {dim}; legal: a multiple of n_heads={heads}")
        if heads % kv_heads:
            raise ValueError(f"n_kv_heads is {kv_heads}; legal: a divisor of n_heads={heads}")
        multiplier = field(params, "ffn_dim_multiplier", 1.0)
        check_positive("ffn_dim_multiplier", multiplier)
        theta, eps = field(params, "rope_theta", 10000.0), field(params, "norm_eps", 1e-5)
        check_positive("rope_theta", theta)
        llama3 = vocab_size == _LLAMA3_VOCABULARY
        trained = 16384 if theta >= 1e6 else 8192 if theta > 1e4 else 2048 if eps == 1e-6 else 4096
        # Two thirds of 4 * dim: SwiGLU's three matrices have the parameters of two (Shazeer 2020, arXiv 2002.05202).
        inner = int(multiplier * (8 * dim // 3))
        return cls(
            vocab_size=vocab_size,
            hidden_size=dim,
            intermediate_size=-(-inner // multiple) * multiple,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=dim // heads,
            max_position_embeddings=131072 if scaled else trained,
            rms_norm_eps=eps,
            rope_theta=theta,
            rope_scaling=_LLAMA3_SCALING if scaled else None,
            bos_token_id=_LLAMA3_BOS if llama3 else 1,
            eos_token_ids=_LLAMA3_EOS if llama3 else (2,),
        )

    def to_hf(self) -> dict[str, Any]:
        """The contents of a config.json. Rope and dtype in the older spelling, which transformers 4 and 5 both read."""
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"} | asdict(self)
        eos = list(config.pop("eos_token_ids"))
        config["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
        config["rope_scaling"] = None if self.rope_scaling is None else rope_to_hf(self.rope_scaling)
        config["torch_dtype"] = config.pop("dtype")
        return config


def token_ids(name: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    """The token ids in a configuration's field: null, one or several. Raises TypeError for anything else.

    An id beyond the vocabulary, which files contain for "none" or for a token that was never added, is logged and
    dropped: the model cannot generate it, and transformers ignores it too.
    """
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"{name} is {value!r}; legal: a token id, several of them, or null")
    if beyond := [token for token in ids if not 0 <= token < vocab_size]:
        logger.warning("%s %d is not used: the vocabulary has %d tokens", name, beyond[0], vocab_size)
    return tuple(token for token in ids if token not in beyond)


def _refuse_foreign(d: Mapping[str, Any]) -> None:
    kind, names = d.get("model_type"), field(d, "architectures", [])
    if not isinstance(names, list):
        raise TypeError(f"architectures is {names!r}; legal: a list of names")
    if kind != "llama" and not (kind is None and "LlamaForCausalLM" in names):
        raise ValueError(f"model_type is {kind!r} (architectures {names}); legal: 'llama'")
    if (activation := field(d, "hidden_act", "silu")) not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {activation!r}; legal: 'silu'")
    if layers := d.get("per_layer_config"):
        raise ValueError(f"per_layer_config is {layers!r}; legal: none, as all layers of a Llama are alike")


def _dtype_from_hf(d: Mapping[str, Any]) -> str | None:
    place, name = first_of({"dtype": d.get("dtype"), "torch_dtype": d.get("torch_dtype")}, "auto")
    known = name.removeprefix("torch.") if isinstance(name, str) else name
    known = _DTYPE_ALIASES.get(known, known) if isinstance(known, str) else known
    if known in DTYPES:
        return str(known)
    if known != "auto":
        legal = ", ".join(DTYPES)
        parts = place, shown(repr(name)), legal
        logger.warning("%s is %s, and not used; legal: %s; by default the weights' own", *parts)
    return None


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
