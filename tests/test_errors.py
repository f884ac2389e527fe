"""Error messages: names from files shown in one printable line, unknown options with the nearest legal one."""

from __future__ import annotations

import pytest

from fastllama.errors import brief, check_choice, check_range, reject_unknown, shown


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
        ("min_tokens_range", "min_tokens_range'; legal options: seed, stop, min_tokens"),
        ("the_min_tokens", "the_min_tokens'; legal options: seed, stop, min_tokens"),
        ("min_tokens_", "min_tokens_'; did you mean 'min_tokens'? Legal options: seed, stop, min_tokens"),
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


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, "3"),
        (-(2**1000), repr(-(2**1000))),
        (10**5000, "an integer of 5001 digits"),
        (-(10**5000), "minus an integer of 5001 digits"),
        ({"max_tokens": 3}, "{'max_tokens': 3}"),
        ("it's", '"it\'s"'),
        ([1, [10**5000]], "[1, [an integer of 5001 digits]]"),
    ],
    ids=["int", "long int", "huge int", "huge negative", "dict", "string", "nested"],
)
def test_a_value_is_shown_as_it_is_written(value: object, expected: str) -> None:
    assert brief(value) == (expected if len(expected) <= 200 else f"{expected[:100]}...{expected[-100:]}")


@pytest.mark.parametrize(
    "value", ["x" * 10**7, ["x"] * 10**6, {i: i for i in range(10**5)}, b"x" * 10**6, [["a" * 999] * 99] * 99]
)
def test_a_long_value_is_shown_short(value: object) -> None:
    assert len(brief(value)) <= 203
    with pytest.raises(TypeError) as refused:
        check_range("x", value, 0)  # type: ignore[arg-type]
    assert len(str(refused.value)) < 300
    with pytest.raises(ValueError, match=r"legal values: 'a'$") as unknown:
        check_choice("x", value, ["a"])
    assert len(str(unknown.value)) < 300


def test_an_integer_of_any_length_is_out_of_range_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"^x is minus an integer of 5001 digits; legal: at least 0$"):
        check_range("x", -(10**5000), 0)
