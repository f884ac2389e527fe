"""The prefix cache's cost: every lookup and every page is timed, and prompts that share a prefix are not counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import prefix_cost
from fastllama.runtime.planning.lookups import Lookups
from fastllama.runtime.planning.scheduler import Scheduler
from tests.runtime.models import ours, running


def test_all_that_the_cache_does_is_timed() -> None:
    """17 + 8 tokens are computed of one request and 40 + 8 of the other: a page of 16, and three."""
    before = Lookups.find, Scheduler._publish_next
    with running(ours()) as llm:
        found = prefix_cost.measure(llm, [[5] * 17, [7] * 40], 9)
        again = prefix_cost.measure(llm, [[5] * 17], 9)
    assert (Lookups.find, Scheduler._publish_next) == before
    assert (found.steps, found.lookups, found.publications, found.hit_tokens) == (9, 2, 1 + 3, 0)
    assert (again.lookups, again.publications, again.hit_tokens) == (1, 0, 16)
    assert 0 < found.lookup_seconds + found.publication_seconds < found.seconds
    assert found.share == (found.lookup_seconds + found.publication_seconds) / found.seconds


def test_hits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cost, "prompts_of", lambda *given: [[5] * 20])
    with running(ours()) as llm, pytest.raises(AssertionError, match=r"^prompts had a prefix in common"):
        prefix_cost.rounds_of(llm, 1, 4, 1)


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "found.json"
    sizes = ["--requests", "3", "--tokens", "3", "--rounds", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["prefix_cost", *sizes])
    prefix_cost.main()
    found = json.loads(output.read_text(encoding="utf-8"))
    assert [sample["model"] for sample in found["samples"]] == ["tiny", "nothing computed"]
    for sample in found["samples"]:
        for each in sample["rounds"]:
            assert (each["lookups"], each["hit_tokens"]) == (3, 0)
            assert each["share"] > 0
    assert capsys.readouterr().out.count("% of the time") == 2
