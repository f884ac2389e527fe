"""A config.json that specifies its rope in several places: read as transformers 5 does, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fastllama.layers.config import ROPE_KINDS, LlamaConfig
from fastllama.layers.rope import attention_factor, inverse_frequencies

SIZES = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 32,
}
ORIGINAL = "original_max_position_embeddings"
# What each key may hold; `...` leaves it out.
KINDS = [..., ..., *ROPE_KINDS, *ROPE_KINDS, *ROPE_KINDS, "yarn", "default", "su", "longrope", "mrope", None]
INSIDE: dict[str, list[Any]] = {
    "rope_type": KINDS,
    "type": KINDS,
    "rope_theta": [..., ..., ..., 10000.0, 500000, None],
    "factor": [2, 4.0, 8.0, 16.0, 0.5, ..., None],
    ORIGINAL: [..., 64, 4096, None],
    "partial_rotary_factor": [*[...] * 9, 1.0, 0.5],
    "low_freq_factor": [1.0, 1, 2.0, ...],
    "high_freq_factor": [4.0, 4, 8.0, ...],
    "beta_fast": [..., 32, 16.0, 0, None],
    "beta_slow": [..., 1, 2.0, 0, None],
    "attention_factor": [..., ..., 1.25, None],
    "mscale": [..., 1.0, 0.707, 0],
    "mscale_all_dim": [..., 1.0, 0.5, None],
    "truncate": [..., ..., True, False, None],
    "finetuned": [..., ..., True],
    "full_attention": [*[...] * 20, {"rope_type": "linear", "factor": 2.0}],
}
ROOT: dict[str, list[Any]] = {
    "rope_theta": [..., 10000.0, 1000000.0, None],
    "max_position_embeddings": [128, 4096, 65536],
    ORIGINAL: [..., ..., 64, 2048, None],
    "partial_rotary_factor": [*[...] * 9, 1.0, 0.25],
}


def some(values: dict[str, list[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    drawn = st.fixed_dictionaries({key: st.sampled_from(held) for key, held in values.items()})
    return drawn.map(lambda found: {key: value for key, value in found.items() if value is not ...})


def read(config: dict[str, Any]) -> LlamaConfig | str:
    """The configuration, or why there is none."""
    try:
        return LlamaConfig.from_hf(config)
    except ValueError as error:
        return str(error)


ROPES = st.one_of(st.just({}), st.none(), some(INSIDE), some(INSIDE), some(INSIDE))


@settings(max_examples=500, deadline=None)
@given(root=some(ROOT), scaling=ROPES, parameters=ROPES, given_keys=st.sampled_from([(1, 1), (1, 0), (0, 1)]))
def test_all_spellings_beside_each_other(
    root: dict[str, Any], scaling: Any, parameters: Any, given_keys: tuple[int, int]
) -> None:
    config = SIZES | root
    config |= {"rope_scaling": scaling} if given_keys[0] else {}
    config |= {"rope_parameters": parameters} if given_keys[1] else {}
    ours = read(config)
    if isinstance(ours, str):
        key, *_ = ours.split()
        assert key.split(".")[-1] in {*INSIDE, *ROOT, "rope_scaling", "rope_parameters"}, "the message names the key"
        assert "; legal" in ours or "lacks factor" in ours
        return
    length = config["max_position_embeddings"]
    try:
        rotary = LlamaRotaryEmbedding(transformers.LlamaConfig.from_dict(dict(config)))
    except Exception:  # of null where a number is wanted, or of a key that is missing
        return  # no oracle: null counts as absent here, and Llama 3's two factors default to Meta's
    torch.testing.assert_close(inverse_frequencies(ours, length), rotary.inv_freq, rtol=1e-6, atol=0)
    assert attention_factor(ours) == pytest.approx(rotary.attention_scaling, rel=1e-12)
    again = LlamaConfig.from_hf(ours.to_hf())
    assert again == ours, "and it is written as it is read"


LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 64}
SET_ASIDE: dict[str, tuple[dict[str, Any], str]] = {
    "scaling added to a file of transformers 5": (
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        "so rope_parameters, which is {'rope_type': 'default', 'rope_theta': 500000.0}, is not used",
    ),
    "two bases": (
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e6}},
        "rope_parameters.rope_theta is 1000000.0, so rope_theta, which is 500000.0, is not used",
    ),
    "two types": (
        {"rope_scaling": LINEAR | {"type": "dynamic"}},
        "rope_scaling.rope_type is 'linear', so rope_scaling.type, which is 'dynamic', is not used",
    ),
    "two lengths": (
        {"rope_scaling": YARN, ORIGINAL: 32},
        f"{ORIGINAL} is 32, so rope_scaling.{ORIGINAL}, which is 64, is not used",
    ),
    "a factor without a type": ({"rope_scaling": {"factor": 4.0}}, "rope_scaling.factor is not used, as rope_type is"),
    "a length that dynamic scaling does not read": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0, ORIGINAL: 64}},
        f"rope_scaling.{ORIGINAL} is not used, as rope_type is 'dynamic'",
    ),
    "a length at the root": ({ORIGINAL: 64}, f"{ORIGINAL} is not used, as rope_type is 'default'"),
}


@pytest.mark.parametrize(("keys", "line"), SET_ASIDE.values(), ids=SET_ASIDE)
def test_a_value_that_is_set_aside_is_logged(keys: dict[str, Any], line: str, caplog: pytest.LogCaptureFixture) -> None:
    LlamaConfig.from_hf(SIZES | keys)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert line in record.getMessage()


AGREEING: list[dict[str, Any]] = [
    {},
    {"rope_scaling": None, "rope_theta": 1e6},
    {"rope_scaling": {}, "rope_parameters": LINEAR | {"rope_theta": 1e6}},
    {"rope_scaling": LINEAR, "rope_parameters": LINEAR, "rope_theta": 1e4},
    {"rope_scaling": {"type": "yarn", "factor": 16.0, ORIGINAL: 4096, "finetuned": True}},
    {"rope_scaling": YARN | {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0}, ORIGINAL: 64},
]


@pytest.mark.parametrize("keys", AGREEING)
def test_places_that_agree_are_not_worth_a_word(keys: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    LlamaConfig.from_hf(SIZES | keys)
    assert caplog.messages == []
