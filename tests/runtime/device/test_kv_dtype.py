"""An 8-bit KV cache gives nearly the logits of a full one, and everything else unchanged."""

from __future__ import annotations

import pytest
import torch

from fastllama import LLM, SamplingParams
from fastllama.layers.batch import KVCache
from tests.runtime.models import ours, prompt_of, running

PROMPTS = [prompt_of(length) for length in (1, 15, 16, 33, 70)]
KINDS = [("int8", torch.int8), ("fp8", torch.float8_e4m3fn)]


def logprobs(llm: LLM, prompt: list[int]) -> torch.Tensor:
    """Log-probabilities of each token of a prompt except the first."""
    (output,) = llm.generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert output.prompt_logprobs is not None
    return torch.tensor([each.logprob for each in output.prompt_logprobs[1:] if each is not None])


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_logits_are_nearly_those_of_full_pages(kind: str, dtype: torch.dtype) -> None:
    """Not 0, which pages that are never read would give. int8 rounds finer than fp8, to 8 bits in place of 4."""
    model = ours("mha", dtype=torch.float32)
    prompt = prompt_of(200)
    with running(model) as llm:
        exact = logprobs(llm, prompt)
    with running(model, kv_cache_dtype=kind) as llm:
        found = logprobs(llm, prompt)
        for layer in llm.engine._runner.kv.layers:
            assert {pages.dtype for pages in (layer.k_pages, layer.v_pages)} == {dtype}
    error = (found - exact).abs()
    assert error.max() > 1e-3
    assert error.median() < {"int8": 0.05, "fp8": 0.2}[kind]


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_seqs": 5, "max_num_batched_tokens": 7},
        {"kv_cache_tokens": 112},
        {"kv_cache_tokens": 112, "host_cache_tokens": 300},
    ],
)
def test_a_request_gets_the_same_tokens_in_any_batch(kind: str, dtype: torch.dtype, options: dict[str, int]) -> None:
    """Through copies of shared pages, chunks and preemption: fp64 rounds too finely to change a quantized value."""
    params = SamplingParams(temperature=2.0, n=2, seed=3, max_tokens=12)
    sizes = {"max_model_len": 112} if "kv_cache_tokens" in options else {}
    with running(ours(), kv_cache_dtype=kind) as llm:
        alone = [llm.generate(prompt, params)[0].outputs for prompt in PROMPTS]
    with running(ours(), kv_cache_dtype=kind, **options, **sizes) as llm:
        together = [output.outputs for output in llm.generate(PROMPTS, params)]
        assert (llm.engine.scheduler.num_preemptions > 0) == bool(sizes)
        assert (llm.engine.pool.num_host_hit_tokens > 0) == ("host_cache_tokens" in options)
    assert [[each.token_ids for each in outputs] for outputs in together] == [
        [each.token_ids for each in outputs] for outputs in alone
    ]


def test_the_cache_takes_half_the_memory() -> None:
    config = ours(dtype=torch.bfloat16).config
    full, half = (KVCache.bytes_per_token(config, dtype) for dtype in (torch.bfloat16, torch.int8))
    assert half == full // 2 + 2 * config.num_hidden_layers * config.num_key_value_heads * 4


def test_another_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^kv_cache_dtype is 'int4' \(did you mean 'int8'\?\); legal values: 'auto', 'int8', 'fp8'$"
    ):
        LLM(ours(), kv_cache_dtype="int4")
