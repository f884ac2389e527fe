"""The soak: requests of every kind leave nothing in memory, in every configuration, and planted leaks are found."""

from __future__ import annotations

import random
import sys

import pytest
import torch

from benchmarks import soak
from benchmarks.mixed_requests import BROKEN, OPTIONS, RAISING, draw
from benchmarks.soak import CONFIGURATIONS, GROWTH, Count
from fastllama.runtime.generation import Generation
from fastllama.runtime.live_requests import LiveRequests
from fastllama.runtime.serving.worker import Worker

torch.set_num_threads(1)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_nothing_of_some_hundred_requests_remains(configuration: str) -> None:
    counts = soak.soak(configuration, 150)
    assert [count.requests for count in counts] == [15, 82, 150]
    assert [count.left for count in counts] == [{}] * 3


@pytest.mark.exhaustive
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_nothing_of_ten_thousand_requests_remains_and_memory_stays(configuration: str) -> None:
    assert soak.faults(soak.soak(configuration, 10_000)) == []


@pytest.mark.parametrize(
    ("configuration", "tables"),
    [("plain", {"adjusted"}), ("prompt lookup", {"adjusted", "drafts"}), ("draft model", {"adjusted", "drafts"})],
)
def test_what_is_not_forgotten_is_found(monkeypatch: pytest.MonkeyPatch, configuration: str, tables: set[str]) -> None:
    def drop(requests: LiveRequests, generation: Generation) -> None:
        del requests.generations[generation.request.request_id]

    monkeypatch.setattr(LiveRequests, "_drop", drop)
    *_, end = soak.soak(configuration, 40)
    assert tables <= end.left.keys()
    assert {"Sequence", "Request"} <= end.left.keys()


def test_an_order_that_its_worker_keeps_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    end = Worker._end
    kept = []

    def keep(worker: Worker, order: object, *error: object) -> None:
        kept.append(order)
        end(worker, order, *error)  # type: ignore[arg-type]

    monkeypatch.setattr(Worker, "_end", keep)
    assert {"Order", "Mailbox", "Generation"} <= soak.soak("plain", 60)[-1].left.keys()


def test_faults_are_growth_after_the_middle_and_whatever_is_left() -> None:
    def count(requests: int, megabytes: float, **left: int) -> Count:
        return Count(requests, megabytes, {"Request": 0} | left, {"orders": 0})

    quiet = [count(10, 100.0), count(20, 200.0), count(30, 200.0 + GROWTH)]
    assert soak.faults(quiet) == []
    grown = [*quiet[:2], count(30, 201.0 + GROWTH)]
    assert soak.faults(grown) == [f"memory grew by {GROWTH + 1:.1f} MB, which is more than {GROWTH:.1f}"]
    assert soak.faults([quiet[0], count(20, 200.0, Sequence=2), quiet[2]]) == [
        "behind 20 requests are left: {'Sequence': 2}"
    ]


def test_all_options_are_chosen_and_a_tenth_fails() -> None:
    rng = random.Random(0)
    drawn = [draw(rng, model_fails=True) for _ in range(2000)]
    for options in OPTIONS:
        for name, value in options.items():
            assert any(getattr(asked.params, name) == value for asked in drawn), name
    failing = [asked for asked in drawn if asked.fails]
    assert 140 < len(failing) < 260
    ends = [asked.prompt[-1] for asked in failing]
    assert {RAISING, BROKEN} <= set(ends)
    assert any(asked.params.truncate_prompt_tokens for asked in drawn), "no long text"


@pytest.mark.parametrize("kept", [False, True])
def test_the_exit_status_shows_whether_anything_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kept: bool
) -> None:
    counts = [Count(number, 100.0, {"Request": kept}, {"orders": 0}) for number in (1, 2, 3)]
    monkeypatch.setattr(soak, "soak", lambda *_: counts)
    monkeypatch.setattr(sys, "argv", ["soak", "--requests", "3", "--configuration", "plain"])
    with pytest.raises(SystemExit) as exit:
        soak.main()
    assert exit.value.code == kept
    out = capsys.readouterr().out
    assert out.count("plain, ") == 3
    assert ("are left" in out) is kept
