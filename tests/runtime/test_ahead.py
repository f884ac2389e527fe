"""Steps launched before the one before them is read give the same answers, and the host never waits in between."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from fastllama import LLM, LlamaForCausalLM, RequestOutput, SamplingParams
from fastllama.errors import RequestError
from fastllama.runtime import engine as engine_module
from fastllama.runtime.device.execution import Launched
from fastllama.runtime.generation import Generation
from fastllama.runtime.planning.sequence import UNKNOWN
from tests.runtime.device.test_graphs import StandIn
from tests.runtime.models import Scripted, ours, prompt_of, running
from tests.runtime.test_engine import interrupted_at

NEW_TOKENS = 20
PROMPTS = [prompt_of(length, seed=6) for length in (1, 17, 40, 30, 33)]
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
HOT = SamplingParams(temperature=3.0, seed=2, max_tokens=NEW_TOKENS, n=2)
MIXED = [
    GREEDY,
    SamplingParams(temperature=3.0, seed=1, max_tokens=7, logprobs=2),
    SamplingParams(temperature=3.0, seed=5, max_tokens=6, repetition_penalty=1.3),
    SamplingParams(temperature=3.0, seed=4, max_tokens=1, prompt_logprobs=1),
    SamplingParams(temperature=4.0, seed=7, max_tokens=NEW_TOKENS, stop_token_ids=range(3, 20), n=2),
]
LIMITS: dict[str, dict[str, Any]] = {
    "one batch": {},
    "chunks": {"max_num_seqs": 3, "max_num_batched_tokens": 20},
    "few pages": {"kv_cache_tokens": 112, "max_model_len": 96},
    "host cache": {"kv_cache_tokens": 112, "max_model_len": 96, "host_cache_tokens": 320},
    "int8": {"kv_cache_dtype": "int8"},
    "deterministic": {"deterministic": True},
}


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each "launch" of a step and each "read" of one, in their order."""
    found: list[str] = []

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **options: Any) -> Any:
            found.append(name)
            return function(*args, **options)

        return note

    for name in ("launch", "launch_parts"):
        monkeypatch.setattr(engine_module, name, noting("launch", getattr(engine_module, name)))
    monkeypatch.setattr(Launched, "read", noting("read", Launched.read))
    return found


def contents(outputs: list[RequestOutput]) -> list[Any]:
    return [
        [(o.token_ids, o.text, o.finish_reason, [(p.token_id, pytest.approx(p.logprob)) for p in o.logprobs or ()])
         for o in output.outputs]
        for output in outputs
    ]  # fmt: skip


def test_the_next_step_is_launched_before_one_is_read(ahead: None, events: list[str]) -> None:
    with running(ours()) as llm:
        llm.generate([PROMPTS[1]], GREEDY)
    # The last token of an answer is known to be that: nothing is launched after it.
    assert events == ["launch"] + ["launch", "read"] * (NEW_TOKENS - 1) + ["read"]


def test_where_tokens_are_wanted_they_are_waited_for(ahead: None, events: list[str]) -> None:
    with running(ours()) as llm:
        llm.generate([PROMPTS[1]], replace(GREEDY, logits_processors=(lambda token_ids, logits: logits,)))
    assert events == ["launch", "read"] * NEW_TOKENS


def test_penalties_wait_for_nothing(ahead: None, events: list[str]) -> None:
    with running(ours()) as llm:
        llm.generate([PROMPTS[1]], replace(GREEDY, repetition_penalty=1.3, frequency_penalty=0.5, logit_bias={5: 2.0}))
    assert events == ["launch"] + ["launch", "read"] * (NEW_TOKENS - 1) + ["read"]


def test_on_a_cpu_each_is_read_at_once(events: list[str]) -> None:
    with running(ours()) as llm:
        llm.generate([PROMPTS[1]], GREEDY)
    assert events == ["launch", "read"] * NEW_TOKENS


