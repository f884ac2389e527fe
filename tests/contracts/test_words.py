"""Contract: prose uses the field's words, not this project's own (tools/words.py holds the glossary)."""

from __future__ import annotations

import pytest

from tools import words

# Argument names in a schema and a message, and a prompt for the chat page's picture.
KEPT = {
    ("fastllama/kernels/ops/bf12.py", "Tensor codes, Tensor outliers, int exponent"),
    ("fastllama/kernels/ops/bf12.py", "codes has shape"),
    ("tools/page_shot.py", "Tell me a story about a fox."),
}


@pytest.mark.parametrize("place", ["fastllama", "benchmarks", "tools", "docs", "examples", "tests", "*.md"])
def test_no_word_of_the_glossary_is_left(place: str) -> None:
    files = words.files([place])
    assert files
    found = [hit for path in files for hit in words.hits(path)]
    assert [hit for hit in found if (hit.path, hit.text) not in KEPT] == []
