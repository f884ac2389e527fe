"""The serving benchmark reports what its processes did, and client and server do what its options request."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.serving import __main__ as serving
from benchmarks.serving.process import DirectProcess, cpu_seconds
from benchmarks.serving.requests import Reply, dechunked
from benchmarks.serving.samples import Burst, Sample, percentile
from benchmarks.serving.settings import Settings


def sample(seconds: float = 2.0, cpu_seconds: float = 0.5, tokens: int = 100) -> Sample:
    arrivals = [[0.0, 0.25, 0.5, 1.0], [0.0, 0.75]]
    return Sample.of(
        arrivals, seconds=seconds, cpu_seconds=cpu_seconds, client_cpu_seconds=0.1, tokens=tokens, probes=[0.1]
    )


def test_a_sample_separates_first_tokens_from_the_gaps_after_them() -> None:
    assert (sample().first, sample().gaps) == ([0.25, 0.75], [0.25, 0.5])
    assert (sample().tokens_per_second, sample().cpu_per_token) == (50, 0.005)


@pytest.mark.parametrize(("percent", "value"), [(1, 1), (50, 50), (99, 99), (100, 100)])
def test_a_percentile_is_a_value_that_so_many_do_not_exceed(percent: int, value: int) -> None:
    assert percentile(list(range(100, 0, -1)), percent) == value
    assert percentile([7], percent) == 7


def test_ratio_and_difference_are_medians_of_pairs_of_the_same_round() -> None:
    http = [sample(seconds=2), sample(seconds=4), sample(seconds=100)]
    direct = [sample(seconds=1, cpu_seconds=0.1), sample(seconds=3, cpu_seconds=0.4), sample(seconds=100)]
    figures = serving.Figures(http, direct)
    assert figures.ratio == pytest.approx(0.75)
    assert figures.cpu_difference == pytest.approx(0.001)
    record = figures.record(8, None)
    assert [each["seconds"] for each in record["http"]] == [2, 4, 100]
    assert record["http"][0]["gaps"] == {"count": 2, "p10": 0.25, "p50": 0.25, "p90": 0.5, "p99": 0.5, "p100": 0.5}
    assert "0.75" in figures.line(8, 0.005)


def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def contender(name: str) -> serving.Run:
        def run(burst: Burst) -> Sample:
            if burst.probed:
                return replace(sample(), probes=[len(order)])
            order.append(name)
            return sample(seconds=len(order))

        return run

    pairs = [serving.Pair(interval, contender(f"http {interval}"), contender("direct")) for interval in (1, 2)]
    first, second = serving.take_turns(pairs, streams=3, rounds=2)
    assert order[4:8] == ["http 1", "direct", "http 2", "direct"]
    assert order[8:12] == order[7:3:-1]
    assert [each.seconds for each in first.http] == [5, 12]
    assert [each.seconds for each in second.direct] == [8, 9]
    assert [each.probes for each in second.direct] == [[8], [9]]


def test_chunks_are_put_together_whatever_they_hold() -> None:
    assert dechunked(b"6\r\nda\r\nta\r\nb\r\n: {\r\n0\r\n\r\n1\r\n0\r\n\r\n") == b"da\r\nta: {\r\n0\r\n\r\n1"
    events = Reply(200, {}, b'data: {"a": 1}\n\n: ping\n\ndata: {"a": 2}\n\ndata: [DONE]\n\n').events
    assert events == [{"a": 1}, {"a": 2}]


def test_the_cpu_time_of_a_process_is_that_which_it_counts_itself() -> None:
    before, seen, behind = time.process_time(), cpu_seconds(os.getpid()), time.process_time()
    assert before <= seen <= behind


def test_a_device_that_is_imitated_takes_its_time_for_every_step() -> None:
    with DirectProcess(Settings(step_seconds=0.02)) as direct:
        found = Sample(**direct.ask(asdict(Burst(streams=2, tokens=5))))
    assert found.tokens == 10
    assert found.seconds >= 5 * 0.02


def test_http_is_measured_beside_its_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "serving.json"
    monkeypatch.setattr(serving, "tokens_of", lambda streams: 20)
    options = ["--streams", "1", "3", "--rounds", "2", "--out", str(file)]
    monkeypatch.setattr(sys, "argv", ["serving", *options])
    serving.main()
    record = json.loads(file.read_text(encoding="utf-8"))
    assert [each["streams"] for each in record["results"]] == [1, 3]
    for result in record["results"]:
        for side in ("http", "direct"):
            assert len(result[side]) == 2
            assert all(each["tokens"] == 20 * result["streams"] for each in result[side])
            assert all(each["probes"] for each in result[side])
            assert all(len(each["first"]) == result["streams"] for each in result[side])
            assert all(each["cpu_seconds"] > 0 for each in result[side])
    assert len(capsys.readouterr().out.splitlines()) == 4
