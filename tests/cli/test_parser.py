"""Command-line arguments as people type them: texts that begin with a dash, short options, other programs' names."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from fastllama.cli import hints, main
from tests.cli.conftest import Command


def parse(*words: str) -> argparse.Namespace:
    return main._parser().parse_args(words)


def refusal(*words: str) -> str:
    with pytest.raises(ValueError, match=r"\(see fastllama") as refused:
        parse(*words)
    return str(refused.value)


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Every subcommand's."""
    if parser._subparsers is None:
        yield parser
        return
    for each in parser._subparsers._group_actions[0].choices.values():
        yield from parsers(each)


@pytest.mark.parametrize("text", ["-hello", "-", "--", "-5", "--what is this", "-x=3", "--max-tokenz", "", "a", "-tag"])
@pytest.mark.parametrize(
    ("command", "option", "name"),
    [
        ("generate", "--prompt", "prompt"),
        ("generate", "-p", "prompt"),
        ("generate", "--stop", "stop"),
        ("chat", "--system", "system"),
    ],
)
def test_a_text_may_begin_with_dashes(command: str, option: str, name: str, text: str) -> None:
    for words in ((option, text), (f"{'--prompt' if option == '-p' else option}={text}",)):
        found = getattr(parse(command, *words, "--quiet"), name)
        assert found == ([text] if name == "stop" else text)


def test_a_text_that_is_left_out_is_no_option_taken_for_one() -> None:
    expected = "expected a value, not the option --quiet; a text that begins like this is given as --prompt=--quiet"
    assert expected in refusal("generate", "--prompt", "--quiet")
    assert parse("generate", "--prompt=--quiet").prompt == "--quiet"


@pytest.mark.parametrize("number", ["-1", "-1.5", "-1e-3", "-inf"])
def test_numbers_may_be_negative(number: str) -> None:
    assert parse("generate", "--presence-penalty", number).presence_penalty == float(number)


def test_the_short_options_are_those_of_llama_cpp() -> None:
    short = parse("generate", "-m", "a", "-p", "b", "-n", "7", "-c", "9", "-s", "3", "-e", "--n", "2")
    assert vars(short) == vars(
        parse(
            *("generate", "--model", "a", "--prompt", "b", "--max-tokens", "7"),
            *("--max-model-len", "9", "--seed", "3", "--escape", "--n", "2"),
        )
    )
    assert (short.max_tokens, short.n) == (7, 2)
    assert parse("generate", "-n7", "-pfoo=bar").prompt == "foo=bar"
    assert parse("generate", "-f", "x").prompt_file == "x"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("generate --n-predict 5", "did you mean --max-tokens?"),
        ("generate --max-new-tokens 5", "did you mean --max-tokens?"),
        ("generate --max_tokens 5", "did you mean --max-tokens?"),
        ("generate --ctx-size=512", "did you mean --max-model-len?"),
        ("generate --temp 1", "did you mean --temperature?"),
        ("generate -hf owner/name", "did you mean --model?"),
        ("generate -p x -ngl 99", "did you mean --device?"),
        ("generate --repeat-penalty 1.1", "did you mean --repetition-penalty?"),
        ("generate -prompt x", "did you mean --prompt?"),
        ("generate -p x -t 8", "threads are torch's: set OMP_NUM_THREADS"),
        ("generate -p x -t8", "threads are torch's: set OMP_NUM_THREADS"),
        ("generate --system x", "fastllama chat takes a system message"),
        ("chat --system-prompt x", "did you mean --system?"),
        ("chat -p x", "fastllama generate takes a prompt"),
        ("generate --file x", "a prompt comes from --prompt-file, and the text of fastllama perplexity from --file"),
        ("chat --lora x", "did you mean --adapter?"),
        ("bench decode -b 8", "did you mean --batch?"),
        ("bench runtime --request-rate 8", "did you mean --loads?"),
        (
            "--prompt x",
            "options follow one of generate, chat, serve, info, quantize, verify, perplexity, eval, bench",
        ),
        ("bench --shape tiny decode", "options follow one of runtime, decode, ops"),
    ],
)
def test_an_option_of_another_program_is_answered_with_its_name_here(words: str, says: str) -> None:
    assert f"; {says} (see " in refusal(*words.split())


@pytest.mark.parametrize("word", ["-z", "-x5", "--port", "--host", "--mlock", "--ignore-eos", "--batch-size"])
def test_an_option_like_none_gets_no_hint(word: str) -> None:
    said = refusal("generate", "-p", "x", word, "3")
    assert f"unknown argument {word!r}" in said
    assert "did you mean" not in said


def test_every_option_that_is_hinted_at_exists_somewhere_and_is_no_others_name() -> None:
    known = {option for parser in parsers(main._parser()) for option in parser._option_string_actions}
    assert set(hints._SAME) <= known
    for ours, theirs in hints._SAME.items():
        assert not known & set(theirs), f"{ours}: {known & set(theirs)} exist, and would never be asked for"


def test_help_is_not_offered_for_a_short_option_that_is_unknown(command: Command) -> None:
    for letter in "abdgijkloqrtuvwxyzABCDEFGHIJKLNOPQRSUVWXYZ":
        assert "did you mean -h" not in command("generate", f"-{letter}").err
