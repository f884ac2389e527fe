"""docs/use/parameters.md: its names are those of peer_names and of SamplingParams, and its example runs."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllama import LLM, SamplingParams
from fastllama.runtime.peer_names import instead, names_here

PAGE = (Path(__file__).parents[2] / "docs/use/parameters.md").read_text(encoding="utf-8")
ROWS = [
    tuple(cell.strip() for cell in line.strip("|").split("|")) for line in PAGE.splitlines() if line.startswith("| `")
]
OURS = {*inspect.signature(LLM).parameters, *(field.name for field in dataclasses.fields(SamplingParams))}
NAMED = [
    (theirs, ours) for row in ROWS if len(row) == 3 for theirs in re.findall(r"`(\w+)`", row[0]) for ours in [row[1]]
]


@pytest.mark.parametrize(("theirs", "ours"), NAMED)
def test_a_name_of_the_page_is_that_of_the_error(theirs: str, ours: str) -> None:
    name = ours.strip("`")
    if not name:
        assert instead(theirs) is not None
    else:
        assert name in OURS
        assert theirs in OURS or name in names_here(theirs)


def test_what_the_page_lists_as_missing_has_a_sentence() -> None:
    section = PAGE.split("## What is not there")[1].split("```")[0]
    words = {
        word
        for line in section.splitlines()
        if line.startswith("|")
        for word in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert len(words) > 8
    assert {word for word in words if instead(word) is None} == set()


def test_every_field_is_on_the_page() -> None:
    assert {field.name for field in dataclasses.fields(SamplingParams) if f"`{field.name}" not in PAGE} == set()


def test_the_example_allows_its_answers_and_nothing_else() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    yes, no = names["answers"]
    logits = torch.randn(names["llm"].config.vocab_size)
    for generated in ([], yes[:1], no[:1]):
        masked = names["one_of"](list(generated), logits)
        allowed = {answer[len(generated)] for answer in (yes, no) if answer[: len(generated)] == generated}
        assert {token for token in range(len(logits)) if masked[token] != -math.inf} == allowed
        assert all(masked[token] == logits[token] for token in allowed)
    names["llm"].close()
