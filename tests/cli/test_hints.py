"""Options of other programs that are parameters in Python too are explained from one table."""

from __future__ import annotations

import pytest

from fastllama.cli.hints import _SAME, hint
from fastllama.runtime.peer_names import names_here

OPTIONS = ("--max-tokens", "--max-model-len", "--temperature", "--n", "--seed", "--model", "--dtype", "--stop")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--max-new-tokens", "; did you mean --max-tokens?"),
        ("--max_new_tokens=5", "; did you mean --max-tokens?"),
        ("--max-length", "; did you mean --max-model-len?"),
        ("--torch-dtype", "; did you mean --dtype?"),
        ("--num-return-sequences", "; did you mean --n?"),
        ("--best-of", "; did you mean --n?"),
        ("--tensor-parallel-size", "; fastllama runs on one device"),
        ("--enforce-eager", "; decode steps are captured unless FASTLLAMA_GRAPHS=0"),
        ("--block-size", ""),  # pages have no option of the command
        ("--zzz", ""),
    ],
)
def test_an_option_is_named_as_it_is_here(word: str, said: str) -> None:
    assert hint(word, OPTIONS) == said


def test_no_name_stands_in_both_tables() -> None:
    twice = [
        theirs
        for ours, all_of_theirs in _SAME.items()
        for theirs in all_of_theirs
        if ours[2:].replace("-", "_") in names_here(theirs[2:].replace("-", "_"))
    ]
    assert twice == []
