"""The engine under failures: an error in one request or step leaves others, their tokens and the pages whole."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import LLM, LlamaForCausalLM, RequestOutput, SamplingParams
from fastllama.errors import RequestError
from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.layers.config import RopeScaling
from fastllama.runtime import engine as engine_module
from fastllama.runtime.engine import Engine
from fastllama.runtime.generation import Generation
from fastllama.runtime.planning.scheduler import Scheduler
from tests.runtime.models import VOCAB, logits_of, ours, prompt_of, running

NEW_TOKENS = 10
NO_NUMBERS = "the model's logits are not finite numbers"
# no two sequences are ever at the same position, so that a position names a request
PROMPTS = [prompt_of(length, seed=2) for length in (2, 20, 40)]
HOT = SamplingParams(temperature=3.0, seed=3, max_tokens=NEW_TOKENS)
LONGER = SamplingParams(temperature=3.0, seed=3, max_tokens=2 * NEW_TOKENS)


class Flaky(LlamaForCausalLM):
    """A model whose calls `failures` raise after everything was written, and whose logits at `broken` are `value`."""

    failures: dict[int, BaseException]
    broken: tuple[int, ...] = ()
    value = float("nan")
    num_calls = -2  # not counting those with which LLM warms up

    def forward(self, ids: Tensor, batch: BatchMeta, kv: KVCache) -> Tensor:
        logits = super().forward(ids, batch, kv)
        self.num_calls += 1
        if self.num_calls - 1 in self.failures:
            for layer in kv.layers:  # a step that failed may have left anything in its slots
                layer.k_pages[batch.slots // 16, :, batch.slots % 16] = torch.nan
            raise self.failures[self.num_calls - 1]
        broken = torch.isin(batch.positions[batch.logits_rows], torch.tensor(self.broken, dtype=torch.int64))
        logits[broken] = self.value
        return logits


def flaky(failures: dict[int, BaseException] | None = None) -> Flaky:
    model = ours(kind=Flaky)
    assert isinstance(model, Flaky)
    model.failures = failures or {}
    return model


def tokens_of(output: RequestOutput) -> list[tuple[int, ...]]:
    return [sample.token_ids for sample in output.outputs]


def alone(prompt: Sequence[int], params: SamplingParams = HOT) -> list[tuple[int, ...]]:
    """The tokens of a request that has an LLM of its own."""
    with running(ours()) as llm:
        return tokens_of(llm.generate(list(prompt), params)[0])


def finish(engine: Engine, *generations: Generation) -> None:
    while not all(generation.finished for generation in generations):
        assert engine.has_work
        engine.step()


def num_held(llm: LLM) -> int:
    return llm.engine.pool.num_pages - llm.engine.pool.num_available


@pytest.mark.parametrize("temperature", [0.0, 3.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_broken_logits_end_one_request(value: float, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=NEW_TOKENS)
    model = flaky()
    model.broken, model.value = (22,), value
    with running(model) as llm, pytest.raises(RequestError, match=NO_NUMBERS) as raised:
        llm.generate(PROMPTS, params)
    first, broken, last = raised.value.outputs
    assert tokens_of(first) == alone(PROMPTS[0], params)
    assert tokens_of(last) == alone(PROMPTS[2], params)
    assert tokens_of(broken) == [alone(PROMPTS[1], params)[0][:3]]
    end = broken.outputs[0]
    assert (end.finish_reason, end.stop_reason) == ("error", "the model's logits are not finite numbers")
    assert broken.finished
    assert broken.metrics.finish_time is not None


def test_one_broken_logit_is_enough() -> None:
    model = flaky()
    with running(model) as llm:
        forward = model.forward
        model.forward = lambda *given: forward(*given).index_fill(1, torch.tensor([5]), torch.nan)  # type: ignore[method-assign]
        with pytest.raises(RequestError, match=f"^prompt 0 of 3: request '0' failed: {NO_NUMBERS}$") as raised:
            llm.generate(PROMPTS, HOT)
    assert [output.outputs[0].finish_reason for output in raised.value.outputs] == ["error"] * 3


def test_broken_logits_of_a_prompt_end_all_its_samples() -> None:
    model = flaky()
    model.broken = (19,)
    with running(model) as llm:
        params = SamplingParams(n=3, max_tokens=NEW_TOKENS)
        with pytest.raises(RequestError, match=NO_NUMBERS) as raised:
            llm.generate([PROMPTS[1], PROMPTS[2]], [params, HOT])
    broken, other = raised.value.outputs
    assert [sample.finish_reason for sample in broken.outputs] == ["error"] * 3
    assert tokens_of(broken) == [()] * 3
    assert tokens_of(other) == alone(PROMPTS[2])


def test_pages_of_broken_logits_are_not_offered_to_others() -> None:
    model = flaky()
    model.broken = (31,)  # the token that fills the second page of sixteen
    with running(model) as llm:
        with pytest.raises(RequestError, match=f"^request '0' failed: {NO_NUMBERS}$") as raised:
            llm.generate(PROMPTS[1], SamplingParams(temperature=0, max_tokens=30))
        tokens = [*PROMPTS[1], *raised.value.outputs[0].outputs[0].token_ids]
        assert len(tokens) == 32
        assert len(llm.engine.pool.match_prefix([*tokens, 3]).page_ids) == 1


@pytest.mark.parametrize("budget", [6, 1000])
def test_requests_outlive_a_step_that_is_interrupted(budget: int) -> None:
    model = flaky(dict.fromkeys((0, 2, 3, 9, 11), KeyboardInterrupt()))
    with running(model, max_num_seqs=6, max_num_batched_tokens=budget) as llm:
        params = [HOT, SamplingParams(temperature=3.0, seed=5, n=3, max_tokens=NEW_TOKENS), HOT]
        generations = [llm.engine.add_request(*given) for given in zip(PROMPTS, params, strict=True)]
        caught = 0
        while not all(generation.finished for generation in generations):
            try:
                llm.engine.step()
            except KeyboardInterrupt:
                caught += 1
                assert num_held(llm) == 0
                llm.engine.pool.check_invariants()
        found = [tokens_of(generation.output()) for generation in generations]
    assert caught == 5
    assert found == [alone(prompt, own) for prompt, own in zip(PROMPTS, params, strict=True)]


@pytest.mark.parametrize("budget", [6, 1000])
def test_a_step_that_raises_once_is_run_again(budget: int) -> None:
    with running(flaky(dict.fromkeys((1, 9), RuntimeError("out of memory"))), max_num_batched_tokens=budget) as llm:
        assert [tokens_of(output) for output in llm.generate(PROMPTS, HOT)] == [alone(prompt) for prompt in PROMPTS]


def test_generate_returns_its_pages_when_it_is_interrupted() -> None:
    with running(flaky({2: KeyboardInterrupt()})) as llm:
        other = llm.engine.add_request(PROMPTS[2], HOT)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS[:2], HOT)
        finish(llm.engine, other)
        assert tokens_of(other.output()) == alone(PROMPTS[2])
        assert [tokens_of(output) for output in llm.generate(PROMPTS, HOT)] == [alone(prompt) for prompt in PROMPTS]


RUNTIME = Path(engine_module.__file__).parent


@contextmanager
def interrupted_at(line: int) -> Iterator[list[int]]:
    """Ctrl-C when the runtime's files have run so many lines; gives a list that counts them, up to that one."""
    count = [0]

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if event == "call":
            return trace if Path(frame.f_code.co_filename).is_relative_to(RUNTIME) else None
        if event == "line":
            count[0] += 1
            if count[0] == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


