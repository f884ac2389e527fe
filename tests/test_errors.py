"""Names from files in messages: one line that a terminal can show."""

from __future__ import annotations

import pytest

from fastllama.errors import shown


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp", "model.layers.0.mlp"),
        ("модель 🦙", "модель 🦙"),
        ("\x1b[31mred\x1b[0m\n", r"\x1b[31mred\x1b[0m\n"),
        ("a\u2028b\u202ec\x7f", r"a\u2028b\u202ec\x7f"),
        ("x" * 100_000, f"{'x' * 100}...{'x' * 100}"),
    ],
)
def test_a_name_is_shown_in_one_line_without_control_characters(name: str, expected: str) -> None:
    assert shown(name) == expected
