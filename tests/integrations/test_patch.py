"""fastllama.patch: a transformers Llama gives the same numbers and tokens on our ops, however it is called."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, LlamaForSequenceClassification, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama

import fastllama
from tests.integrations.models import (
    BEFORE_5,
    CACHE,
    HOLES,
    IDS,
    INTERPRETED,
    LEFT,
    NEW_TOKENS,
    RIGHT,
    SIZES,
    VOCAB,
    assert_close,
    cache_of,
    llama,
    on_our_ops,
    pair,
)
from tests.integrations.quantized import BOUNDS, counted, quantized

CAUSAL = torch.ones(9, 9, dtype=torch.bool).tril().expand(3, 1, 9, 9)
DIAGONAL = CAUSAL & torch.ones(9, 9, dtype=torch.bool).triu(-3)
# What a forward is given beside ids, and which of its rows count (None: all).
CALLS: dict[str, tuple[dict[str, Any], Tensor | None]] = {
    "nothing": ({}, None),
    "no cache": ({"use_cache": False}, None),
    "mask of ones": ({"attention_mask": torch.ones_like(IDS)}, None),
    "left padding": ({"attention_mask": LEFT}, LEFT),
    "left padding with positions": ({"attention_mask": LEFT, "position_ids": (LEFT.cumsum(1) - 1).clamp(min=0)}, LEFT),
    "right padding": ({"attention_mask": RIGHT}, RIGHT),
    "holes": ({"attention_mask": HOLES}, HOLES),
    "packed": ({"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]]).expand(3, -1), "use_cache": False}, None),
    "own mask": ({"attention_mask": DIAGONAL}, None),
    "own mask to be added": ({"attention_mask": torch.zeros(DIAGONAL.shape).masked_fill(~DIAGONAL, -1e9)}, None),
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one key head": {"num_key_value_heads": 1},
    "heads of 12": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12},
}
SHAPES |= {
    name: {"max_position_embeddings": 64, "rope_scaling": {"rope_type": name, "rope_theta": 10000.0, **rope}}
    for name, rope in ROPES.items()
}
STATIC = {"cache_implementation": "static"}


@pytest.mark.parametrize("call", CALLS)
def test_logits_are_those_of_transformers(call: str) -> None:
    stock, patched = pair()
    given, rows = CALLS[call]
    with torch.inference_mode():
        assert_close(patched(IDS, **given).logits, stock(IDS, **given).logits, rows)
    assert on_our_ops(patched)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_rope_of_a_llama(shape: str) -> None:
    stock, patched = pair(**SHAPES[shape])
    ids = torch.randint(3, VOCAB, (1, 12 if INTERPRETED else 100))  # longer than what ropes stretch
    with torch.inference_mode():
        assert_close(patched(ids).logits, stock(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_as_exact_as_transformers(dtype: torch.dtype) -> None:
    stock, patched = pair(dtype)
    with torch.inference_mode():
        exact = stock.float()(IDS).logits
        plain = (stock.to(dtype)(IDS).logits - exact).norm()
        ours = (patched(IDS).logits - exact).norm()
    assert 0 < ours < 1.2 * plain


@pytest.mark.parametrize("kind", ["int4", "int8", "w8a8"])
def test_quantized_linear_layers_are_ours_too(kind: str) -> None:
    """More of them in test_patch_quantized.py."""
    plain = quantized(llama(hidden_size=64, num_attention_heads=1, num_key_value_heads=1, intermediate_size=64), kind)
    patched = copy.deepcopy(plain)
    fastllama.patch(patched, strict=True)
    with counted() as found, torch.inference_mode():
        after = patched(IDS, attention_mask=LEFT).logits
    assert found == {f"matmul_{kind}": 4 * SIZES["num_hidden_layers"]}
    with torch.inference_mode():
        assert_close(after, plain(IDS, attention_mask=LEFT).logits, LEFT, BOUNDS[kind])


def test_hidden_states_are_collected() -> None:
    stock, patched = pair()
    with torch.inference_mode():
        for _ in range(2):  # what transformers leaves set by the first must not send the second to its own layers
            expected = stock(IDS, output_hidden_states=True).hidden_states
            found = patched(IDS, output_hidden_states=True).hidden_states
            assert len(found) == len(expected) == stock.config.num_hidden_layers + 1
            for ours, theirs in zip(found, expected, strict=True):
                assert_close(ours, theirs)
    assert on_our_ops(patched)


def test_collecting_before_the_patch_does_not_matter() -> None:
    stock = llama()
    with torch.inference_mode():
        expected = stock(IDS, output_hidden_states=True).logits
        assert fastllama.patch(stock, strict=True).patched == SIZES["num_hidden_layers"]
        assert on_our_ops(stock)
        assert_close(stock(IDS).logits, expected)


def generated(model: Any, ids: Tensor = IDS, mask: Tensor | None = LEFT, **kwargs: Any) -> Tensor:
    torch.manual_seed(0)
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "attention_mask": mask, "pad_token_id": 0} | kwargs
    return model.generate(ids, **kwargs)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no mask": {"mask": None},
    "right padding": {"mask": RIGHT},
    "sampled": {"do_sample": True},
    "beams": {"num_beams": 3},
    "several answers": {"do_sample": True, "num_return_sequences": 2},
    "chunks of a prompt": {"prefill_chunk_size": 4},
    "static cache": STATIC,
    "static cache, no mask": STATIC | {"mask": None},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "no cache": {"use_cache": False, "max_new_tokens": 4},
    "prompt lookup": {"ids": IDS[:1].repeat(1, 2), "mask": None, "prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_generate_gives_the_same_tokens(way: str) -> None:
    stock, patched = pair()
    assert torch.equal(generated(patched, **WAYS[way]), generated(stock, **WAYS[way]))


@pytest.mark.parametrize("helper", ["patched", "stock"])
def test_generate_with_an_assistant(helper: str) -> None:
    stock, patched = pair()
    assistant = llama(num_hidden_layers=1)
    expected = generated(stock, IDS[:1], None, assistant_model=assistant)
    if helper == "patched":
        fastllama.patch(assistant)
    assert torch.equal(generated(patched, IDS[:1], None, assistant_model=assistant), expected)


@pytest.mark.parametrize("call", ["no cache", "left padding", "own mask"])
def test_what_is_compiled_are_our_ops(call: str) -> None:
    _, patched = pair()
    found: list[str] = []

    def noting(graph: Any, inputs: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.inference_mode():
        torch.compile(patched, fullgraph=True, backend=noting)(IDS, **{**CALLS[call][0], "use_cache": False})
    assert found.count("fastllama_transformers.fused_matmul") == 2 * SIZES["num_hidden_layers"]


def static_steps(model: Any, forward: Callable[..., Any]) -> Tensor:
    """Logits of a prompt and four tokens over a static cache, step by step."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    mask, ids, found, length = LEFT, IDS, [], 0
    for _ in range(5):
        given = {CACHE: cache, "attention_mask": mask, "position_ids": mask.cumsum(1)[:, length:] - 1}
        if BEFORE_5:
            given["cache_position"] = torch.arange(length, length + ids.shape[1])
        length += ids.shape[1]
        found.append(forward(input_ids=ids, **given).logits[:, -1])
        ids = found[-1].argmax(-1, keepdim=True)
        mask = torch.cat((mask, mask.new_ones(3, 1)), 1)
    return torch.stack(found)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("call", ["no cache", "left padding", "own mask"])
