"""docs/use/commands.md is what tools/commands.py writes, and holds every option of every command."""

from __future__ import annotations

import argparse
import re

import pytest

from fastllama.cli.main import _parser
from tools.commands import PAGE, _commands, _default, _meaning, _section, _spelled, page


def option(*names: str, **settings: object) -> argparse.Action:
    return argparse.ArgumentParser().add_argument(*names, **settings)  # type: ignore[arg-type]


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"


def test_every_command_and_option_is_on_the_page() -> None:
    text = page()
    for parser, summary in _commands(_parser()):
        section = text.split(f"\n## {parser.prog}\n")[1].split("\n## ")[0]
        assert summary[1:] in section
        rows = "".join(line for line in section.splitlines() if line.startswith("| `"))
        names = {name for name in parser._option_string_actions if name not in ("-h", "--help", "--debug")}
        assert {name for name in names if not re.search(rf"`{re.escape(name)}[` ]", rows)} == set()


def test_the_terminal_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = page()
    monkeypatch.setenv("COLUMNS", "40")
    assert page() == before


@pytest.mark.parametrize(
    ("action", "cells"),
    [
        (option("-c", "--count", type=int, default=3, help="how many"), ("`-c`, `--count COUNT`", "`3`", "how many")),
        (
            option("--n", metavar="N", help="so many (default 4; 0: all); more"),
            ("`--n N`", "4; 0: all", "so many; more"),
        ),
        (option("--kind", default="a", choices=("a", "b"), help="which"), ("`--kind {a,b}`", "`a`", "which")),
        (option("--to", help="where (default: here (or there))"), ("`--to TO`", "here (or there)", "where")),
        (
            option("--quiet", action="store_true", help="no *bars* | lines"),
            ("`--quiet`", "off", r"no \*bars\* \| lines"),
        ),
        (option("--loads", nargs="*", metavar="L", help="of all"), ("`--loads [L ...]`", "", "of all")),
        (
            option("--name", nargs="+", default=[], required=True, help="all"),
            ("`--name NAME ...`", "", "required: all"),
        ),
        (option("DST", help="folder"), ("`DST`", "", "folder")),
    ],
    ids=lambda value: value.dest if isinstance(value, argparse.Action) else "",
)
def test_a_row(action: argparse.Action, cells: tuple[str, str, str]) -> None:
    assert (_spelled(action), _default(action), _meaning(action)) == cells


def test_the_usage_names_what_must_be_given() -> None:
    parser = argparse.ArgumentParser(prog="fastllama mix", epilog="examples:\n  fastllama mix a b")
    parser.add_argument("SRC")
    parser.add_argument("--how", required=True, metavar="H")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--file", metavar="F")
    either.add_argument("stdin", nargs="?", metavar="-")
    lines = _section(parser, "mix two models").splitlines()
    assert lines[:7] == [
        "## fastllama mix",
        "",
        "Mix two models.",
        "",
        "Usage: `fastllama mix [OPTIONS] [--file F | -] --how H SRC`",
        "",
        "```bash",
    ]
    assert lines[7] == "fastllama mix a b"
