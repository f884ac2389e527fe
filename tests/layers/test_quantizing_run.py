"""Quantizing a model: resuming an interrupted run, memory, and progress."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastllama.layers import quantizing
from fastllama.layers.config import LlamaConfig
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.quantized import LINEARS as KINDS
from fastllama.layers.quantizing import quantize
from fastllama.layers.rescaling import LINEARS
from fastllama.quant.activations import Activations
from tests.layers.test_loading_packed import assert_same
from tests.layers.test_quantizing import DOCUMENTS, GQA, RECIPES, SHAPES, Kept, quantized, random_model
from tests.quant.memory import MemoryWatch
from tests.rounds import exhaustive


@pytest.mark.parametrize(
    ("method", "scheme"), [("rtn", "int8"), ("hqq", "int4"), ("awq+gptq", "int4"), ("smoothquant+gptq", "w8a8")]
)
@pytest.mark.parametrize("config", [SHAPES["biases"], exhaustive(SHAPES["tied"])])
def test_what_is_finished_is_taken_and_the_rest_computed(method: str, scheme: str, config: LlamaConfig) -> None:
    """Bit-identical, whichever blocks are lost."""
    config = replace(config, num_hidden_layers=3)
    expected, kept = quantized(method, scheme, config, torch.bfloat16), Kept()
    assert_same(quantized(method, scheme, config, torch.bfloat16, finished=kept), expected)
    keys = [*kept]
    assert len(keys) == 3
    for lost in ((), (0,), (1, 2)):
        left = Kept({key: kept[key] for number, key in enumerate(keys) if number not in lost})
        assert_same(quantized(method, scheme, config, torch.bfloat16, finished=left), expected)
        assert left.keys() == kept.keys()


def test_finished_blocks_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept()
    expected = quantized("awq+gptq", "int4", finished=kept)
    monkeypatch.setattr(quantizing, "gptq", None)
    assert_same(quantized("awq+gptq", "int4", finished=kept), expected)


def test_what_is_kept_is_no_memory_of_the_model() -> None:
    """A mapped file may be deleted, and the model's weights may be updated."""
    kept = Kept()
    quantized("hqq", "int4", finished=kept)
    model = quantized("hqq", "int4", finished=kept)
    held = {tensor.untyped_storage().data_ptr() for tensors in kept.values() for tensor in tensors.values()}
    assert not held & {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}


