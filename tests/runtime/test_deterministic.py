"""With `deterministic`, a request's logits are bit-identical, whatever else runs and however it is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import LlamaForCausalLM, SamplingParams
from fastllama.layers import packing
from fastllama.layers.linear import PackedLinear
from fastllama.layers.quantized import LINEARS
from fastllama.runtime.device import sampler
from fastllama.runtime.device.runner import StepLogits
from tests.runtime.models import ours, prompt_of, running

PROMPTS = [prompt_of(length) for length in (1, 2, 15, 16, 33, 70)]
PARAMS = [SamplingParams(temperature=0.9, max_tokens=4, seed=i, ignore_eos=True) for i in range(len(PROMPTS))]
BATCHES: dict[str, dict[str, Any]] = {
    "one batch": {},
    "large pages": {"page_size": 64},
    "chunks of a few tokens": {"max_num_seqs": 6, "max_num_batched_tokens": 7},
    "few pages": {"kv_cache_tokens": 112, "max_model_len": 112},
    "few pages, and those of the host": {"kv_cache_tokens": 112, "max_model_len": 112, "host_cache_tokens": 300},
}
Logits = dict[tuple[int, int], Tensor]


def run(
    model: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    *,
    prompts: list[list[int]] = PROMPTS,
    alone: bool = False,
    **options: Any,
) -> Logits:
    """The logits of each sampled token, by the request's seed and the token's position."""
    found: Logits = {}
    start = sampler.start

    def spying(step: StepLogits) -> sampler.PendingTokens:
        for seq, row, _ in step.samples:
            found[seq.request.params.seed or 0, len(seq.token_ids)] = step.logits[row].clone()
        return start(step)

    with monkeypatch.context() as patch, running(model, **options) as llm:
        patch.setattr(sampler, "start", spying)
        if alone:
            for prompt, params in zip(prompts, PARAMS, strict=False):
                llm.generate([prompt], params)
        else:
            llm.generate(prompts, PARAMS[: len(prompts)])
            if "kv_cache_tokens" in options:
                assert llm.engine.scheduler.num_preemptions > 0
            assert (llm.engine.pool.num_host_hit_tokens > 0) == ("host_cache_tokens" in options)
    return found


def build(weights: str) -> LlamaForCausalLM:
    """A model in bf16 or fp32, or in bf16 but for its weights."""
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    model = ours("gqa tied" if weights == "bf12" else "biases", dtype=dtype)
    if weights == "bf12":
        packing.pack(model, progress=False)
    elif weights in LINEARS:
        packing.quantize(model, weights, progress=False)
    assert any(isinstance(module, PackedLinear) for module in model.modules()) == (weights not in ("fp32", "bf16"))
    return model


@pytest.mark.parametrize("weights", ["fp32", "bf16", "bf12", *LINEARS])
def test_on_a_cpu(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(weights)
    alone = run(model, monkeypatch, alone=True, deterministic=True)
    assert len(alone) == 4 * len(PROMPTS)
    for options in BATCHES.values():
        together = run(model, monkeypatch, deterministic=True, **options)
        assert together.keys() == alone.keys()
        assert all(torch.equal(together[place], alone[place]) for place in alone), options


def test_else_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `deterministic` the logits differ, so that this test can fail."""
    model = build("fp32")
    alone, together = run(model, monkeypatch, alone=True), run(model, monkeypatch)
    assert not all(torch.equal(together[place], alone[place]) for place in alone)


@pytest.mark.interpreter
def test_on_triton(monkeypatch: pytest.MonkeyPatch, force: Callable[[str], None]) -> None:
    """More tokens than one matmul kernel takes, by quantized weights and, in the output head, by a weight in bf16."""
    from fastllama.testing.interpreter import repaired

    model, prompts = build("int4"), [prompt_of(33), prompt_of(34)]
    force("triton")
    with repaired():
        alone = run(model, monkeypatch, prompts=prompts, alone=True, deterministic=True)
        together = run(model, monkeypatch, prompts=prompts, deterministic=True)
    assert all(torch.equal(together[place], alone[place]) for place in alone)


def test_what_it_must_be() -> None:
    with (
        pytest.raises(TypeError, match=r"^deterministic must be True or False, got 1$"),
        running(ours(), deterministic=1),
    ):
        pass
