"""Argument parsing with one-line errors; an unknown option suggests the most similar one."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from fastllama.cli.hints import hint, is_foreign
from fastllama.cli.text import argument as text


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Counts the indent of subcommands, as Python 3.13 does: before, the longest one wraps onto its own line."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        for each in self._iter_indented_subactions(action):
            length = len(str(each.metavar or each.dest)) + self._current_indent
            self._action_max_length = max(self._action_max_length, length)


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError instead of printing its usage, and accepts no abbreviated options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        named = re.sub(r"-\w/(--[\w-]+)", r"\1", message)  # "argument -m/--model": one name is enough
        raise ValueError(f"{named} (see {self.prog} --help)")

    # Overridden here and not in parse_args, since argparse calls this for a subcommand.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(self._joined(args))
        for word in self._own(words):
            self._check_known(word)
        namespace, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self._refuse(unknown[0])
        return namespace, unknown

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # Before Python 3.13 argparse drops a "--" here, also where it is an option's value: --prompt=--.
        if arg_strings == ["--"] and action.type is text:
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)

    def _joined(self, words: Sequence[str]) -> Iterator[str]:
        """The words; a value that looks like an option is joined to its option as NAME=VALUE, for argparse's sake."""
        rest = iter(words)
        for word in rest:
            action = self._option_string_actions.get(word)
            if action is None or action.type not in (text, int, float) or action.nargs is not None:
                yield word
                continue
            name, value = action.option_strings[-1], next(rest, None)
            if value is None:
                yield word
            elif value.split("=")[0] in self._option_string_actions:
                said = f"; a text that begins like this is given as {name}={value}" if action.type is text else ""
                self.error(f"argument {name}: expected a value, not the option {value}{said}")
            elif action.type is text or value.startswith("-"):
                yield f"{name}={value}"
            else:
                yield from (word, value)

    def _own(self, words: list[str]) -> Iterator[str]:
        """The option words of this parser, known or unknown, without those of a subcommand."""
        for word in words:
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                return
            if word.startswith("-") and word != "-" and not re.match(r"-\.?\d", word):
                yield word

    def _check_known(self, word: str) -> None:
        """Raise for an unknown option, before argparse takes the word after it for a positional argument."""
        name, known = word.split("=")[0], self._option_string_actions
        attached = not name.startswith("--") and f"-{name}" not in known and not is_foreign(name)  # as in -n5
        if name not in known and not (attached and name[:2] in known):
            self._refuse(word)

    def _refuse(self, word: str) -> NoReturn:
        if self._subparsers is not None and word.startswith("-"):
            (commands,) = self._subparsers._group_actions
            order = f"; options follow one of {', '.join(commands.choices or ())}"
            self.error(f"unknown argument {word!r}{order}")
        self.error(f"unknown argument {word!r}{hint(word, self._option_string_actions)}")


def add_command(
    commands: Any, name: str, summary: str, run: Any, *, details: str = "", examples: tuple[str, ...]
) -> Parser:
    """Add a subcommand. run: `run(args) -> exit status`; None where it has subcommands of its own.

    name: with its parents, as in "bench runtime". examples: argument lists of example calls, for the help.
    """
    shown = "\n".join(["examples:", *(f"  fastllama {name}{' ' if line else ''}{line}" for line in examples)])
    description = f"{summary[0].upper()}{summary[1:]}." + (f"\n\n{details}" if details else "")
    parser: Parser = commands.add_parser(name.split()[-1], help=summary, description=description, epilog=shown)
    parser.set_defaults(run=run, quiet=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and log debug messages")
    return parser
