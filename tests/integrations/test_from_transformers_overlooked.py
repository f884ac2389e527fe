"""fastllama.from_transformers refuses inconspicuous changes too: those that keep the names of classes and functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama

import fastllama
from fastllama import LLM
from tests.integrations.models import llama

Changes = Callable[[Any], Any]


def layer(model: Any, index: int = 1) -> Any:
    return model.model.layers[index]


def state(model: Any) -> list[Any]:
    tensors = (*model.parameters(), *model.buffers())
    return [model.state_dict().keys(), *((t.data_ptr(), t.dtype) for t in tensors)]


class Called(modeling_llama.LlamaForCausalLM):
    """A class that overrides `__call__`, so that its logits are not those of its weights."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)
        out.logits = out.logits * 2
        return out


def scaled_attention(module: Any, *args: Any, **kwargs: Any) -> Any:
    """A user's own attention function."""
    return sdpa_attention_forward(module, *args, **kwargs | {"scaling": 0.01})


def set_attention(model: Any) -> None:
    AttentionInterface.register("scaled", scaled_attention)
    model.set_attn_implementation("scaled")


def slower(model: Any) -> None:
    model.model.rotary_emb.inv_freq *= 1 - 1e-4


def share(model: Any, place: str, other: str) -> None:
    owner, _, name = place.rpartition(".")
    setattr(model.get_submodule(owner), name, model.get_parameter(other))


# What is done to a model of float32, and what the message holds then.
LESS_SEEN: dict[str, tuple[Changes, str]] = {
    "frequencies written in place": (slower, r"rotary_emb has other frequencies than config specifies"),
    "frequencies replaced": (
        lambda m: m.model.rotary_emb.register_buffer("inv_freq", m.model.rotary_emb.inv_freq / 4, persistent=False),
        r"rotary_emb has other frequencies than config specifies",
    ),
    "attention function": (set_attention, r"model.layers.0 .*its attention function 'scaled' is not transformers'"),
    "__call__": (
        lambda m: setattr(m, "__class__", Called),
        r"the model \(it is a tests.*Called with a __call__ of its own\)",
    ),
    "k and v are one": (
        lambda m: share(m, "model.layers.1.self_attn.v_proj.weight", "model.layers.1.self_attn.k_proj.weight"),
        r"layers.1.self_attn.v_proj.weight \(it is model.layers.1.self_attn.k_proj.weight too\)",
    ),
    "a layer's q is another's": (
        lambda m: setattr(layer(m).self_attn, "q_proj", layer(m, 0).self_attn.q_proj),
        r"layers.1.self_attn.q_proj.weight \(it is model.layers.0.self_attn.q_proj.weight too\)",
    ),
    "a weight is the embedding": (
        lambda m: share(m, "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"),
        r"layers.1.mlp.up_proj.weight \(it is model.embed_tokens.weight too\)",
    ),
    "no output head": (lambda m: delattr(m, "lm_head"), r"lm_head \(it is missing\)"),
    "no linear layer": (lambda m: delattr(layer(m).self_attn, "o_proj"), r"layers.1 \(there is no o_proj\)"),
    "no weight": (lambda m: delattr(m.lm_head, "weight"), r"lm_head \(weight is missing: another library stores it"),
}


@pytest.mark.parametrize("name", LESS_SEEN)
def test_what_is_seen_less_easily(name: str) -> None:
    change, message = LESS_SEEN[name]
    model = llama()
    change(model)
    before = state(model)
    for call in (fastllama.from_transformers, LLM):
        with pytest.raises(ValueError, match=message):
            call(model)
    assert state(model) == before


WRAPPED = (
    *("LlamaForCausalLM", "LlamaModel", "LlamaDecoderLayer", "LlamaAttention", "LlamaMLP", "LlamaRMSNorm"),
    "LlamaRotaryEmbedding",
)


