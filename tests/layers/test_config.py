"""LlamaConfig: what is legal, the published presets, and every spelling it is read from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import transformers

from fastllama.layers.config import PRESETS, LlamaConfig, RopeScaling

SMALL = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
HF = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3 = RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)


def test_sizes_follow_from_heads() -> None:
    sizes = (SMALL.q_size, SMALL.kv_size, SMALL.qkv_size, SMALL.num_queries_per_kv)
    assert sizes == (32, 16, 64, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size is 0; legal: at least 1"),
        ({"hidden_size": -1}, ValueError, "hidden_size is -1; legal: at least 1"),
        ({"intermediate_size": 2.0}, TypeError, "intermediate_size is 2.0; legal: an integer"),
        ({"num_hidden_layers": True}, TypeError, "num_hidden_layers is True; legal: an integer"),
        ({"num_attention_heads": 0}, ValueError, "num_attention_heads is 0; legal: at least 1"),
        ({"num_key_value_heads": 3}, ValueError, "num_key_value_heads is 3; legal: a divisor of num_attention_heads=4"),
        ({"head_dim": 7}, ValueError, "head_dim is 7; legal: an even number"),
        ({"max_position_embeddings": 0}, ValueError, "max_position_embeddings is 0; legal: at least 1"),
        ({"rms_norm_eps": 0}, ValueError, "rms_norm_eps is 0; legal: a positive number"),
        ({"rms_norm_eps": float("nan")}, ValueError, "rms_norm_eps is nan; legal: a positive number"),
        ({"rope_theta": float("inf")}, ValueError, "rope_theta is inf; legal: a positive number"),
        ({"rope_theta": "1e4"}, TypeError, "rope_theta is '1e4'; legal: a positive number"),
        ({"tie_word_embeddings": 1}, TypeError, "tie_word_embeddings is 1; legal: true or false"),
        ({"bos_token_id": 50}, ValueError, "bos_token_id is 50; legal: 0 to 49"),
        ({"eos_token_ids": (2, 50)}, ValueError, "eos_token_ids is 50; legal: 0 to 49"),
        ({"eos_token_ids": [2]}, TypeError, "eos_token_ids is [2]; legal: a tuple of token ids"),
        ({"dtype": "float64"}, ValueError, "dtype is 'float64'"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        replace(SMALL, **change)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("su", 2.0), "kind is 'su'; legal values: 'linear', 'dynamic', 'llama3', 'yarn'"),
        (("linear", 0), "factor is 0; legal: a positive number"),
        (("linear", float("inf")), "factor is inf; legal: a positive number"),
        (("llama3", 8.0), "original_max_position_embeddings is None; legal for llama3: at least 1"),
        (("yarn", 8.0), "original_max_position_embeddings is None; legal for yarn: at least 1"),
        (("dynamic", 8.0, 64), "original_max_position_embeddings is 64; legal for dynamic: None"),
        (("llama3", 8.0, 0), "original_max_position_embeddings is 0; legal: at least 1"),
        (("llama3", 8.0, 8192, 4.0, 4.0), "high_freq_factor is 4.0; legal: above low_freq_factor=4.0"),
        (("yarn", 8.0, 64, 1.0, 4.0, 1, 32), "beta_fast is 1; legal: at least beta_slow=32"),
        (("yarn", 8.0, 64, 1.0, 4.0, 32, 1, 0), "attention_factor is 0; legal: a positive number"),
    ],
)
def test_impossible_rope_scalings_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        RopeScaling(*arguments)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": 1, "rope_scaling": RopeScaling("yarn", 2.0, 64)}, "rope_theta is 1; legal with yarn: above 1"),
        ({"head_dim": 2, "rope_scaling": RopeScaling("dynamic", 2.0)}, "head_dim is 2; legal with dynamic rope"),
        ({"rope_scaling": RopeScaling("linear", 1e9)}, "max_position_embeddings times rope_scaling.factor is 4096"),
    ],
)
def test_a_scaling_that_does_not_fit_the_model_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        replace(SMALL, **change)
    assert str(raised.value).startswith(message)


CONTEXTS = {
    "plain": (None, 4096, 4096),
    "llama3": (LLAMA3, 4096, 4096),
    "linear: the base is configured (vicuna-16k)": (RopeScaling("linear", 4.0), 16384, 16384),
    "linear: the stretched one is": (RopeScaling("linear", 2.0, 2048), 4096, 4096),
    "yarn: the base is": (RopeScaling("yarn", 4.0, 4096), 16384, 16384),
    "yarn: the stretched one is (Yarn-Llama-2)": (RopeScaling("yarn", 16.0, 256), 4096, 4096),
    "yarn: the base is shorter than what is configured": (RopeScaling("yarn", 2.0, 256), 4096, 4096),
    "dynamic": (RopeScaling("dynamic", 4.0), 4096, None),
}


@pytest.mark.parametrize(("scaling", "default", "longest"), CONTEXTS.values(), ids=CONTEXTS)
def test_the_context_is_what_the_rope_is_made_for(
    scaling: RopeScaling | None, default: int, longest: int | None
) -> None:
    config = replace(SMALL, rope_scaling=scaling)
    assert (config.context_length, config.longest_context) == (default, longest)


def parameters(config: LlamaConfig) -> int:
    """Weights of an untied Llama without biases."""
    attention = (config.qkv_size + config.q_size) * config.hidden_size
    mlp = 3 * config.intermediate_size * config.hidden_size
    layers = config.num_hidden_layers * (attention + mlp + 2 * config.hidden_size)
    return 2 * config.vocab_size * config.hidden_size + layers + config.hidden_size


@pytest.mark.parametrize(
    ("name", "count", "context", "theta"),
    [
        # parameter counts as the Hub shows them for the published safetensors
        ("llama-2-7b", 6_738_415_616, 4096, 1e4),
        ("llama-2-13b", 13_015_864_320, 4096, 1e4),
        ("llama-2-70b", 68_976_648_192, 4096, 1e4),
        ("codellama-7b", 6_738_546_688, 16384, 1e6),
        ("codellama-13b", 13_016_028_160, 16384, 1e6),
        ("codellama-34b", 33_743_970_304, 16384, 1e6),
        ("tinyllama-1.1b", 1_100_048_384, 2048, 1e4),
    ],
)
def test_presets_have_the_published_sizes(name: str, count: int, context: int, theta: float) -> None:
    config = LlamaConfig.preset(name)
    assert (parameters(config), config.max_position_embeddings, config.rope_theta) == (count, context, theta)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"preset is 'llama-2-7B' \(did you mean 'llama-2-7b'\?\)"):
        LlamaConfig.preset("llama-2-7B")


def test_hf_defaults_are_those_of_transformers() -> None:
    config = LlamaConfig.from_hf(HF)
    theirs = transformers.LlamaConfig(**{key: value for key, value in HF.items() if key != "model_type"})
    assert config == LlamaConfig.from_hf(theirs.to_dict())
    assert config == replace(
        SMALL,
        num_key_value_heads=4,
        rms_norm_eps=theirs.rms_norm_eps,
        max_position_embeddings=theirs.max_position_embeddings,
    )


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"num_key_value_heads": 1, "head_dim": 16}, {"num_key_value_heads": 1, "head_dim": 16}),
        ({"num_key_value_heads": None, "head_dim": None}, {}),
        ({"eos_token_id": 7}, {"eos_token_ids": (7,)}),
        ({"eos_token_id": [7, 9]}, {"eos_token_ids": (7, 9)}),
        ({"eos_token_id": None}, {"eos_token_ids": ()}),
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"dtype": "float16"}, {"dtype": "float16"}),
        ({"dtype": "auto"}, {}),
        ({"dtype": "torch.float16"}, {"dtype": "float16"}),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, {"dtype": "float16"}),
        ({"torch_dtype": "float64"}, {}),
        ({"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}, {"bos_token_id": 0, "eos_token_ids": (1,)}),
        ({"bos_token_id": None}, {"bos_token_id": None}),
        ({"bos_token_id": -1, "eos_token_id": [2, 50]}, {"bos_token_id": None, "eos_token_ids": (2,)}),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        ({"attention_bias": True, "mlp_bias": True}, {"attention_bias": True, "mlp_bias": True}),
        ({"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": RopeScaling("linear", 2.0)}),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4}}, {"rope_scaling": RopeScaling("dynamic", 4)}),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, {"rope_scaling": RopeScaling("dynamic", 4.0)}),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "original_max_position_embeddings": 8192,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                },
            },
            {"max_position_embeddings": 131072, "rope_theta": 5e5, "rope_scaling": LLAMA3},
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, {"rope_scaling": RopeScaling("llama3", 8.0, 2048)}),
    ],
    ids=lambda value: ",".join(value),
)
def test_hf_spellings(extra: dict[str, Any], expected: dict[str, Any]) -> None:
    assert LlamaConfig.from_hf(HF | extra) == replace(LlamaConfig.from_hf(HF), **expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "'mistral'"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2' (architectures []); legal: 'llama'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; legal: 'silu'"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling.type is 'su'; legal values: 'default', 'line"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type is 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling lacks factor, which rope_type 'linear' needs"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "rope_parameters.factor is 0; legal: a positive"),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, "rope_parameters.full_attention is {"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config is {'0': "),
        ({"hidden_size": None}, "the configuration lacks hidden_size"),
        ({"hidden_size": 33}, "hidden_size is 33; legal: a multiple of num_attention_heads=4"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ],
)
def test_what_is_no_llama_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        LlamaConfig.from_hf(HF | change)
    assert message in str(raised.value)


def test_a_rope_scaling_that_is_no_object_is_refused() -> None:
    with pytest.raises(TypeError, match="rope_scaling is 'linear'; legal: an object"):
        LlamaConfig.from_hf(HF | {"rope_scaling": "linear"})


def test_an_old_config_without_model_type_is_known_by_its_architecture() -> None:
    old = {key: value for key, value in HF.items() if key != "model_type"} | {"architectures": ["LlamaForCausalLM"]}
    assert LlamaConfig.from_hf(old) == LlamaConfig.from_hf(HF)


ROUND_TRIPS = {
    "small": SMALL,
    "head_dim": replace(SMALL, head_dim=16, num_key_value_heads=4),
    "several eos": replace(SMALL, eos_token_ids=(2, 5), dtype="bfloat16"),
    "no eos": replace(SMALL, eos_token_ids=()),
    "tied, biased": replace(SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, dtype="float16"),
    "linear": replace(SMALL, rope_scaling=RopeScaling("linear", 2)),
    "linear, from a length": replace(SMALL, rope_scaling=RopeScaling("linear", 2, 1024)),
    "yarn": replace(SMALL, rope_scaling=RopeScaling("yarn", 16, 256)),
    "yarn, all settings": replace(
        SMALL,
        rope_scaling=RopeScaling("yarn", 2.5, 256, beta_fast=16, beta_slow=2, attention_factor=1.25, truncate=False),
        rope_theta=5e5,
    ),
    "no bos": replace(SMALL, bos_token_id=None),
    "dynamic": replace(SMALL, rope_scaling=RopeScaling("dynamic", 3.0), rope_theta=1e6),
    "llama3": replace(SMALL, rope_scaling=LLAMA3, rope_theta=5e5, max_position_embeddings=131072),
    **PRESETS,
}


@pytest.mark.parametrize("config", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_to_hf_is_read_back_by_us_and_by_transformers(config: LlamaConfig) -> None:
    assert LlamaConfig.from_hf(config.to_hf()) == config
    theirs = transformers.LlamaConfig.from_dict(config.to_hf())
    assert LlamaConfig.from_hf(theirs.to_dict()) == config


@pytest.mark.parametrize(("eos", "written"), [((2,), 2), ((2, 5), [2, 5]), ((), None)])
def test_to_hf_writes_one_eos_as_a_number(eos: tuple[int, ...], written: object) -> None:
    assert replace(SMALL, eos_token_ids=eos).to_hf()["eos_token_id"] == written


META_7B = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1}
META_70B = {
    "dim": 8192,
    "multiple_of": 4096,
    "ffn_dim_multiplier": 1.3,
    "n_heads": 64,
    "n_kv_heads": 8,
    "n_layers": 80,
    "norm_eps": 1e-05,
    "vocab_size": -1,
}
META_13B = META_7B | {"dim": 5120, "n_heads": 40, "n_layers": 40}
META_CODE_34B = META_70B | {"multiple_of": 256, "ffn_dim_multiplier": 1.0, "n_layers": 48, "rope_theta": 1000000}


@pytest.mark.parametrize(
    ("params", "name"),
    [(META_7B, "llama-2-7b"), (META_13B, "llama-2-13b"), (META_70B, "llama-2-70b"), (META_CODE_34B, "codellama-34b")],
)
def test_metas_published_params_are_the_presets(params: dict[str, Any], name: str) -> None:
    assert LlamaConfig.from_meta(params, vocab_size=32000) == LlamaConfig.preset(name)


def test_metas_llama_3_has_8192_positions() -> None:
    params = META_7B | {"n_kv_heads": 8, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "rope_theta": 5e5}
    config = LlamaConfig.from_meta(params, vocab_size=128256)
    assert (config.max_position_embeddings, config.intermediate_size, config.rope_theta) == (8192, 14336, 5e5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 4096}, "sliding_window is 4096; legal: none, no plain Llama of Meta's has it"),
        ({"quantization_args": {"scheme": "int4"}}, "quantization_args is {'scheme': 'int4'}; legal: none"),
        ({"lora_args": {"rank": 16}}, "lora_args is {'rank': 16}; legal: none"),
        ({"n_heads": None}, "params.json lacks n_heads"),
        ({"vocab_size": 32016}, "vocab_size is 32016, but tensor tok_embeddings.weight has 32000 rows"),
        ({"n_heads": 3}, "dim is 4096; legal: a multiple of n_heads=3"),
        ({"multiple_of": 0}, "multiple_of is 0; legal: at least 1"),
        ({"ffn_dim_multiplier": float("inf")}, "ffn_dim_multiplier is inf"),
    ],
)
def test_strange_params_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        LlamaConfig.from_meta(META_7B | change, vocab_size=32000)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("written", "expected"),
    [("half", "float16"), ("float", "float32"), ("torch.bfloat16", "bfloat16"), ("auto", None)],
)
def test_a_dtype_may_have_torchs_names(written: str, expected: str | None, caplog: pytest.LogCaptureFixture) -> None:
    assert LlamaConfig.from_hf(HF | {"torch_dtype": written}).dtype == expected
    assert caplog.messages == []


@pytest.mark.parametrize("written", ["bf16", "double", "int8", {"": "float32"}, 16])
def test_another_dtype_is_logged_and_the_weights_own_used(written: object, caplog: pytest.LogCaptureFixture) -> None:
    assert LlamaConfig.from_hf(HF | {"dtype": written}).dtype is None
    assert caplog.messages == [
        f"dtype is {written!r}, and not used; legal: bfloat16, float16, float32; by default the weights' own"
    ]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("sliding_window", 4, True),
        ("sliding_window", None, False),
        ("attention_chunk_size", 8192, True),
        ("layer_types", ["sliding_attention", "full_attention"], True),
        ("layer_types", ["full_attention", "full_attention"], False),
    ],
)
def test_attention_of_other_architectures_is_logged_as_unused(
    key: str, value: object, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    LlamaConfig.from_hf(HF | {key: value})
    assert caplog.messages == ([f"{key} is {value!r}, and not used: attention is over all tokens"] if said else [])


@pytest.mark.parametrize("none", [False, 0, "", [], {}, None])
def test_what_is_empty_is_no_rope_scaling(none: object) -> None:
    assert LlamaConfig.from_hf(HF | {"rope_scaling": none}).rope_scaling is None


def test_long_values_are_cut_in_messages(caplog: pytest.LogCaptureFixture) -> None:
    LlamaConfig.from_hf(HF | {"dtype": "x" * 100_000})
    assert len(caplog.text) < 1000
