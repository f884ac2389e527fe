"""A model in 4 bits: what is rounded and what is not, and the numbers that its codes stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastllama import LlamaConfig, LlamaForCausalLM, SamplingParams
from fastllama.layers import packing
from fastllama.layers.linear import Int4Linear, Linear
from fastllama.layers.weights import hf_tensors, load_weights
from fastllama.runtime.llm import LLM

# Groups of 128, of 64 and of 32 columns.
SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "head_dim": 32}


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


@pytest.mark.parametrize("tied", [False, True])
def test_every_product_but_the_head_is_rounded(tied: bool) -> None:
    rounded = model(tied)
    before, count = {name: tensor.clone() for name, tensor in hf_tensors(rounded)}, rounded.num_parameters
    packing.quantize(rounded, progress=False)
    kinds = {name: type(module) for name, module in rounded.named_modules() if isinstance(module, (Linear, Int4Linear))}
    assert {name for name, kind in kinds.items() if kind is Linear} == {"lm_head"}
    assert len(kinds) == 9
    assert rounded.num_parameters == count
    for name, tensor in hf_tensors(rounded):
        if "proj" in name:
            step = before[name].abs().max() / 8
            assert 0 < (tensor - before[name]).abs().max() <= 1.01 * step, name
        else:
            assert torch.equal(tensor, before[name]), name


def test_it_computes_with_the_weights_that_its_codes_stand_for() -> None:
    rounded, plain = model(), model()
    packing.quantize(rounded, progress=False)
    load_weights(plain, [(name, tensor.clone()) for name, tensor in hf_tensors(rounded)])
    (tokens, probabilities), (expected, exact) = logprobs(rounded), logprobs(plain)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(probabilities, exact, rtol=1e-4, atol=1e-4)


def test_the_llm_rounds_and_says_so() -> None:
    with LLM(model(), quantization="int4", max_model_len=64, kv_cache_tokens=64, progress=False) as llm:
        assert llm.quantization == "int4"
        assert any(isinstance(module, Int4Linear) for module in llm.engine.model.modules())
    with LLM(model(), max_model_len=64, kv_cache_tokens=64, progress=False) as llm:
        assert llm.quantization is None


def test_the_bundled_model_still_tells_a_story() -> None:
    """Rounded to 4 bits it knows nearly as well what comes next: its own story costs it little more."""
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    with LLM("tiny", dtype="float32", quantization=None, kv_cache_tokens=256, progress=False) as llm:
        prompt = "Once upon a time"
        story = llm.generate(prompt, params)[0]
        ids = [*story.prompt_token_ids, *story.outputs[0].token_ids]
        scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        exact = llm.generate(ids, scored)[0].prompt_logprobs
    with LLM("tiny", dtype="float32", quantization="int4", kv_cache_tokens=256, progress=False) as llm:
        rounded = llm.generate(ids, scored)[0].prompt_logprobs
    assert exact is not None
    assert rounded is not None
    means = [sum(each.logprob for each in found if each is not None) / (len(ids) - 1) for found in (exact, rounded)]
    assert means[0] - 0.3 < means[1] < means[0]
