"""Models of random weights: their shapes, their bytes, and that they run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastllama import LLM, LlamaForCausalLM, SamplingParams
from fastllama.bench import models
from fastllama.layers import packing
from fastllama.layers.linear import Linear
from fastllama.layers.quantized import Int4Linear
from tests.cli.models import random_model

CPU = torch.device("cpu")
TINY = models.shape("tiny", 32)
LAYER = 256 * (256 + 2 * 128) + 256 * 256 + 256 * 2 * 768 + 768 * 256 + 2 * 256  # qkv, o, gate and up, down, the norms


@pytest.mark.parametrize(("name", "billions"), [("1.1b", 1.1), ("7b", 6.74), ("13b", 13.02), ("70b", 68.98)])
def test_shapes_have_as_many_parameters_as_their_names_promise(name: str, billions: float) -> None:
    config = models.shape(name, 64)
    assert (config.max_position_embeddings, config.dtype) == (64, "bfloat16")
    assert LlamaForCausalLM(config, torch.bfloat16, "meta").num_parameters / 1e9 == pytest.approx(billions, rel=5e-3)


def test_the_bytes_that_a_step_reads() -> None:
    head = 2048 * 256  # of the packaged model's shape also the embeddings, which are tied
    tied = models.random_model(TINY, "none", torch.bfloat16, CPU)
    assert models.read_bytes(tied) == 2 * (5 * LAYER + 256 + head)
    apart = models.random_model(replace(TINY, tie_word_embeddings=False), "none", torch.bfloat16, CPU)
    assert models.read_bytes(apart) == models.read_bytes(tied)
    assert models.kept_bytes(apart.embed_tokens) == 2 * head
    codes = models.random_model(TINY, "int8", torch.bfloat16, CPU)
    assert models.read_bytes(codes) < 0.6 * models.read_bytes(tied) + head


@pytest.mark.parametrize("kind", ["none", "int4"])
def test_every_layer_is_generated_and_stored_as_it_should_be(kind: str) -> None:
    torch.manual_seed(0)
    model = models.random_model(TINY, kind, torch.float32, CPU)
    assert model.config == TINY
    assert (len(model.layers), model.num_parameters) == (5, 5 * LAYER + 256 + 2048 * 256)
    kinds = {type(layer.mlp.down_proj) for layer in model.layers}
    assert kinds == {Linear if kind == "none" else Int4Linear}
    first, second = (next(layer.mlp.down_proj.parameters(), None) for layer in model.layers[:2])
    if kind == "none":
        assert not torch.equal(first, second)
        assert first.std() == pytest.approx(768**-0.5, rel=0.01)
    with LLM(model, quantization=None, max_model_len=32, kv_cache_tokens=64) as llm:
        (found,) = llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    assert len(found.outputs[0].token_ids) == 8
    assert found.outputs[0].finish_reason == "length"


def test_memory_that_is_missing_is_reported_in_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "available_bytes", lambda device: 3 * 10**9)
    models.check_memory("the weights", 3 * 10**9, CPU)
    with pytest.raises(MemoryError, match=r"^the weights take 3\.5 GB, and 3\.0 GB are free$"):
        models.check_memory("the weights", 3_500_000_000, CPU)
    monkeypatch.setattr(models, "available_bytes", lambda device: 4 * 2 * LAYER - 1)
    with pytest.raises(MemoryError):
        models.random_model(TINY, "none", torch.bfloat16, CPU)


def test_a_model_that_is_given_is_packed_as_llm_does_it() -> None:
    model = random_model()
    packing.apply(model, "int4", progress=False)
    assert type(model.layers[1].self_attn.qkv_proj) is Int4Linear