def test_a_forward_compiles_as_one_graph(call: str, backend: str) -> None:
    stock, patched = pair()
    given, rows = CALLS[call]
    compiled = torch.compile(patched, fullgraph=True, backend=backend)
    with torch.inference_mode():
        found = compiled(IDS, **{**given, "use_cache": False}).logits
        assert_close(found, stock(IDS, **given).logits, rows)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_decoding_over_a_static_cache_compiles_as_one_graph(backend: str) -> None:
    stock, patched = pair()
    compiled = torch.compile(patched, fullgraph=True, backend=backend)
    with torch.inference_mode():
        assert_close(static_steps(patched, compiled), static_steps(stock, stock))
        assert_close(static_steps(patched, patched), static_steps(stock, stock))


def test_a_compiled_decode_goes_on_from_the_cache_of_an_eager_prompt() -> None:
    stock, patched = pair()
    compiled = torch.compile(patched, backend="aot_eager")
    with torch.inference_mode():
        caches = [cache_of(model(IDS, use_cache=True)) for model in (stock, patched)]
        for token in IDS.T[:3, :, None]:
            expected, found = (
                model(token, use_cache=True, **{CACHE: cache}).logits
                for model, cache in zip((stock, compiled), caches, strict=True)
            )
            assert_close(found, expected)


