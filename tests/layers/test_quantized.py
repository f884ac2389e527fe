"""A model in 4 or 8 bits: which layers are quantized, and that it computes with the dequantized weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastllama import LlamaConfig, LlamaForCausalLM, SamplingParams
from fastllama.layers import packing
from fastllama.layers.linear import Bf12Linear, Linear
from fastllama.layers.loading import load_weights
from fastllama.layers.quantized import LINEARS, QuantizedLinear
from fastllama.layers.weights import hf_tensors
from fastllama.runtime.llm import LLM

# Groups of 128, of 64 and of 32 columns.
SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "head_dim": 32}

STEPS = {
    "int4": 8,
    "int8": 254,
    "w8a8": 254,
}  # quantization steps in the largest magnitude: rounding moves a weight by half a step at most
kinds = pytest.mark.parametrize("kind", LINEARS)


def model(tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = LlamaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, eos_token_ids=()
    )
    built = LlamaForCausalLM(config, dtype)
    torch.manual_seed(1)
    for parameter in built.parameters():
        parameter.data.normal_(0, 0.2 if parameter.dim() == 2 else 1)
    return built


def logprobs(built: LlamaForCausalLM) -> list[Tensor]:
    """Of 20 greedy tokens: the tokens, and the largest log-probabilities at each."""
    params = SamplingParams(temperature=0, max_tokens=20, logprobs=5)
    with LLM(built, quantization=None, max_model_len=64, kv_cache_tokens=64, progress=False) as llm:
        (output,) = llm.generate([5, 3, 9], params)[0].outputs
    assert output.logprobs is not None
    return [torch.tensor(output.token_ids), torch.tensor([[p for _, p in each.top] for each in output.logprobs])]


@kinds
@pytest.mark.parametrize("tied", [False, True])
def test_every_linear_layer_but_the_head_is_quantized(tied: bool, kind: str) -> None:
    rounded = model(tied)
    before, count = {name: tensor.clone() for name, tensor in hf_tensors(rounded)}, rounded.num_parameters
    packing.quantize(rounded, kind, progress=False)
    layers = {
        name: type(module) for name, module in rounded.named_modules() if isinstance(module, (Linear, QuantizedLinear))
    }
    assert layers.pop("lm_head") is Linear
    assert [*layers.values()] == [LINEARS[kind]] * 8
    assert rounded.num_parameters == count
    for name, tensor in hf_tensors(rounded):
        if "proj" in name:
            step = before[name].abs().max() / STEPS[kind]
            assert 0 < (tensor - before[name]).abs().max() <= 1.01 * step, name
        else:
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_it_computes_with_the_dequantized_weights(kind: str) -> None:
    rounded, plain = model(), model()
    packing.quantize(rounded, kind, progress=False)
    load_weights(plain, [(name, tensor.clone()) for name, tensor in hf_tensors(rounded)])
    (tokens, probabilities), (expected, exact) = logprobs(rounded), logprobs(plain)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(probabilities, exact, rtol=1e-4, atol=1e-4)


@kinds
def test_the_llm_quantizes_and_reports_its_kind(kind: str) -> None:
    with LLM(model(), quantization=kind, max_model_len=64, kv_cache_tokens=64, progress=False) as llm:
        assert llm.quantization == kind
        assert any(type(module) is LINEARS[kind] for module in llm.engine.model.modules())


@kinds
@pytest.mark.parametrize("pays", [False, True])
def test_the_head_is_packed_where_that_pays(pays: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large model, a fifth of the bytes that a token reads."""
    monkeypatch.setattr(packing, "pays", lambda *_: pays)
    rounded = model(dtype=torch.bfloat16)
    head = rounded.lm_head.weight.clone()
    packing.quantize(rounded, kind, progress=False)
    assert type(rounded.lm_head) is (Bf12Linear if pays else Linear)
    assert torch.equal(rounded.lm_head.weight, head)


def test_an_llm_that_is_not_asked_does_not_round() -> None:
    with LLM(model(), max_model_len=64, kv_cache_tokens=64, progress=False) as llm:
        assert llm.quantization is None


@pytest.mark.parametrize(("kind", "cost"), [("int4", 0.3), ("int8", 0.005), ("w8a8", 0.02)])
def test_the_bundled_model_still_tells_a_story(kind: str, cost: float) -> None:
    """Quantized it predicts nearly as well: the loss of its own story grows little."""
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    with LLM("tiny", dtype="float32", quantization=None, kv_cache_tokens=256, progress=False) as llm:
        prompt = "Once upon a time"
        story = llm.generate(prompt, params)[0]
        ids = [*story.prompt_token_ids, *story.outputs[0].token_ids]
        scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        exact = llm.generate(ids, scored)[0].prompt_logprobs
    with LLM("tiny", dtype="float32", quantization=kind, kv_cache_tokens=256, progress=False) as llm:
        rounded = llm.generate(ids, scored)[0].prompt_logprobs
    assert exact is not None
    assert rounded is not None
    means = [sum(each.logprob for each in found if each is not None) / (len(ids) - 1) for found in (exact, rounded)]
    assert 0 < abs(means[1] - means[0]) < cost
