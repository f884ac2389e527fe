"""Throughput: turns, the round that is not counted, answers that differ, and peers that fail."""

from __future__ import annotations

import statistics

import pytest

from fastllama.bench import throughput
from fastllama.bench.workload import Prompts


def test_contenders_take_turns_and_are_compared_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(second**2) for second in range(99))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    calls: list[str] = []

    def contender(name: str, answer: int) -> throughput.Contender:
        def run(prompts: Prompts, tokens: int) -> Prompts:
            calls.append(name)
            return [[answer] * tokens, [5] * tokens]

        return run

    said: list[str] = []
    contenders = {"ours": contender("a", 3), "same": contender("b", 3), "other": contender("c", 4)}
    found = throughput.throughput(contenders, [[1], [2]], 2, 2, said.append)
    assert "".join(calls) == "abc" * 3
    assert [found[name]["different"] for name in contenders] == [0, 0, 1]
    # The clock reads n * n: its k-th pair of readings is 4 * k + 1 apart, and the first round's three do not count.
    assert found["ours"]["seconds"] == [13, 25]
    assert found["other"]["seconds"] == [21, 33]
    for figures in found.values():
        assert figures["requests_per_second"] == 2 / statistics.median(figures["seconds"])
    assert said == ["throughput: warm-up", "throughput: round 1 of 2", "throughput: round 2 of 2"]


def test_a_peer_that_fails_is_named_and_not_called_again() -> None:
    calls: list[int] = []

    def broken(prompts: Prompts, tokens: int) -> Prompts:
        calls.append(1)
        raise RuntimeError("no such graph")

    found = throughput.throughput({"ours": lambda *_: [[1]], "peer": broken}, [[1]], 1, 2, lambda line: None)
    assert found["peer"] == {"failed": "RuntimeError: no such graph"}
    assert len(calls) == 1
    assert len(found["ours"]["seconds"]) == 2
    with pytest.raises(RuntimeError, match="no such graph"):
        throughput.throughput({"ours": broken}, [[1]], 1, 2, lambda line: None)