@pytest.mark.parametrize("kind", ["empty", "of a stock model"])
def test_the_callers_own_dynamic_cache(kind: str) -> None:
    stock, patched = pair()
    with torch.inference_mode():
        caches = [DynamicCache(), DynamicCache()]
        for model, cache in zip((stock, stock if kind == "of a stock model" else patched), caches, strict=True):
            model(IDS, **{CACHE: cache})
        more = IDS.flip(1)
        expected = stock(more, **{CACHE: caches[0]}).logits
        assert_close(patched(more, **{CACHE: caches[1]}).logits, expected)
        assert caches[1].get_seq_length() == 18
        for ours, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
            assert_close(ours.keys, theirs.keys)
            assert_close(ours.values, theirs.values)


def test_a_classifier_is_a_llama_too() -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(llama().config).eval()
    with torch.inference_mode():
        expected = model(IDS).logits
        assert fastllama.patch(model, strict=True).norms == 1
        assert_close(model(IDS).logits, expected)


def test_training_gives_the_gradients_of_transformers() -> None:
    stock, patched = pair()
    for model in (stock, patched):
        model.train()
        model(IDS, attention_mask=LEFT, labels=IDS).loss.backward()
    for (name, ours), theirs in zip(patched.named_parameters(), stock.parameters(), strict=True):
        assert ours.grad is not None, name
        assert_close(ours.grad, theirs.grad)


def test_gradients_of_a_model_in_eval_mode_are_right_and_warned_of() -> None:
    stock, patched = pair()
    stock(IDS).logits.sum().backward()
    with pytest.warns(UserWarning, match="gradients are required: call the model under torch.inference_mode"):
        patched(IDS).logits.sum().backward()
    assert_close(patched.model.layers[0].mlp.up_proj.weight.grad, stock.model.layers[0].mlp.up_proj.weight.grad)


def test_attention_weights_are_refused() -> None:
    _, patched = pair()
    with torch.inference_mode():
        with pytest.raises(ValueError, match=r"output_attentions is True, .* fastllama.unpatch\(model\)"):
            patched(IDS, output_attentions=True)
        assert on_our_ops(patched)


def scaled_attention(module: Any, *args: Any, **kwargs: Any) -> Any:
    """A user's own attention function."""
    return sdpa_attention_forward(module, *args, **kwargs | {"scaling": 0.01})


def test_an_attention_function_of_others_stays() -> None:
    AttentionInterface.register("scaled", scaled_attention)
    stock = llama()
    stock.set_attn_implementation("scaled")
    model = copy.deepcopy(stock)
    with pytest.raises(ValueError, match=r"strict: patched 0 of .*attention function 'scaled' is not transformers'"):
        fastllama.patch(model, strict=True)
    with pytest.warns(UserWarning, match="patched 0 of"):
        assert fastllama.patch(model).norms > 0
    assert model.config._attn_implementation == "scaled"
    with torch.inference_mode():
        assert_close(model(IDS).logits, stock(IDS).logits)


@pytest.mark.parametrize("name", ["LlamaDecoderLayer", "LlamaAttention", "LlamaMLP", "LlamaRMSNorm"])
def test_a_forward_that_was_wrapped_for_all_models_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """functools.wraps gives what wraps it the forward's own names."""
    kind = getattr(modeling_llama, name)
    forward = kind.forward

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    model = llama()
    monkeypatch.setattr(kind, "forward", run)
    with pytest.raises(ValueError, match=rf"strict: patched 0 of .*{name} whose forward was replaced"):
        fastllama.patch(model, strict=True)


def test_a_rotation_that_was_wrapped_for_all_models_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    rotate = modeling_llama.apply_rotary_pos_emb

    @functools.wraps(rotate)
    def run(*args: Any, **kwargs: Any) -> Any:
        return rotate(*args, **kwargs)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", run)
    with pytest.raises(ValueError, match=r"modeling_llama.apply_rotary_pos_emb was replaced"):
        fastllama.patch(llama(), strict=True)
