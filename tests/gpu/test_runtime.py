"""The runtime on the device: its graphs give what the modules give, and a step synchronises once."""

from __future__ import annotations

import copy
import gc
import logging
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import LLM, LlamaConfig, LlamaForCausalLM, SamplingParams
from fastllama.bench.models import random_model
from fastllama.layers.batch import KVCache
from fastllama.layers.block import LlamaMLP
from fastllama.runtime.device import execution, sampler
from fastllama.runtime.device.buffers import Buffers
from fastllama.runtime.device.host_cache import HostCache
from fastllama.runtime.device.runner import Runner
from fastllama.runtime.device.sampler import StepLogits
from fastllama.runtime.drafting.speculation import Pace
from fastllama.runtime.planning.step import Step

pytestmark = pytest.mark.gpu

PROMPTS = [[5, 3, 8], list(range(20)), [7] * 300, [11] * 64, [2]]
STEPS = 8 + 6 * (len(PROMPTS) - 1)  # until the longest of `generate`'s answers has ended: the first is the prompts'
CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=1024,
    intermediate_size=2048,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=2048,
    eos_token_ids=(),
)


@pytest.fixture
def model(kind: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return random_model(CONFIG, kind, torch.bfloat16, torch.device("cuda", 0))


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The logits of every call of the sampler."""
    found, start = [], sampler.start

    def spying(step: StepLogits) -> sampler.PendingTokens:
        found.append(step.logits.clone())
        return start(step)

    monkeypatch.setattr(sampler, "start", spying)
    return found


PENALTIES = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": {7: 3.0, 11: float("-inf")}}


def generate(model: LlamaForCausalLM, *, penalized: bool = False, **options: Any) -> list[tuple[int, ...]]:
    """Answers to requests that end one after another; penalized: every second request has penalties."""
    more: list[dict[str, Any]] = [{}, PENALTIES if penalized else {}]
    params = [SamplingParams(temperature=0.8, seed=i, max_tokens=8 + 6 * i, **more[i % 2]) for i in range(len(PROMPTS))]
    with LLM(model, kv_cache_tokens=4096, max_model_len=1024, progress=False, **options) as llm:
        return [each.outputs[0].token_ids for each in llm.generate(PROMPTS, params)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", ["none", "int4", "int8", "w8a8"])
def test_graphs_give_what_the_modules_give(model: LlamaForCausalLM, logits: list[Tensor], deterministic: bool) -> None:
    """Bit for bit: padding rows change nothing."""
    replayed = generate(model, deterministic=deterministic)
    of_graphs = logits[-STEPS:]
    handle = model.layers[0].register_forward_hook(lambda *args: None)
    written = generate(model, deterministic=deterministic)
    handle.remove()
    of_modules = logits[-len(of_graphs) :]
    assert replayed == written
    for ours, theirs in zip(of_graphs, of_modules, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["none"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_pages_come_back_from_the_host_as_they_were(model: LlamaForCausalLM, kv_cache_dtype: str) -> None:
    """Preempted requests give the tokens that they give without preemption."""
    sizes: dict[str, Any] = {"max_model_len": 384, "deterministic": True, "progress": False}
    prompts = [[seed] * length for seed, length in enumerate((60, 130, 190, 100, 70, 220))]
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=100)
    found = []
    for kv_cache_tokens, host_cache_tokens in ((4096, 0), (512, 4096)):
        tokens = {"kv_cache_tokens": kv_cache_tokens, "host_cache_tokens": host_cache_tokens}
        with LLM(model, kv_cache_dtype=kv_cache_dtype, **tokens, **sizes) as llm:
            found.append([each.outputs[0].token_ids for each in llm.generate(prompts, params)])
            assert (llm.engine.pool.num_host_hit_tokens > 0) == (host_cache_tokens > 0)
    assert found[0] == found[1]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes decode steps raise where a launch synchronises or allocates; counts the steps.

    A launch is all that the engine does for a step, from the batch on the host to the copy of its tokens back.
    Penalties may allocate: a token that has become known is sent to their tables, besides the step's batch.
    """
    steps, compute = [0], execution._compute

    def strictly(runner: Runner, before: Any, step: Step) -> Any:
        if step.num_decodes < len(step.chunks):
            return compute(runner, before, step)
        held = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = compute(runner, before, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if not any(chunk.seq.request.params.adjusts for chunk in step.chunks):
            assert torch.cuda.memory_stats()["allocation.all.allocated"] == held
        steps[0] += 1
        return found

    monkeypatch.setattr(execution, "_compute", strictly)
    return steps


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # "a prototype feature", warns its first use
@pytest.mark.parametrize("penalized", [False, True])
@pytest.mark.parametrize("kind", ["none"])
def test_a_replayed_step_waits_for_nothing(
    model: LlamaForCausalLM, penalized: bool, replays: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Steps of the same sequences, and steps after one has ended, which take another graph and other rows' ids.

    An error in a step that runs ahead is logged and the step run again, so the test counts replayed steps.
    """
    generate(model, penalized=penalized)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert replays[0] == STEPS - 1  # the prompts' step is not replayed


@pytest.mark.parametrize("kind", ["none"])
@pytest.mark.parametrize("penalized", [False, True])
@pytest.mark.parametrize("switch", ["FASTLLAMA_AHEAD", "FASTLLAMA_GRAPHS"])
def test_a_switch_changes_no_answer(
    model: LlamaForCausalLM, switch: str, penalized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens go from step to step on the device, within a batch and from batch to batch, or through the host."""
    expected = generate(model, penalized=penalized, deterministic=True)
    monkeypatch.setenv(switch, "0")
    assert generate(model, penalized=penalized, deterministic=True) == expected


@pytest.mark.parametrize("kind", ["none"])
def test_after_a_capture_that_fails_all_goes_on(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its requests get their tokens, torch its memory and its random numbers, and the next LLM its graphs."""
    expected, forward, stream = generate(model), LlamaMLP.forward, torch.cuda.current_stream()
    failed = []

    def waiting(mlp: LlamaMLP, hidden: Tensor, *args: Any) -> Tensor:
        if hidden.shape[0] == 4 and torch.cuda.is_current_stream_capturing():
            failed.append(torch.empty(1 << 26, dtype=torch.uint8, device="cuda").shape)  # 64 MiB of the graphs' pool
            torch.cuda.synchronize()  # not allowed in a capture
        return forward(mlp, hidden, *args)

    torch.cuda.empty_cache()
    with monkeypatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", waiting)
        assert generate(model) == expected
    (warning,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert "could not be captured" in warning.getMessage()
    assert len(failed) == 1
    assert torch.cuda.current_stream() == stream
    assert torch.randn(3, device="cuda").isfinite().all()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() < 1 << 26
    assert generate(model) == expected
    assert len(caplog.records) == 1


@pytest.mark.parametrize("kind", ["none"])
def test_another_thread_may_use_the_device_while_a_step_is_captured(
    model: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    """The other thread allocates, synchronises and frees all the time."""
    ended = threading.Event()

    def work() -> None:
        stream = torch.cuda.Stream()
        while not ended.is_set():
            with torch.cuda.stream(stream):
                torch.empty(1 << 24, dtype=torch.uint8, device="cuda").fill_(1)
                torch.empty(1 << 12, dtype=torch.uint8, pin_memory=True)
            stream.synchronize()
            torch.cuda.empty_cache()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        generate(model)
    finally:
        ended.set()
        thread.join()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_what_was_sent_is_not_overwritten_before_it_is_copied() -> None:
    """Three copies queued after a busy kernel, from two pinned buffers."""
    buffers, found = Buffers({"a": ((1 << 16,), torch.int64)}, torch.device("cuda")), []
    torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
    for number in range(3):
        buffers.host["a"][:] = number
        buffers.send()
        found.append(buffers.device["a"].clone())
    for number, sent in enumerate(found):
        assert torch.equal(sent, torch.full_like(sent, number))


@pytest.mark.parametrize("kind", ["none"])
def test_the_host_cache_takes_the_memory_that_it_reports(model: LlamaForCausalLM) -> None:
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    kv = KVCache.allocate(CONFIG, 3, 64, torch.bfloat16, "cuda")
    host = HostCache(kv, CONFIG, 20_000)  # more than any test before has freed
    taken = torch.cuda.host_memory_stats()["allocated_bytes.current"] - before
    assert taken == KVCache.pinned_bytes(CONFIG, 20_032, torch.bfloat16)
    del host


@pytest.mark.parametrize("kind", ["none"])
@pytest.mark.parametrize("own", [False, True])
def test_draft_tokens_change_no_answer(model: LlamaForCausalLM, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft tokens of the text, and of the model as its own draft model."""
    expected = generate(model, deterministic=True)
    monkeypatch.setattr(Pace, "pays", lambda *args: True)
    speculation = copy.deepcopy(model) if own else "prompt_lookup"
    assert generate(model, deterministic=True, speculation=speculation) == expected


@pytest.mark.parametrize("kind", ["none"])
def test_scores_beside_answers_are_those_alone(model: LlamaForCausalLM) -> None:
    """Scored prompts end with their last chunk, while steps run ahead and answers are decoded by graphs."""
    greedy = SamplingParams(temperature=0, max_tokens=20)
    prompts, starts = [[7] * 300 + [5, number] for number in range(4)], [1, 150, 300, 301]
    with LLM(model, max_model_len=400, kv_cache_tokens=4096, deterministic=True, progress=False) as llm:
        alone = [llm.score(prompt, start, top_logprobs=2)[0] for prompt, start in zip(prompts, starts, strict=True)]
        llm.reset_prefix_cache()
        answers = [llm.engine.add_request(prompt, greedy) for prompt in PROMPTS]
        beside = llm.score(prompts, starts, top_logprobs=2)
        while llm.engine.has_work:
            llm.engine.step()
        assert [score.logprobs for score in beside] == [score.logprobs for score in alone]
        assert [len(score.logprobs) for score in beside] == [302 - start for start in starts]
        assert [len(answer.output().outputs[0].token_ids) for answer in answers] == [20] * len(PROMPTS)
        assert llm.engine.pool.num_available == llm.engine.pool.num_pages