def until_the_end(llm: LLM, generations: list[Generation]) -> None:
    """Run them all but the last, which is aborted after three steps."""
    steps = 0
    while not all(generation.finished for generation in generations):
        llm.engine.step()
        steps += 1
        if steps == 3:
            llm.engine.abort(generations[-1])


THREE = (HOT, SamplingParams(temperature=3.0, seed=5, n=2, max_tokens=NEW_TOKENS), HOT)


@pytest.fixture(scope="module")
def each_alone() -> list[list[tuple[int, ...]]]:
    return [alone(prompt, params) for prompt, params in zip(PROMPTS, THREE, strict=True)]


@pytest.mark.parametrize("line", range(1, 1500, 31))
def test_an_interrupt_anywhere_leaves_a_whole_engine(line: int, each_alone: list[list[tuple[int, ...]]]) -> None:
    # Fewer pages than the requests want, so that some are preempted, and go to the host and come back.
    sizes = {"kv_cache_tokens": 96, "host_cache_tokens": 48, "max_model_len": 64}
    with running(ours(), max_num_seqs=3, max_num_batched_tokens=20, **sizes) as llm:
        generations = [llm.engine.add_request(*given) for given in zip(PROMPTS, THREE, strict=True)]
        with suppress(KeyboardInterrupt), interrupted_at(line) as count:
            until_the_end(llm, generations)
        assert count[0] == line, "the run is shorter than that"
        until_the_end(llm, generations)
        for generation, whole in zip(generations, each_alone, strict=True):
            assert generation.finish_time is not None
            for sample in generation.output().outputs:
                length = len(sample.token_ids)
                assert sample.token_ids == whole[sample.index][:length]
                assert sample.finish_reason == ("length" if length == NEW_TOKENS else "abort")
        assert tokens_of(llm.generate(PROMPTS[0], HOT)[0]) == each_alone[0]


