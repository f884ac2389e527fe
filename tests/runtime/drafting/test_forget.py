"""Drafters forget sequences that have ended, on every path that a request can take."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest

from fastllama import LLM, SamplingParams
from fastllama.runtime.drafting.prompt_lookup import PromptLookup
from fastllama.runtime.drafting.speculation import Pace
from fastllama.runtime.planning.sequence import Sequence
from tests.runtime.models import ours, prompt_of, running

PHRASE = prompt_of(6, seed=3)
PROMPTS = [PHRASE * 3, prompt_of(40), prompt_of(2), PHRASE * 2]
LONG = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def one_token(llm: LLM) -> None:
    llm.generate(PROMPTS * 3, SamplingParams(max_tokens=1))


def several_samples(llm: LLM) -> None:
    llm.generate(PROMPTS, SamplingParams(max_tokens=8, n=3, ignore_eos=True))


def aborted(llm: LLM) -> None:
    generations = [llm.engine.add_request(prompt, LONG) for prompt in PROMPTS]
    for _ in range(4):
        llm.engine.step()
    for generation in generations:
        llm.engine.abort(generation)


def a_prompt_in_each_step(llm: LLM) -> None:
    for _ in range(12):
        llm.engine.add_request(prompt_of(5), SamplingParams(max_tokens=3, ignore_eos=True))
        llm.engine.step()
    while llm.engine.has_work:
        llm.engine.step()


def all_the_way(llm: LLM) -> None:
    llm.generate(PROMPTS, LONG)


def torn(llm: LLM) -> None:
    """Ctrl-C within the bookkeeping of a step ends every request."""
    for prompt in PROMPTS:
        llm.engine.add_request(prompt, LONG)
    for _ in range(3):
        llm.engine.step()

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.engine.scheduler, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.engine.step()
    assert not llm.engine.step()


def sequences_alive() -> int:
    gc.collect()
    return sum(isinstance(each, Sequence) for each in gc.get_objects())


PATHS = (one_token, several_samples, aborted, a_prompt_in_each_step, all_the_way, torn)


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("kind", ["text", "model"])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_nothing_is_kept_of_what_has_ended(
    path: Callable[[LLM], None], kind: str, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "pays", lambda *args: pays)
    before = sequences_alive()
    with running(ours(), speculation="prompt_lookup" if kind == "text" else ours("mqa"), max_num_seqs=16) as llm:
        path(llm)
        assert sequences_alive() == before


@pytest.mark.usefixtures("drafted")
@pytest.mark.parametrize("kind", ["text", "model"])
def test_what_goes_on_is_kept(kind: str) -> None:
    """Forgetting one leaves the others' drafts as they were."""
    with running(ours(), speculation="prompt_lookup" if kind == "text" else ours()) as llm:
        first, second = (llm.engine.add_request(prompt, LONG) for prompt in PROMPTS[:2])
        for _ in range(3):
            llm.engine.step()
        speculation = llm.engine.speculation
        assert speculation is not None
        drafter: Any = speculation.drafter
        held = drafter._indices if isinstance(drafter, PromptLookup) else drafter._held
        assert set(held) == {*first.request.sequences, *second.request.sequences}
        llm.engine.abort(first)
        assert set(held) == {*second.request.sequences}
        while llm.engine.has_work:
            llm.engine.step()
        assert not held


@pytest.fixture
def drafted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are verified wherever there are any."""
    monkeypatch.setattr(Pace, "pays", lambda *args: True)
