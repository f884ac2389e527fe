"""The reference tokens that a GPU run is compared with: a CPU reproduces them, and differences must be near ties."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.gpu import answers
from fastllama import LLM
from fastllama.kernels import reference

EXPECTED = json.loads(answers.FILE.read_text(encoding="utf-8"))


def test_the_file_is_what_the_reference_gives(force: Callable[[str], None]) -> None:
    """Three prompts of it, 20 tokens each."""
    force("reference")
    with LLM("tiny", dtype="float32", device="cpu", progress=False) as llm:
        found = answers.answers(llm, 3, 20)
    assert found == {kind: [answer[:20] for answer in EXPECTED[kind][:3]] for kind in found}


def test_the_file_is_whole() -> None:
    assert set(EXPECTED) == {"greedy", "sampled", "gaps"}
    for carried in (EXPECTED["greedy"], EXPECTED["sampled"], *EXPECTED["gaps"].values()):
        assert [len(answer) for answer in carried] == [answers.NUM_TOKENS] * len(answers.PROMPTS)
    assert EXPECTED["greedy"] != EXPECTED["sampled"]
    # So few tokens are near a tie that a wrong kernel cannot pass as one.
    for kind, tie in answers.TIES.items():
        assert sum(gap < tie for gaps in EXPECTED["gaps"][kind] for gap in gaps) <= 2


@pytest.fixture
def changed() -> Callable[..., dict[str, Any]]:
    """`changed(kind, (prompt, place), ...)`: how answers compare in which these tokens differ."""

    def changed(kind: str, *places: tuple[int, int], gap: float | None = None) -> dict[str, Any]:
        expected = json.loads(json.dumps(EXPECTED))
        found = {name: json.loads(json.dumps(expected[name])) for name in ("greedy", "sampled")}
        for prompt, place in places:
            found[kind][prompt][place] += 1
            if gap is not None:
                expected["gaps"][kind][prompt][place] = gap
        return answers.compared(found, expected)

    return changed


def test_equal_tokens_are_right(changed: Callable[..., dict[str, Any]]) -> None:
    found = changed("greedy")
    assert (found["right"], found["equal"], found["answers"]) == (True, 16, 16)


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_a_token_turns_only_at_a_tie(kind: str, changed: Callable[..., dict[str, Any]]) -> None:
    found = changed(kind, (2, 7), gap=0.9 * answers.TIES[kind])
    assert (found["right"], found["ties"], found["equal"]) == (True, 1, 15)
    found = changed(kind, (2, 7), gap=0.3)
    assert (found["right"], found["ties"]) == (False, 0)
    assert found["differences"] == [{"kind": kind, "prompt": 2, "token": 7, "gap": 0.3}]


def test_the_first_difference_of_an_answer_counts(changed: Callable[..., dict[str, Any]]) -> None:
    """After the first difference all tokens may differ."""
    found = changed("sampled", (0, 3), (0, 4), gap=0.3)
    assert [(each["prompt"], each["token"]) for each in found["differences"]] == [(0, 3)]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_margin_is_the_distance_to_another_token(top_p: float) -> None:
    """Probabilities that move by less than half of the margin give the same token; by some more, another."""
    generator, rows = torch.Generator().manual_seed(0), 40
    logits = torch.randn(1, 12, generator=generator).double().expand(rows, -1)
    common = {
        "temperature": torch.ones(rows),
        "top_k": torch.zeros(rows, dtype=torch.int32),
        "min_p": torch.zeros(rows),
    }
    drawn = {"top_p": torch.full((rows,), top_p), "seed": torch.arange(rows), "offset": torch.arange(rows)}
    margins = answers.margins(logits, **common, **drawn)
    assert (margins > 0).all()
    probs = torch.softmax(logits, -1)
    before = reference.sample(logits, **common, **drawn)[0]
    for _ in range(50):
        moved = torch.randn(rows, 12, generator=generator).double()
        moved -= moved.mean(-1, keepdim=True)
        # All sums together move by less than a quarter of the margin, and the total of what is kept as little.
        moved *= margins[:, None] / 4 / moved.abs().sum(-1, keepdim=True)
        assert torch.equal(reference.sample((probs + moved).clamp(min=0).log(), **common, **drawn)[0], before)
    if top_p == 1:
        mass, number = probs.cumsum(-1), reference.sampling.philox(drawn["seed"], drawn["offset"])[:, None].double()
        assert torch.allclose(margins, (mass - number).abs().amin(-1))
    else:  # a filter that cuts beside a sum of the ranked probabilities may keep one token more
        beside = probs.sort(-1, descending=True).values.cumsum(-1)[:, 5] + 1e-7
        assert (answers.margins(logits, **common, **drawn | {"top_p": beside}) <= 1.01e-7).all()
