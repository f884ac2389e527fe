"""Forks begin with the generated tokens, go on by their own parameters, and never disturb the original request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from fastllama import LLM, SamplingParams
from fastllama.runtime.engine import Engine
from fastllama.runtime.generation import Generation, TextStream
from fastllama.runtime.planning.sequence import Status
from tests.runtime.models import ours, prompt_of, running
from tests.runtime.test_engine import HOT, alone, finish, num_held, tokens_of
from tests.runtime.test_generation import FILLER, Pieces, spelling

PROMPT = prompt_of(20, seed=2)
OTHER = replace(HOT, seed=4)


def steps(engine: Engine, count: int) -> None:
    for _ in range(count):
        engine.step()


def ids_of(generation: Generation) -> tuple[int, ...]:
    (tokens,) = tokens_of(generation.output())
    return tokens


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("params", [HOT, replace(HOT, temperature=0.0)])
def test_with_the_same_parameters_the_tokens_are_the_same(params: SamplingParams, num_steps: int) -> None:
    with running(ours()) as llm:
        first = llm.engine.add_request(PROMPT, params)
        steps(llm.engine, num_steps)
        forks = [llm.engine.fork(first), llm.engine.fork(first, params)]
        assert [ids_of(fork) for fork in forks] == [ids_of(first)] * 2
        assert len(ids_of(first)) == num_steps
        finish(llm.engine, first, *forks)
        assert [tokens_of(each.output()) for each in (first, *forks)] == [alone(PROMPT, params)] * 3
        assert len({each.request.request_id for each in (first, *forks)}) == 3


@pytest.mark.parametrize("num_steps", [1, 5, 9])
@pytest.mark.parametrize("sizes", [{}, {"kv_cache_tokens": 48, "max_model_len": 48}, {"max_num_seqs": 1}])
def test_another_seed_goes_its_own_way_and_leaves_the_first_on_its(sizes: dict[str, int], num_steps: int) -> None:
    """With pages and seats for both, with too few pages, and with one seat."""
    with running(ours(), **sizes) as llm:
        first = llm.engine.add_request(PROMPT, HOT)
        steps(llm.engine, num_steps)
        shared = ids_of(first)
        fork = llm.engine.fork(first, OTHER)
        again = llm.engine.fork(fork, HOT)
        finish(llm.engine, first, fork, again)
        assert [ids_of(first)] == alone(PROMPT)
        assert ids_of(again) == ids_of(first)
        assert ids_of(fork)[:num_steps] == shared
        assert ids_of(fork)[num_steps:] != ids_of(first)[num_steps:]
        # Samples depend on seed, position and logits alone.
        assert [ids_of(fork)] == sampled_after(shared)


def sampled_after(shared: Sequence[int]) -> list[tuple[int, ...]]:
    """The tokens of seed 4 after these, which a logits processor forces first."""

    def forced(token_ids: list[int], logits: Tensor) -> Tensor:
        if len(token_ids) < len(shared):
            logits[shared[len(token_ids)]] = 1e9
        return logits

    return alone(PROMPT, replace(OTHER, logits_processors=(forced,)))


def test_pages_are_shared_until_one_is_written() -> None:
    with running(ours()) as llm:
        first = llm.engine.add_request(PROMPT, HOT)
        steps(llm.engine, 3)
        assert num_held(llm) == 2
        fork = llm.engine.fork(first, OTHER)
        assert num_held(llm) == 2, "22 tokens are computed: a full page and a begun one"
        assert llm.engine.scheduler.num_running == 2
        (mine,), (its) = fork.request.sequences, first.request.sequences[0]
        assert mine.page_ids == its.page_ids
        llm.engine.step()
        assert num_held(llm) == 3
        assert [mine.page_ids[0], mine.page_ids[1] == its.page_ids[1]] == [its.page_ids[0], False]
        llm.engine.abort(first)
        assert num_held(llm) == 2
        finish(llm.engine, fork)
        assert fork.output().metrics.num_cached_tokens == len(PROMPT)
        assert tokens_of(fork.output())[0][:3] == alone(PROMPT)[0][:3]


def test_without_a_seat_it_waits_and_finds_the_full_pages() -> None:
    with running(ours(), max_num_seqs=1) as llm:
        first = llm.engine.add_request(PROMPT, replace(HOT, max_tokens=20))
        steps(llm.engine, 15)
        fork = llm.engine.fork(first)
        assert fork.request.sequences[0].status is Status.WAITING
        finish(llm.engine, first)
        assert num_held(llm) == 0
        llm.engine.step()
        assert (
            fork.request.sequences[0].page_ids[:2]
            == llm.engine.pool.match_prefix([*PROMPT, *ids_of(first)]).page_ids[:2]
        )
        finish(llm.engine, fork)
        assert ids_of(fork) == ids_of(first)
        assert fork.output().metrics.num_cached_tokens == len(PROMPT), "of 32 tokens found, those of the prompt"


@pytest.mark.parametrize("budget", [6, 7, 19])
def test_of_a_prompt_that_is_being_read(budget: int) -> None:
    """Forked in the middle of its prompt, and with one token of it left."""
    with running(ours(), max_num_seqs=6, max_num_batched_tokens=budget) as llm:
        first = llm.engine.add_request(PROMPT, HOT)
        llm.engine.step()
        fork = llm.engine.fork(first)
        assert (fork.request.sequences[0].status is Status.RUNNING) == (budget == 19)
        finish(llm.engine, first, fork)
        assert [tokens_of(each.output()) for each in (first, fork)] == [alone(PROMPT)] * 2


def test_of_a_request_that_was_preempted() -> None:
    long = replace(HOT, max_tokens=40)
    with running(ours(), kv_cache_tokens=96, max_model_len=80) as llm:
        others = [llm.engine.add_request(prompt_of(30, seed=seed), long) for seed in (1, 2)]
        first = llm.engine.add_request(PROMPT, long)
        while first.request.sequences[0].status is not Status.WAITING or not ids_of(first):
            llm.engine.step()
        fork = llm.engine.fork(first)
        assert (ids_of(fork), fork.request.sequences[0].status) == (ids_of(first), Status.WAITING)
        finish(llm.engine, first, fork, *others)
        assert [tokens_of(each.output()) for each in (first, fork)] == [alone(PROMPT, long)] * 2


def test_reports_and_penalties_know_what_was_shared() -> None:
    params = replace(HOT, logprobs=2, prompt_logprobs=1, presence_penalty=2.0, frequency_penalty=1.0)
    with running(ours()) as llm:
        first = llm.engine.add_request(PROMPT, params)
        steps(llm.engine, 4)
        fork = llm.engine.fork(first)
        silent = llm.engine.fork(first, replace(params, logprobs=None, prompt_logprobs=None))
        finish(llm.engine, first, fork, silent)
        whole, found = first.output(), fork.output()
        assert found.outputs[0].token_ids == whole.outputs[0].token_ids == silent.output().outputs[0].token_ids
        assert [each.logprob for each in found.outputs[0].logprobs or ()] == pytest.approx(
            [each.logprob for each in whole.outputs[0].logprobs or ()], rel=1e-6
        )
        assert len(found.outputs[0].logprobs or ()) == HOT.max_tokens
        assert found.prompt_logprobs == whole.prompt_logprobs
        assert None not in (found.prompt_logprobs or ())[1:]
        assert silent.output().outputs[0].logprobs is silent.output().prompt_logprobs is None
        times = found.metrics
        assert whole.metrics.first_token_time is not None
        assert whole.metrics.first_token_time < times.arrival_time <= (times.first_scheduled_time or 0)
        assert (times.first_scheduled_time or 0) <= (times.first_token_time or 0)


def test_a_fork_without_a_seed_gets_its_own() -> None:
    with running(ours()) as llm:
        first = llm.engine.add_request(PROMPT, HOT)
        steps(llm.engine, 2)
        forks = [llm.engine.fork(first, replace(HOT, seed=None)) for _ in range(3)]
        finish(llm.engine, first, *forks)
        found = [ids_of(each) for each in (first, *forks)]
    assert len(set(found)) == 4
    assert {tokens[:2] for tokens in found} == {found[0][:2]}


def text_of(generation: Generation) -> str:
    return generation.output().outputs[0].text


def test_texts_go_on_by_themselves() -> None:
    """Half a character and the possible beginning of a stop string are held back at the fork."""
    params = SamplingParams(temperature=0, stop="lo!", max_tokens=6)
    with spelling(["Hel", b"\xe2", b"\x98\xba", "l", "o", "!", "?"]) as (llm, answer):
        first = llm.start([1], params)
        steps(llm.engine, 2)
        fork = llm.fork(first, replace(params, max_tokens=7, stop=("\u263a",)))
        assert "".join(llm.follow(fork)) == text_of(fork) == "Hel", "all of its text, which its own stop ends"
        assert fork.output().outputs[0].stop_reason == "\u263a"
        steps(llm.engine, 2)
        assert text_of(first) == "Hel\u263a", "an l may begin a stop string"
        same, other = llm.fork(first), llm.fork(first, replace(params, stop="l?", max_tokens=7))
        assert "".join(llm.follow(first)) == "Hel\u263a"
        assert (text_of(same), same.output().outputs[0].stop_reason) == ("Hel\u263a", "lo!")
        finish(llm.engine, other)
        assert text_of(other) == "Hel\u263alo!?"
        assert list(other.output().outputs[0].token_ids) == answer


def test_a_stream_and_its_fork_share_nothing() -> None:
    tokenizer: Any = Pieces([b"a", b"\xe2\x98", b"\xba"])
    params = SamplingParams(stop="ab", skip_special_tokens=False)
    stream = TextStream(tokenizer, (1,), params)
    for token_id in (FILLER, 4, 5):
        stream.push(token_id)
    assert stream.take() == ".", "an a may begin a stop string"
    fork = stream.fork(replace(params, skip_special_tokens=True, stop="x"))
    assert (stream.take(), fork.take(), fork.text) == ("", ".", ".")
    for each in (stream, fork):
        each.push(6)
        each.push(2)
        each.close()
    assert (stream.text, fork.text) == (".a\u263a</s>", ".a\u263a")
    assert (stream._detokenizer.text, fork._detokenizer.text) == (".a\u263a</s>", ".a\u263a")


def test_each_fork_of_many_is_the_request_it_left() -> None:
    """Deep, wide, and in too few seats and pages."""
    long = replace(HOT, max_tokens=30)
    with running(ours(), kv_cache_tokens=160, max_model_len=80, max_num_seqs=4, host_cache_tokens=64) as llm:
        family = [llm.engine.add_request(PROMPT, long)]
        while not all(each.finished for each in family):
            llm.engine.step()
            if len(family) < 12 and not family[-1].finished:
                family.append(llm.engine.fork(family[-1]))
            llm.engine.pool.check_invariants()
        assert [tokens_of(each.output()) for each in family] == [alone(PROMPT, long)] * 12
        assert llm.engine.scheduler.num_preemptions > 0


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 2}, r"n is 2; legal: 1"),
    ({"max_tokens": 3}, r"max_tokens is 3, and 3 are already generated; legal: at least 4"),
    ({"logprobs": 0}, r"logprobs is 0, but the request to fork reports none; legal: None"),
    ({"prompt_logprobs": 5}, r"prompt_logprobs is 5, but the request to fork reports none; legal: None"),
    ({"stop_token_ids": [97]}, r"a token id in stop_token_ids is 97; legal: 0 to 96"),
    ({"stop": "x"}, r"stop is \('x',\); legal without a tokenizer: no strings, only token ids"),
    (
        {"max_tokens": 90},
        r"a prompt of 20 tokens with max_tokens 90 may grow to 110 tokens; legal: at most 96, the size ",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_go_on_is_refused_and_changes_nothing(changes: dict[str, Any], message: str) -> None:
    with running(ours(), kv_cache_tokens=96, max_model_len=96) as llm:
        first = llm.engine.add_request(PROMPT, HOT)
        steps(llm.engine, 3)
        held = num_held(llm)
        llm.engine.scheduler.max_model_len = 200  # so that the size of the cache is what limits
        with pytest.raises(ValueError, match=f"^{message}"):
            llm.fork(first, replace(HOT, **changes))
        assert (num_held(llm), llm.engine.scheduler.num_running, llm.engine.scheduler.num_waiting) == (held, 1, 0)
        finish(llm.engine, first)
        assert tokens_of(first.output()) == alone(PROMPT)


def test_what_is_no_unfinished_request_is_refused() -> None:
    with running(ours()) as llm, running(ours()) as another:
        first, several = llm.engine.add_request(PROMPT, HOT), llm.engine.add_request(PROMPT, replace(HOT, n=2))
        stranger = another.engine.add_request(PROMPT, HOT)
        for given, params, message in (
            (first.request, None, r"generation is Request\(.*; legal: what LLM.start returns"),
            (None, None, r"generation is None; legal: what LLM.start returns"),
            (first, {"seed": 1}, r"params is {'seed': 1}; legal: SamplingParams or None"),
        ):
            with pytest.raises(TypeError, match=f"^{message}$"):
                llm.fork(given, params)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"^n of the request to fork is 2; legal: 1$"):
            llm.fork(several, HOT)
        finish(llm.engine, first, several)
        another.engine.abort(stranger)
        for ended in (first, stranger):
            with pytest.raises(
                ValueError, match=r"^generation is request '0', which has ended or is another engine's; "
            ):
                llm.fork(ended)


def test_an_interrupt_before_it_ends_what_would_be_forked() -> None:
    with running(ours()) as llm:
        first = llm.engine.add_request(PROMPT, HOT)
        llm.engine._consistency.torn = True
        with pytest.raises(ValueError, match=r"^generation is request '0', which has ended"):
            llm.fork(first)
        assert first.output().outputs[0].finish_reason == "abort"
        fresh = llm.engine.add_request(PROMPT, HOT)
        finish(llm.engine, fresh)
        assert tokens_of(fresh.output()) == alone(PROMPT), "the refusal tore nothing"


def test_a_closed_llm_forks_nothing() -> None:
    llm = LLM(ours(), kv_cache_tokens=256, max_model_len=64, progress=False)
    first = llm.engine.add_request(PROMPT, HOT)
    llm.close()
    with pytest.raises(RuntimeError, match=r"^this LLM is closed; make a new one$"):
        llm.fork(first)