@pytest.mark.parametrize("name", WRAPPED)
def test_a_forward_that_was_wrapped_for_all_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """functools.wraps gives what wraps it the forward's own names."""
    kind = getattr(modeling_llama, name)

    @functools.wraps(kind.forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    model = llama()
    monkeypatch.setattr(kind, "forward", run)
    with pytest.raises(ValueError, match=rf"{kind.__name__} (whose forward was replaced|with a forward of its own)"):
        fastllama.from_transformers(model)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
def test_attention_functions_of_transformers_are_taken(name: str) -> None:
    model = llama()
    model.set_attn_implementation(name)
    assert fastllama.from_transformers(model).dtype == torch.float32


def test_an_attention_of_transformers_that_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    model.set_attn_implementation("eager")
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", scaled_attention)
    with pytest.raises(ValueError, match="attention function 'eager' is not transformers' own"):
        fastllama.from_transformers(model)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,), (torch.float16,), (torch.float16, torch.float32)], ids=str)
def test_frequencies_that_a_cast_rounded_are_taken(dtypes: tuple[torch.dtype, ...]) -> None:
    model = llama()
    exact = model.model.rotary_emb.inv_freq.clone()
    for dtype in dtypes:
        model.to(dtype)
    assert not torch.equal(model.model.rotary_emb.inv_freq.float(), exact)
    assert fastllama.from_transformers(model).dtype == dtypes[-1]


@pytest.mark.filterwarnings("ignore:Unrecognized keys in:UserWarning")
def test_dynamic_frequencies_may_have_followed_a_long_text() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    given = {"rope_parameters": rope} if hasattr(llama().config, "rope_parameters") else {"rope_scaling": rope}
    model = llama(max_position_embeddings=16, **given)
    before = model.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        model(torch.arange(3, 43)[None])
    assert not torch.equal(model.model.rotary_emb.inv_freq, before)
    fastllama.from_transformers(model)
    model.model.rotary_emb.original_inv_freq = before * 0.999
    with pytest.raises(ValueError, match="rotary_emb has other frequencies"):
        fastllama.from_transformers(model)


def opened_by_transformers(folder: Path) -> Any:
    """A quantized folder as transformers' own quantizer opens it: layers have no weight before the first forward."""
    llama().save_pretrained(folder / "stock")
    config = fastllama.FastLlamaConfig("int4")
    ours = AutoModelForCausalLM.from_pretrained(folder / "stock", quantization_config=config, dtype=torch.float32)
    ours.save_pretrained(folder / "quantized")
    return AutoModelForCausalLM.from_pretrained(folder / "quantized", dtype=torch.float32)


def test_layers_that_another_library_quantized(tmp_path: Path) -> None:
    model = opened_by_transformers(tmp_path)
    assert not hasattr(model.model.layers[0].self_attn.q_proj, "weight")
    message = "q_proj's weight is missing: another library stores it in its own form"
    for call in (fastllama.from_transformers, LLM):
        with pytest.raises(ValueError, match=message):
            call(model)
    with pytest.warns(UserWarning, match=rf"patched 0 of \d layers; .*{message}"):
        fastllama.patch(model)


SETTINGS: dict[str, tuple[str, Any, str]] = {
    "text": ("eos_token_id", "2", r"generation_config.eos_token_id is '2'; legal: a token id"),
    "a list of None": ("eos_token_id", [None], r"generation_config.eos_token_id is \[None\]; legal: a token id"),
    "an object": ("foo", {"bar": {3}}, r"generation_config.foo is .*; legal: what generation_config.json can hold"),
    "a tensor": ("max_new_tokens", torch.tensor(5), r"generation_config.max_new_tokens is tensor\(5\); legal: what"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_wrong_type(name: str) -> None:
    key, value, message = SETTINGS[name]
    model = llama()
    setattr(model.generation_config, key, value)
    with pytest.raises(TypeError, match=message):
        fastllama.from_transformers(model)


@pytest.mark.parametrize("ends", [torch.tensor([3, 4]), [3, 4], (3, 4)], ids=str)
def test_end_tokens_may_be_a_tensor(ends: Any) -> None:
    model = llama()
    model.generation_config.eos_token_id = ends
    assert fastllama.from_transformers(model).config.eos_token_ids == (3, 4)
    assert model.generation_config.eos_token_id is ends
