"""Quantizing a model that an LLM runs: refused for as long as it does."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from fastllama import LlamaForCausalLM, SamplingParams
from fastllama.layers import packing
from fastllama.layers.quantizing import quantize
from tests.layers.test_loading_packed import assert_same
from tests.runtime.models import ours, prompt_of, running

DOCUMENTS = [prompt_of(20)]
GREEDY = SamplingParams(temperature=0, max_tokens=8)


def check_refused(model: LlamaForCausalLM, method: str) -> None:
    """Assert that a model is refused since it is run, and that it stays as it was."""
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"^model is run by an LLM, whose weights would change under it; legal: one "):
        quantize(model, "int4", method, documents=DOCUMENTS, progress=False)
    assert_same(model, before)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_model_is_refused_for_as_long_as_any_llm_runs_it(method: str) -> None:
    model = ours(dtype=torch.float32)
    with running(model, quantization=None) as llm:
        with running(model, quantization=None) as another:
            check_refused(model, method)
        del another
        gc.collect()
        check_refused(model, method)
        assert llm.generate(prompt_of(5), GREEDY)
    del llm
    gc.collect()
    quantize(model, "int4", method, documents=DOCUMENTS, progress=False)
    assert packing.kind_of(model) == "int4"


def test_a_copy_of_a_model_that_an_llm_runs_is_run_by_none() -> None:
    """The copy may be quantized, while the LLM goes on with the same weights."""
    model = ours(dtype=torch.float32)
    with running(model, quantization=None) as llm:
        expected = llm.generate(prompt_of(5), GREEDY)[0].outputs[0].token_ids
        copied = copy.deepcopy(model)
        quantize(copied, documents=DOCUMENTS, progress=False)
        assert packing.kind_of(copied) == "int4"
        check_refused(model, "gptq")
        assert llm.generate(prompt_of(5), GREEDY)[0].outputs[0].token_ids == expected