@pytest.mark.parametrize("params", [GREEDY, HOT, MIXED], ids=["greedy", "hot", "mixed"])
@pytest.mark.parametrize("limits", LIMITS)
def test_answers_are_the_same(
    limits: str, params: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    with running(ours(), **LIMITS[limits]) as llm:
        expected = contents(llm.generate(PROMPTS, params))
    request.getfixturevalue("ahead")
    seen = request.getfixturevalue("events")
    with running(ours(), **LIMITS[limits]) as llm:
        assert contents(llm.generate(PROMPTS, params)) == expected
        if "pages" in limits and params is not MIXED:
            assert llm.engine.scheduler.num_preemptions > 0
        assert ("launch", "launch") in pairwise(seen)


@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.4, "frequency_penalty": 0.7, "logit_bias": {5: 4.0}}])
def test_graphs_of_a_gpu_pass_tokens_on(ahead: None, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens go from one graph's memory to its own next run, and to that of another batch; some may be penalized."""
    each = [{}, more]
    params = [SamplingParams(temperature=2.0, seed=i, max_tokens=3 + 4 * i, **each[i % 2]) for i in range(len(PROMPTS))]
    with running(ours("biases", dtype=torch.float32), deterministic=True) as llm:
        llm.engine._runner.runs_ahead = False
        expected = contents(llm.generate(PROMPTS, params))
    stand_in = StandIn()
    stand_in.install(monkeypatch)
    with running(ours("biases", dtype=torch.float32), deterministic=True) as llm:
        assert contents(llm.generate(PROMPTS, params)) == expected
    assert stand_in.replays > 10


def run_and_look(llm: LLM, generations: list[Generation]) -> None:
    while not all(generation.finished for generation in generations):
        llm.engine.step()
        for generation in generations:
            for output in generation.output().outputs:
                assert UNKNOWN not in output.token_ids
                assert len(output.token_ids) <= generation.request.params.max_tokens


@pytest.mark.parametrize("step", range(1, 12, 3))
def test_what_is_aborted_meanwhile_disturbs_no_other(ahead: None, step: int) -> None:
    with running(ours()) as llm:
        llm.engine._runner.runs_ahead = False
        expected = contents(llm.generate(PROMPTS, HOT))
    with running(ours(), kv_cache_tokens=160, max_model_len=96) as llm:
        generations = [llm.engine.add_request(prompt, HOT) for prompt in PROMPTS]
        for _ in range(step):
            llm.engine.step()
        llm.engine.abort(generations[1])
        run_and_look(llm, generations)
        found = contents([generation.output() for generation in generations])
        assert [found[i] for i in (0, 2, 3, 4)] == [expected[i] for i in (0, 2, 3, 4)]
        for sample, whole in zip(found[1], expected[1], strict=False):
            assert sample[0] == whole[0][: len(sample[0])]


def test_a_fork_goes_on_from_what_is_known(ahead: None) -> None:
    with running(ours()) as llm:
        generation = llm.engine.add_request(PROMPTS[1], GREEDY)
        for _ in range(5):
            llm.engine.step()
        fork = llm.engine.fork(generation)
        run_and_look(llm, [generation, fork])
        assert fork.output().outputs[0].token_ids == generation.output().outputs[0].token_ids


class Failing(LlamaForCausalLM):
    """Raises in the calls of these numbers."""

    calls, failures = 0, frozenset[int]()

    def forward(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls in self.failures:
            raise MemoryError
        return super().forward(*args)


@pytest.mark.parametrize("call", [2, 3, 5])
def test_a_fault_ahead_is_met_again_when_its_turn_comes(ahead: None, call: int) -> None:
    with running(ours()) as llm:
        llm.engine._runner.runs_ahead = False
        expected = contents(llm.generate(PROMPTS, GREEDY))
    model = ours(kind=Failing)
    assert isinstance(model, Failing)
    with running(model) as llm:
        generations = [llm.engine.add_request(prompt, GREEDY) for prompt in PROMPTS]
        model.calls, model.failures = 0, frozenset({call})  # once: no request notices
        while llm.engine.has_work:
            llm.engine.step()
        assert contents([generation.output() for generation in generations]) == expected
        generations = [llm.engine.add_request(prompt, GREEDY) for prompt in PROMPTS]
        model.calls, model.failures = 0, frozenset(range(call, call + 2))  # ahead, and then by itself
        while llm.engine.has_work:
            llm.engine.step()
        assert contents([generation.output() for generation in generations]) == expected


def test_what_steps_ahead_raise_is_logged_once_of_each_kind(
    ahead: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a warning: each takes the time of a step, and leaves no other trace."""
    with running(ours()) as llm:
        expected = contents(llm.generate(PROMPTS, GREEDY))
    kinds, launch = iter([ValueError, MemoryError] + [ValueError] * NEW_TOKENS), engine_module.launch

    def failing(*args: Any, before: Launched | None = None, **options: Any) -> Launched:
        if before is not None:
            raise next(kinds)("ahead")
        return launch(*args, **options)

    monkeypatch.setattr(engine_module, "launch", failing)
    with caplog.at_level(logging.DEBUG, "fastllama"), running(ours()) as llm:
        assert contents(llm.generate(PROMPTS, GREEDY)) == expected
    levels = [record.levelno for record in caplog.records if "launched ahead" in record.getMessage()]
    assert levels[:2] == [logging.WARNING] * 2
    assert set(levels[2:]) == {logging.DEBUG}


def test_broken_logits_end_a_request_once(ahead: None) -> None:
    script = list(range(1, 61))
    model = ours(kind=Scripted)
    assert isinstance(model, Scripted)
    model.script = [*script[:20], Scripted.BROKEN, *script[21:]]
    with running(model) as llm, pytest.raises(RequestError) as raised:
        llm.generate([script[:10]], GREEDY)
    (sample,) = raised.value.outputs[0].outputs
    assert (sample.token_ids, sample.finish_reason) == (tuple(script[10:20]), "error")


@pytest.mark.parametrize("line", range(1, 1900, 47))
def test_an_interrupt_anywhere_leaves_a_whole_engine(ahead: None, line: int) -> None:
    params = [GREEDY, HOT, GREEDY]
    with running(ours()) as llm:
        llm.engine._runner.runs_ahead = False
        whole = [[o.token_ids for o in output.outputs] for output in llm.generate(PROMPTS[:3], params)]
    with running(ours(), kv_cache_tokens=128, max_model_len=96, max_num_seqs=4, max_num_batched_tokens=20) as llm:
        generations = [llm.engine.add_request(*given) for given in zip(PROMPTS[:3], params, strict=True)]
        with suppress(KeyboardInterrupt), interrupted_at(line) as count:
            run_and_look(llm, generations)
        assert count[0] == line, "the run is shorter than that"
        run_and_look(llm, generations)
        for generation, samples in zip(generations, whole, strict=True):
            for sample in generation.output().outputs:
                assert sample.token_ids == samples[sample.index][: len(sample.token_ids)]
                assert sample.finish_reason == ("length" if len(sample.token_ids) == NEW_TOKENS else "abort")


def test_nothing_is_launched_without_use(ahead: None, events: list[str]) -> None:
    """An unforeseen stop leaves one step in flight, of which nothing is kept."""
    with running(ours()) as llm:
        whole = llm.generate([PROMPTS[1]], GREEDY)[0].outputs[0].token_ids
        events.clear()
        stop = whole[6]
        llm.generate([PROMPTS[1]], SamplingParams(temperature=0, max_tokens=NEW_TOKENS, stop_token_ids=[stop]))
        assert events.count("launch") == events.count("read") + 1
        assert llm.engine._ahead is None
        assert llm.engine.scheduler.in_flight == []
