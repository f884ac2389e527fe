"""fastllama.patch of a model whose linear layers are ours, quantized: the same numbers and tokens, fused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastllama
from fastllama.integrations.transformers.fused import Apart
from tests.integrations.models import IDS, LEFT, assert_close, llama
from tests.integrations.quantized import (
    BOUNDS,
    FORMS,
    KINDS,
    NUM_LAYERS,
    SHAPES,
    TILES,
    counted,
    dequantized,
    layers_of,
    logits,
    pair,
    quantized,
)
from tests.integrations.test_patch import WAYS, generated, static_steps
from tests.rounds import exhaustive


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_layers_alone_and_of_the_weights_they_stand_for(shape: str, form: str) -> None:
    plain, patched = pair(**FORMS[form], sizes=SHAPES[shape])
    bound = BOUNDS[FORMS[form]["kind"]]
    for given, rows in (({}, None), ({"attention_mask": LEFT}, LEFT)):
        assert_close(logits(patched, **given), logits(plain, **given), rows, bound)
        if FORMS[form]["kind"] != "w8a8":
            assert_close(logits(patched, **given), logits(dequantized(plain), **given), rows, bound)
    qkv, _, gate_up, _ = layers_of(patched)[0]
    assert isinstance(qkv, Apart) == shape.startswith("apart")
    assert isinstance(gate_up, Apart) == (shape.startswith("apart") or shape == "only q, k, v fused")


@pytest.mark.parametrize("way", ["greedy", "beams", "static cache", exhaustive("no mask"), exhaustive("prompt lookup")])
@pytest.mark.parametrize("kind", ["int4", exhaustive("int8"), "w8a8"])
@pytest.mark.parametrize("shape", ["fused", "apart"])
def test_generate_gives_the_same_tokens(shape: str, kind: str, way: str) -> None:
    plain, patched = pair(kind, sizes=SHAPES[shape])
    assert torch.equal(generated(patched, **WAYS[way]), generated(plain, **WAYS[way]))


@pytest.mark.parametrize("scales", ["as x", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_in_16_bits_it_is_as_exact_as_the_layers_alone(kind: str, dtype: torch.dtype, scales: str) -> None:
    made_in = dtype if scales == "as x" else torch.float32
    plain = quantized(llama(made_in, **TILES), kind).to(dtype)
    assert plain.model.layers[0].mlp.up_proj.scales.dtype == made_in
    patched = copy.deepcopy(plain)
    fastllama.patch(patched, strict=True)
    exact = logits(copy.deepcopy(plain).float())
    plain_error, error = ((logits(model).float() - exact).norm() for model in (plain, patched))
    assert 0 < error < 1.2 * plain_error


@pytest.mark.parametrize(("shape", "launches"), [("fused", 4), ("only q, k, v fused", 5), ("apart", 7)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_takes_four_matmuls_where_its_rows_are_whole_tiles(kind: str, shape: str, launches: int) -> None:
    _, patched = pair(kind, sizes=SHAPES[shape])
    with counted() as found:
        logits(patched)
    assert found == {f"matmul_{kind}": launches * NUM_LAYERS}


@pytest.mark.parametrize("names", ["q_proj k_proj", "gate_proj down_proj", "o_proj", "v_proj up_proj"])
@pytest.mark.parametrize("kind", ["int4", exhaustive("int8"), exhaustive("w8a8")])
def test_some_layers_may_be_quantized(kind: str, names: str) -> None:
    plain, patched = pair(kind, names=names)
    assert_close(logits(patched), logits(plain), bound=BOUNDS[kind])
    with counted() as found:
        logits(copy.deepcopy(patched))
    assert found.total() <= 7 * NUM_LAYERS
    assert found[f"matmul_{kind}"] == len(names.split()) * NUM_LAYERS


def test_layers_may_be_quantized_in_different_ways() -> None:
    model = llama(**TILES)
    for names, form in (("q_proj gate_proj", "int4"), ("k_proj up_proj", "int4 with zeros"), ("down_proj", "w8a8")):
        quantized(model, names=names, **FORMS[form])
    patched = copy.deepcopy(model)
    fastllama.patch(patched, strict=True)
    assert_close(logits(patched), logits(model), bound=BOUNDS["w8a8"])


@pytest.mark.parametrize(("shape", "ops"), [("fused", 2), ("apart", 0)])
@pytest.mark.parametrize(
    "form", ["int4 with zeros", *(exhaustive(form) for form in FORMS if form != "int4 with zeros")]
)
def test_what_is_compiled_are_our_ops(form: str, shape: str, ops: int) -> None:
    plain, patched = pair(**FORMS[form], sizes=SHAPES[shape])
    found: list[str] = []

    def noting(graph: Any, inputs: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.inference_mode():
        compiled = torch.compile(patched, fullgraph=True, backend=noting)
        after = compiled(IDS, use_cache=False).logits
    assert_close(after, logits(plain), bound=BOUNDS[FORMS[form]["kind"]])
    assert found.count("fastllama_transformers.fused_quantized") == ops * NUM_LAYERS
    alone = sum(name.startswith(f"fastllama.matmul_{FORMS[form]['kind']}") for name in found)
    assert alone == (2 if shape == "fused" else 7) * NUM_LAYERS


@pytest.mark.parametrize("shape", ["fused", exhaustive("apart")])
@pytest.mark.parametrize("kind", ["int4", exhaustive("int8"), exhaustive("w8a8")])
def test_decoding_over_a_static_cache_compiles_as_one_graph(kind: str, shape: str) -> None:
    plain, patched = pair(kind, sizes=SHAPES[shape])
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        expected = static_steps(plain, plain)
        assert_close(static_steps(patched, compiled), expected, bound=BOUNDS[kind])
        assert_close(static_steps(patched, patched), expected, bound=BOUNDS[kind])


@pytest.mark.parametrize("kind", [exhaustive("int4"), exhaustive("int8"), "w8a8"])
def test_a_forward_compiles_with_inductor(kind: str) -> None:
    plain, patched = pair(kind, sizes=TILES | {"num_hidden_layers": 1, "attention_bias": True, "mlp_bias": True})
    with torch.inference_mode():
        found = torch.compile(patched, fullgraph=True)(IDS, use_cache=False).logits
    assert_close(found, logits(plain), bound=BOUNDS[kind])


def test_gradients_are_refused_as_by_the_layers_alone() -> None:
    _, patched = pair()
    with (
        pytest.warns(UserWarning, match="gradients are required"),
        pytest.raises(RuntimeError, match="requires grad"),
    ):
        patched(IDS)
