"""A packed model: fewer bytes, the same numbers, and weights that can still be read."""

from __future__ import annotations

import weakref

import pytest
import torch

from fastllama import LlamaConfig, LlamaForCausalLM, SamplingParams, kernels
from fastllama.layers import packing, quantization
from fastllama.layers.linear import Bf12Linear, Linear, LinearBase, PackedLinear
from fastllama.layers.quantized import LINEARS
from fastllama.layers.weights import hf_tensors
from fastllama.runtime.llm import LLM

SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}


def model(tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """A model whose down projections have 96 columns, not a multiple of 64."""
    config = LlamaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, eos_token_ids=()
    )
    built = LlamaForCausalLM(config, dtype)
    torch.manual_seed(1)
    for parameter in built.parameters():
        parameter.data.normal_(0, 0.2 if parameter.dim() == 2 else 1)
    return built


def generated(llm: LLM) -> tuple[int, ...]:
    params = SamplingParams(temperature=0, max_tokens=20)
    return llm.generate([5, 3, 9], params)[0].outputs[0].token_ids


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_packed_and_what_is_not(tied: bool) -> None:
    packed = model(tied)
    before = {name: tensor.clone() for name, tensor in hf_tensors(packed)}
    count = packed.num_parameters
    packing.pack(packed, progress=False)
    kinds = {name: type(module) for name, module in packed.named_modules() if isinstance(module, (Linear, Bf12Linear))}
    for name, kind in kinds.items():
        stays = name.endswith("down_proj") or (tied and name == "lm_head")
        assert kind is (Linear if stays else Bf12Linear), name
    assert packed.num_parameters == count
    after = dict(hf_tensors(packed))
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert tied == (packed.lm_head.weight is packed.embed_tokens.weight)


def test_each_weight_is_freed_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 7B in 16 bits and packed would take 24 GB together."""
    large = model()
    weights = [weakref.ref(module.weight) for module in large.modules() if isinstance(module, Linear)]
    pack, alive = kernels.pack_bf12, []

    def counting(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        alive.append(sum(ref() is not None for ref in weights))
        return pack(weight)

    monkeypatch.setattr(kernels, "pack_bf12", counting)
    packing.pack(large, progress=False)
    assert alive == list(range(len(weights), len(weights) - len(alive), -1))


def test_weights_without_a_common_scale_stay() -> None:
    wild = model()
    wild.layers[0].self_attn.o_proj.weight.data.copy_(torch.rand(64, 64).sub(0.5).mul(200).exp2())
    packing.pack(wild, progress=False)
    assert isinstance(wild.layers[0].self_attn.o_proj, Linear)
    assert isinstance(wild.layers[1].self_attn.o_proj, Bf12Linear)


def test_the_runtime_generates_the_same() -> None:
    with LLM(model(), max_model_len=64, kv_cache_tokens=64) as llm:
        expected = generated(llm)
        assert isinstance(llm.engine.model.lm_head, Linear)
    with LLM(model(), max_model_len=64, kv_cache_tokens=64, quantization="bf12", progress=False) as llm:
        assert generated(llm) == expected
        assert isinstance(llm.engine.model.lm_head, Bf12Linear)


def test_auto_packs_what_pays_and_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not packing.pays(model())  # its weights fit into the CPU's caches
    monkeypatch.setattr(packing, "CACHED", 0)
    monkeypatch.setattr(packing, "runs_natively", lambda dtype: False)
    assert packing.pays(model())
    assert not packing.pays(model(dtype=torch.float32))
    monkeypatch.setattr(packing, "runs_natively", lambda dtype: True)
    assert not packing.pays(model())
    monkeypatch.setattr(packing, "runs_natively", lambda dtype: False)
    for chosen, kind in (("auto", Bf12Linear), (None, Linear)):
        with LLM("tiny", dtype="bfloat16", quantization=chosen, kv_cache_tokens=64, progress=False) as llm:
            assert type(llm.engine.model.layers[0].mlp.gate_up_proj) is kind
    with LLM(model(), max_model_len=64, kv_cache_tokens=64) as llm:
        assert isinstance(llm.engine.model.lm_head, Linear)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "bf13"}, "quantization is 'bf13'.*bf12"),
        (
            {"quantization": "bf12", "dtype": "float32"},
            "quantization is 'bf12' for torch.float32 on cpu; legal",
        ),
    ],
)
def test_what_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM("tiny", **options)


@pytest.mark.parametrize("kind", quantization.KINDS)
def test_each_kind_by_name_is_one_that_packs(kind: str) -> None:
    packed = model()
    packing.apply(packed, kind, progress=False)
    assert isinstance(packed.layers[0].mlp.gate_up_proj, PackedLinear)
    assert set(quantization.KINDS) == {"bf12", *LINEARS}
    assert quantization.quantization_of(kind) == kind


def test_none_keeps_the_weights() -> None:
    kept = model()
    packing.apply(kept, quantization.quantization_of("none"), progress=False)
    assert all(type(module) is Linear for module in kept.modules() if isinstance(module, LinearBase))
