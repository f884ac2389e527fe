"""Argument parsing in which a mistake is one sentence, and an unknown option names its neighbour."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from fastllama.errors import nearest


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError instead of printing its usage, and knows no abbreviated options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")

    # Overridden here and not in parse_args, since this is what runs for a subcommand, with its own options.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            hint = nearest(unknown[0].split("=")[0], self._option_string_actions)
            self.error(f"unknown argument {unknown[0]!r}" + (f"; did you mean {hint}?" if hint else ""))
        return namespace, unknown


def add_command(
    commands: Any, name: str, summary: str, run: Any, *, details: str = "", examples: tuple[str, ...]
) -> Parser:
    """A subcommand that runs `run(args) -> exit status`; None where it has subcommands of its own that do.

    name: with those it is one of, as in "bench runtime". examples: the arguments of calls to show in its help.
    """
    shown = "\n".join(["examples:", *(f"  fastllama {name}{' ' if line else ''}{line}" for line in examples)])
    description = f"{summary[0].upper()}{summary[1:]}." + (f"\n\n{details}" if details else "")
    parser: Parser = commands.add_parser(name.split()[-1], help=summary, description=description, epilog=shown)
    parser.set_defaults(run=run, quiet=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and log more")
    return parser
