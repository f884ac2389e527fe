"""The tokens that are carried to a GPU: what a CPU gives now, and what a difference there means."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.gpu import answers
from fastllama import LLM

EXPECTED = json.loads(answers.FILE.read_text(encoding="utf-8"))


def test_the_file_is_what_the_reference_gives(force: Callable[[str], None]) -> None:
    """Three prompts of it, 20 tokens each."""
    force("reference")
    with LLM("tiny", dtype="float32", device="cpu", progress=False) as llm:
        found = answers.answers(llm, 3, 20)
    assert found == {kind: [answer[:20] for answer in EXPECTED[kind][:3]] for kind in found}


def test_the_file_is_whole() -> None:
    assert set(EXPECTED) == {"greedy", "sampled", "gaps"}
    for carried in EXPECTED.values():
        assert [len(answer) for answer in carried] == [answers.NUM_TOKENS] * len(answers.PROMPTS)
    assert EXPECTED["greedy"] != EXPECTED["sampled"]
    # So few of the greedy tokens are near a tie that a wrong kernel cannot pass as one.
    assert sum(gap < answers.TIE for gaps in EXPECTED["gaps"] for gap in gaps) <= 2


@pytest.fixture
def changed() -> Callable[..., dict[str, Any]]:
    """`changed(kind, (prompt, place), ...)`: how answers compare in which these tokens differ."""

    def changed(kind: str, *places: tuple[int, int], gap: float | None = None) -> dict[str, Any]:
        expected = json.loads(json.dumps(EXPECTED))
        found = {name: json.loads(json.dumps(expected[name])) for name in ("greedy", "sampled")}
        for prompt, place in places:
            found[kind][prompt][place] += 1
            if gap is not None:
                expected["gaps"][prompt][place] = gap
        return answers.compared(found, expected)

    return changed


def test_equal_tokens_are_right(changed: Callable[..., dict[str, Any]]) -> None:
    found = changed("greedy")
    assert (found["right"], found["equal"], found["answers"]) == (True, 16, 16)


def test_a_greedy_token_turns_only_at_a_tie(changed: Callable[..., dict[str, Any]]) -> None:
    found = changed("greedy", (2, 7), gap=1e-4)
    assert (found["right"], found["ties"], found["equal"]) == (True, 1, 15)
    found = changed("greedy", (2, 7), gap=0.3)
    assert (found["right"], found["ties"]) == (False, 0)
    assert found["differences"] == [{"kind": "greedy", "prompt": 2, "token": 7, "gap": 0.3}]


def test_one_sampled_answer_may_turn_and_not_two(changed: Callable[..., dict[str, Any]]) -> None:
    assert changed("sampled", (0, 3))["right"]
    assert not changed("sampled", (0, 3), (5, 1))["right"]
