"""Messages: names from files in one line that a terminal can show, unknown options with what helps."""

from __future__ import annotations

import pytest

from fastllama.errors import reject_unknown, shown


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


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("seeds", "seeds'; did you mean 'seed'? Legal options: seed, stop, min_tokens"),
        ("stops", "stops'; did you mean 'stop'? Legal options: seed, stop, min_tokens"),
        ("best_of", "best_of'; legal options: seed, stop, min_tokens"),
        ("block_size", "block_size'; legal options: seed, stop, min_tokens"),
        ("max_tokens", "max_tokens'; did you mean 'min_tokens'? Legal options: seed, stop, min_tokens"),
    ],
)
def test_an_unknown_option_names_one_that_is_really_alike_and_all_that_are_legal(word: str, said: str) -> None:
    with pytest.raises(TypeError) as refused:
        reject_unknown("Thing", [word], ["seed", "stop", "min_tokens"])
    assert str(refused.value) == f"Thing got an unknown option '{said}"


def test_a_hint_of_the_callers_own_comes_before_the_legal_options() -> None:
    with pytest.raises(TypeError, match=r"^Thing got an unknown option 'a'; ask b\. Legal options: c, d$"):
        reject_unknown("Thing", ["a", "x"], ["c", "d"], lambda word, legal: f"ask {'b' if word == 'a' else legal}.")
    with pytest.raises(TypeError, match=r"^Thing got an unknown option 'a'; legal options: c$"):
        reject_unknown("Thing", iter(["a"]), ["c"], lambda word, legal: None)
    reject_unknown("Thing", [], ["c"])