def test_an_interrupt_after_the_last_token_leaves_an_answer_of_full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sequence has all its tokens and was not finished yet; another, which has not, ends by the interrupt."""
    with running(ours()) as llm:
        first, other = llm.engine.add_request(PROMPTS[0], HOT), llm.engine.add_request(PROMPTS[1], LONGER)

        def interrupted(*given: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Scheduler, "finish", interrupted)
            with pytest.raises(KeyboardInterrupt):
                finish(llm.engine, first)
        assert llm.engine.step() == []
        ends = [
            (sample.finish_reason, len(sample.token_ids)) for each in (first, other) for sample in each.output().outputs
        ]
    assert ends == [("length", NEW_TOKENS), ("abort", NEW_TOKENS - 1)]


@pytest.mark.parametrize("num_steps", range(0, 12, 2))
@pytest.mark.parametrize("victim", range(3))
def test_a_request_can_be_aborted_at_any_time(victim: int, num_steps: int) -> None:
    params = SamplingParams(temperature=3.0, seed=3, max_tokens=NEW_TOKENS, n=2)
    with running(ours(), max_num_seqs=4, max_num_batched_tokens=30) as llm:  # so some wait, some run, some have ended
        generations = [llm.engine.add_request(prompt, params) for prompt in PROMPTS]
        for _ in range(num_steps):
            llm.engine.step()
        done = generations[victim].finished
        before = tokens_of(generations[victim].output())
        for _ in range(2):
            llm.engine.abort(generations[victim])
            llm.engine.pool.check_invariants()
        finish(llm.engine, *generations)
        outputs = [generation.output() for generation in generations]
    assert tokens_of(outputs[victim]) == before
    assert {sample.finish_reason for sample in outputs[victim].outputs} == {"length" if done else "abort"}
    assert outputs[victim].metrics.finish_time is not None
    for number in {0, 1, 2} - {victim}:
        assert tokens_of(outputs[number]) == alone(PROMPTS[number], params)


def test_samples_share_the_pages_of_their_prompt_until_they_write() -> None:
    params = SamplingParams(temperature=3.0, seed=3, n=4, max_tokens=NEW_TOKENS, logprobs=0)
    with running(ours()) as llm:
        generation = llm.engine.add_request(PROMPTS[2], params)
        llm.engine.step()
        assert num_held(llm) == 3, "40 tokens are two full pages and a half one, whoever holds them"
        llm.engine.step()
        assert num_held(llm) == 2 + 4, "each sample writes to a half page of its own"
        finish(llm.engine, generation)
        output = generation.output()
        again = llm.generate(PROMPTS[2], params)[0]
    assert len(set(tokens_of(output))) == 4
    assert tokens_of(again) == tokens_of(output)
    for sample in output.outputs:
        assert sample.logprobs is not None
        logprobs = logits_of([*PROMPTS[2], *sample.token_ids]).log_softmax(-1)[39:-1]
        expected = logprobs[range(NEW_TOKENS), list(sample.token_ids)].tolist()
        assert [report.logprob for report in sample.logprobs] == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("length", "cached"), [(15, 0), (16, 0), (17, 16), (48, 32), (49, 48), (60, 48)])
def test_a_prompt_seen_before_is_taken_from_the_cache(length: int, cached: int) -> None:
    prompt = prompt_of(length, seed=3)
    with running(ours()) as llm:
        outputs = [llm.generate(prompt, HOT)[0] for _ in range(2)]
        assert [output.metrics.num_cached_tokens for output in outputs] == [0, cached]
        assert [tokens_of(output) for output in outputs] == [alone(prompt)] * 2
        other = [*prompt[:-1], 96 - prompt[-1]]
        found = llm.generate(other, HOT)[0]
    assert (found.metrics.num_cached_tokens, tokens_of(found)) == (cached, alone(other))


def test_the_next_turn_of_a_conversation_finds_the_last_answer() -> None:
    with running(ours()) as llm:
        answer = llm.generate(PROMPTS[1], SamplingParams(temperature=0, max_tokens=30))[0].outputs[0].token_ids
        turn = [*PROMPTS[1], *answer, 9, 8, 7]
        output = llm.generate(turn, HOT)[0]
    # The last token of the answer was sampled but never fed: 49 of 50 tokens are computed, 48 fill pages.
    assert (output.metrics.num_cached_tokens, tokens_of(output)) == (48, alone(turn))


def test_a_step_returns_the_requests_that_gained_a_token() -> None:
    with running(ours(), max_num_seqs=3, max_num_batched_tokens=21) as llm:
        short, long = (llm.engine.add_request(prompt, HOT) for prompt in (PROMPTS[0], PROMPTS[2]))
        assert llm.engine.step() == [short], "the long prompt is not through"
        assert llm.engine.has_work
        assert llm.engine.step() == [short]
        assert set(llm.engine.step()) == {short, long}
        finish(llm.engine, short, long)
        assert not llm.engine.has_work


def test_a_long_prompt_of_a_model_with_dynamic_rope_names_the_option_to_raise() -> None:
    """Its default context is the trained one, in which the scaling does nothing."""
    model = ours()
    model.config = replace(model.config, rope_scaling=RopeScaling("dynamic", 2.0))
    prompt = [1] * 600
    with running(model, max_model_len=None) as llm, pytest.raises(ValueError, match=r".") as raised:
        llm.generate(prompt)
    assert str(raised.value).endswith(
        "at most 511, one less than max_model_len, which can be raised, as the model's rope scaling is dynamic"
    )
    with running(model, max_model_len=700) as llm:
        assert len(llm.generate(prompt, SamplingParams(temperature=0, max_tokens=2))[0].outputs[0].token_ids) == 2


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt has 0 tokens; legal: at least 1"),
        ([1, VOCAB], {}, f"prompt token 1 is {VOCAB}; legal: integers from 0 to {VOCAB - 1}"),
        ([-1], {}, f"prompt token 0 is -1; legal: integers from 0 to {VOCAB - 1}"),
        ([1, 2.0], {}, f"prompt token 1 is 2.0; legal: integers from 0 to {VOCAB - 1}"),
        ([True], {}, f"prompt token 0 is True; legal: integers from 0 to {VOCAB - 1}"),
        ([1] * 256, {}, "the prompt has 256 tokens; legal: at most 255, one less than max_model_len"),
        ([1], {"n": 17}, "n is 17; legal: at most 16, which is max_num_seqs"),
        ([1], {"stop": "x"}, r"stop is \('x',\); legal without a tokenizer: no strings, only token ids"),
        (
            [1],
            {"stop_token_ids": [VOCAB]},
            f"a token id in stop_token_ids is {VOCAB}; legal: 0 to {VOCAB - 1}",
        ),
        (
            [1],
            {"logit_bias": {VOCAB: 1}},
            f"a token id in logit_bias is {VOCAB}; legal: 0 to {VOCAB - 1}",
        ),
    ],
)
def test_what_cannot_run_is_refused_in_one_sentence(prompt: list[Any], params: dict[str, Any], message: str) -> None:
    with running(ours()) as llm:
        with pytest.raises(ValueError, match=f"^{message}$"):
            llm.engine.add_request(prompt, SamplingParams(**params))
        with pytest.raises(ValueError, match=rf"^{message} \(prompt 1 of 2\)$"):
            llm.generate([[1, 2], prompt], [HOT, SamplingParams(**params)])
        assert not llm.engine.has_work, "the good prompt before it is not queued either"


def test_an_id_that_is_taken_is_refused_and_disturbs_no_request() -> None:
    with running(ours()) as llm:
        first = llm.engine.add_request(PROMPTS[0], HOT, request_id="mine")
        with pytest.raises(ValueError, match=r"^request_id is 'mine'; legal: a text that no unfinished request has$"):
            llm.engine.add_request(PROMPTS[1], HOT, request_id="mine")
        finish(llm.engine, first)
        again = llm.engine.add_request(PROMPTS[1], HOT, request_id="mine")
        llm.engine.abort(first)
        assert llm.engine.find("mine") is again, "an ended request of the same id ends no other"
        finish(llm.engine, again)
        assert [tokens_of(each.output()) for each in (first, again)] == [alone(PROMPTS[0]), alone(PROMPTS[1])]


def test_new_weights_that_are_refused_disturb_no_request() -> None:
    model = ours()
    with running(model) as llm, running(model):
        first = llm.engine.add_request(PROMPTS[0], HOT)
        llm.engine.step()
        with pytest.raises(RuntimeError, match=r"^another LLM runs this model"):
            llm.update_weights({})
        finish(llm.engine, first)
        assert tokens_of(first.output()) == alone(PROMPTS[0])
