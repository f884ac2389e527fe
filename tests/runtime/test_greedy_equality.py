"""Greedy tokens equal transformers' `generate`: for every shape, alone and in any batch, and up to the same EOS.

Its own continuous batching, `generate_batch`, is the reference where more requests come than run at once.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastllama
from fastllama import SamplingParams
from tests.runtime.models import SHAPES, VOCAB, ours, prompt_of, running, theirs

NEW_TOKENS = 20
PROMPTS = [prompt_of(length) for length in (1, 3, 15, 16, 17, 60)]
BATCHES: dict[str, dict[str, Any]] = {
    "one batch": {},
    "large pages": {"page_size": 64},
    "chunks of a few tokens": {"max_num_seqs": 6, "max_num_batched_tokens": 7},
    "few seats": {"max_num_seqs": 2},
    "few pages": {"kv_cache_tokens": 112, "max_model_len": 112},
    "few pages, and those of the host": {"kv_cache_tokens": 112, "max_model_len": 112, "host_cache_tokens": 300},
}
BUNDLED = Path(fastllama.__file__).parent / "assets" / "tiny"


def generate(model: transformers.LlamaForCausalLM, prompt: list[int], **options: Any) -> tuple[list[int], float]:
    """transformers' greedy tokens, and the smallest distance between the likeliest token's logit and the next's."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": NEW_TOKENS, "output_logits": True, "return_dict_in_generate": True} | options
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **options)
    best = torch.cat(found.logits).topk(2).values
    return found.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).min().item()


@functools.cache
def expected(shape: str) -> list[list[int]]:
    """transformers' tokens for each prompt."""
    tokens, margins = zip(*(generate(theirs(shape), prompt) for prompt in PROMPTS), strict=True)
    assert min(margins) > 2e-4, "a near tie: rounding could decide it"
    assert len({tuple(found) for found in tokens}) == len(PROMPTS), "the prompts are all alike to this model"
    return list(tokens)


def greedy(**params: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0, "max_tokens": NEW_TOKENS} | params))


@pytest.mark.parametrize("shape", SHAPES)
def test_alone(shape: str) -> None:
    with running(ours(shape, dtype=torch.float32)) as llm:
        found = [list(llm.generate(prompt, greedy())[0].outputs[0].token_ids) for prompt in PROMPTS]
    assert found == expected(shape)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_in_a_batch(shape: str, batch: str) -> None:
    with running(ours(shape, dtype=torch.float32), **BATCHES[batch]) as llm:
        outputs = llm.generate(PROMPTS, greedy())
        assert (llm.engine.scheduler.num_preemptions > 0) == ("few pages" in batch)
        assert (llm.engine.pool.num_host_hit_tokens > 0) == ("host" in batch)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected(shape)
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}


@pytest.mark.skipif(
    not hasattr(transformers, "ContinuousBatchingConfig"), reason="transformers has no configurable generate_batch"
)
@pytest.mark.parametrize("shape", ["mha", "gqa tied"])
def test_many_requests_as_by_their_continuous_batching(shape: str) -> None:
    """Both run with few seats, few pages and chunked prompts."""
    prompts = [prompt_of(length, seed=7) for length in (3, 70, 16, 41, 1, 90, 33, 7, 64, 22, 15, 50)]
    model = theirs(shape)
    for prompt in prompts:
        assert generate(model, prompt)[1] > 1e-4, "a near tie: rounding could decide it"
    found = model.generate_batch(
        inputs=prompts,
        generation_config=transformers.GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=VOCAB, pad_token_id=0
        ),
        # By default it takes most of the memory for its pages, of 256 tokens, and a minute to touch them.
        continuous_batching_config=transformers.ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=24),
    )
    reference = {tuple(output.prompt_ids): tuple(output.generated_tokens) for output in found.values()}
    sizes = {"kv_cache_tokens": 176, "max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 24}
    with running(ours(shape, dtype=torch.float32), **sizes) as llm:
        outputs = llm.generate(prompts, greedy())
        assert llm.engine.scheduler.num_preemptions > 0
    assert {output.prompt_token_ids: output.outputs[0].token_ids for output in outputs} == reference


@pytest.mark.parametrize("count", [1, 2])
def test_the_same_end_at_eos(count: int) -> None:
    shape, prompt = "gqa tied", PROMPTS[-1]
    tokens = expected(shape)[-1]
    eos = tuple(dict.fromkeys(tokens[5 : 5 + count]))
    reference, _ = generate(theirs(shape), prompt, eos_token_id=list(eos))
    assert len(reference) < NEW_TOKENS
    with running(ours(shape, dtype=torch.float32, eos=eos)) as llm:
        ended, ignored = (llm.generate(prompt, greedy(ignore_eos=ignore))[0].outputs[0] for ignore in (False, True))
    assert (list(ended.token_ids), ended.finish_reason, ended.stop_reason) == (reference, "stop", None)
    assert (list(ignored.token_ids), ignored.finish_reason) == (tokens, "length")


@pytest.mark.skipif(not (BUNDLED / "model.safetensors").is_file(), reason="the bundled model's weights are not here")
def test_the_bundled_model() -> None:
    reference = transformers.LlamaForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    texts = ["Once upon a time", "", 'Tom and Mia went to the lake. "Look," said Tom, "a boat!"', "The old"]
    with fastllama.LLM("tiny", dtype="float32", device="cpu", kv_cache_tokens=1024, progress=False) as llm:
        outputs = llm.generate(texts, greedy(max_tokens=32))
    for output in outputs:
        tokens, margin = generate(reference, list(output.prompt_token_ids), max_new_tokens=32, eos_token_id=2)
        assert margin > 1e-4, "a near tie: rounding could decide it"
        assert list(output.outputs[0].token_ids) == tokens