def test_what_was_interrupted_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block that was being quantized is as it was."""
    kept, model, gptq, calls = Kept(), random_model(), quantizing.gptq, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return gptq(*args)

    monkeypatch.setattr(quantizing, "gptq", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, documents=DOCUMENTS, finished=kept, progress=False)
    assert len(kept) == 1
    assert type(model.layers[0].mlp.down_proj) is KINDS["int4"]
    before = random_model()
    for name, tensor in before.layers[1].named_parameters():
        assert torch.equal(model.layers[1].get_parameter(name), tensor)
    assert_same(quantized("gptq", "int4", finished=kept), quantized("gptq", "int4"))
    assert len(calls) == 7 + 4 + 8


def changed_weight(model: LlamaForCausalLM, path: str) -> LlamaForCausalLM:
    model.get_parameter(path).data.view(-1)[0] += 0.5
    return model


def test_other_arguments_texts_and_weights_have_other_keys() -> None:
    """And blocks before a weight that changed the same; a head, and a text that is not read, count for nothing."""
    kept, options = Kept(), {"documents": DOCUMENTS, "finished": (seen := Kept()), "progress": False}
    for method, scheme in RECIPES:
        quantized(method, scheme, finished=kept)
    for other in (
        {"documents": [*DOCUMENTS[:-1], [*DOCUMENTS[-1][:-1], 0]]},
        {"documents": [*DOCUMENTS[:-2], [*DOCUMENTS[-2], *DOCUMENTS[-1]]]},
        {"group_size": 32},
        {"dtype": torch.bfloat16},
        {"config": replace(GQA, rope_theta=5e5)},
        {"config": replace(GQA, rms_norm_eps=1e-3)},
    ):
        quantized("gptq", "int4", finished=kept, **other)
    assert len(kept) == 2 * (len(RECIPES) + 6)
    quantize(random_model(), **options)
    quantize(changed_weight(random_model(), "lm_head.weight"), **options)
    quantize(changed_weight(random_model(), "norm.weight"), **options)
    assert len(seen) == 2
    quantize(changed_weight(random_model(), "layers.1.mlp.down_proj.weight"), **options)
    assert len(seen) == 3
    for path in ("layers.0.input_layernorm.weight", "layers.0.self_attn.o_proj.weight", "embed_tokens.weight"):
        before = len(seen)
        quantize(changed_weight(random_model(), path), **options)
        assert len(seen) == before + 2, path
    before = len(seen)
    for documents in (DOCUMENTS, ()):
        quantize(random_model(), "int4", "rtn", **(options | {"documents": documents}))
        quantize(changed_weight(random_model(), "embed_tokens.weight"), "int4", "rtn", **options)
    assert len(seen) == before + 2


def test_only_gptq_takes_hessians_and_none_outlives_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Activations]] = []
    most, hessians = 0, set()

    class Counted(Activations):
        def __init__(self, *args: Any, hessian: bool) -> None:
            nonlocal most
            super().__init__(*args, hessian=hessian)
            hessians.add(hessian)
            alive.append(weakref.ref(self))
            most = max(most, sum(ref() is not None for ref in alive))

    monkeypatch.setattr(quantizing, "Activations", Counted)
    for method, scheme in RECIPES:
        alive.clear()
        hessians.clear()
        quantized(method, scheme)
        assert len(alive) == (0 if method in ("rtn", "hqq") else 2 * len(LINEARS))
        assert hessians == ({"gptq" in method} if alive else set())
    assert most == len(LINEARS)


@pytest.mark.parametrize(("method", "scheme"), [("rtn", "int8"), ("hqq", "int4"), ("awq+gptq", "int4")])
def test_memory_does_not_grow_with_the_number_of_blocks(method: str, scheme: str) -> None:
    """Except by the packed blocks: the model's own blocks are freed as they are replaced."""
    most, held, config = [], [], replace(GQA, hidden_size=128, intermediate_size=128)
    for count in (2, 4):
        model = random_model(replace(config, num_hidden_layers=count), torch.bfloat16)
        dense = sum(parameter.nbytes for parameter in model.layers[0].parameters())
        with MemoryWatch() as watch:
            quantize(model, scheme, method, documents=DOCUMENTS, progress=False)
        most.append(watch.most)
        held.append(watch.held)
    assert 0.25 * 2 * dense < held[1] - held[0] < 0.6 * 2 * dense
    assert most[1] - most[0] < 1.02 * (held[1] - held[0])


def test_memory_of_gptq_is_one_block_in_fp32_its_hessians_and_two_more_of_the_largest() -> None:
    """And two copies of the largest weight, which also bound the kernels' inputs and all that is smaller."""
    config = replace(GQA, intermediate_size=512)
    model = random_model(config, torch.bfloat16)
    numbers = sum(parameter.numel() for parameter in model.layers[0].parameters())
    columns = [model.layers[0].get_submodule(name).weight.shape[1] for name in LINEARS]
    largest = max(model.layers[0].get_submodule(name).weight.numel() for name in LINEARS)
    with MemoryWatch() as watch:
        quantize(model, documents=DOCUMENTS, progress=False)
    hessians = sum(each**2 for each in columns) + 2 * max(columns) ** 2
    assert 4 * hessians < watch.most < 1.05 * 4 * (numbers + hessians + 2 * largest)


def test_progress_counts_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers, though those of a finished block are counted at once."""
    shown: list[tuple[Any, ...]] = []

    class Bar:
        def __init__(self, title: str, wanted: bool | None, total: int, unit: str) -> None:
            self.total, self.count = total, 0
            shown.append((title, wanted, unit))

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *trouble: object) -> None:
            shown.append((self.count, self.total))

        def update(self, count: int = 1) -> None:
            self.count += count

    monkeypatch.setattr(quantizing, "progress_bar", Bar)
    kept = Kept()
    for wanted in (True, None):
        quantized("gptq", "int4", progress=wanted, finished=kept)
        assert shown == [("Quantizing", wanted, "layer"), (8, 8)]
        shown.clear()
