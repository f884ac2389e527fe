"""`fastllama verify`: checks ops, layers, logits and tokens of a model on this device against fp64 references."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fastllama.cli.options import add_model_options, check_names
from fastllama.cli.parser import add_command as add

DISAGREEMENT = 1
DETAILS = """Compares with explicit formulas in fp64: every op on a few shapes; then, on a held-out text and through the
whole runtime, the hidden states after each layer, the logits, and 32 greedy tokens, once in eager steps and once in
replayed ones; and the weights with the checkpoint. The bound of an error is twice the error of plain torch in the same
dtype, measured in the same run, plus one rounding. Greedy tokens must equal the reference's in float32; in 16 bits they
may differ where its logits tie within that bound. Errors are relative to the largest value of a row. Extra memory is
one matrix in fp64; a 7B model takes minutes on a CPU. With --against transformers, layers, logits and tokens are
compared with the transformers library instead, which reads the checkpoint itself, so that a misread configuration is
found, most precisely in float32. Its own errors add to ours: bounds are more than twice as wide, and it holds a second
copy of the model in memory. The exit status is 1 if anything disagrees."""


def add_command(commands: Any) -> None:
    """Define the subcommand."""
    parser = add(
        commands,
        "verify",
        "check every op, layer, logit and token against a reference in fp64",
        run,
        details=DETAILS,
        examples=(
            "",
            "--model path/to/model --dtype float32",
            "--model path/to/model --against transformers",
            "--device cuda --quiet",
        ),
    )
    parser.add_argument(
        "--against",
        choices=("formulas", "transformers"),
        default="formulas",
        help="reference for layers, logits and tokens (default: formulas)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--quiet", action="store_true", help="print one line: the counts, or the disagreements")
    add_model_options(parser, adapter=False)


def run(args: argparse.Namespace) -> int:
    """Print the report, and return the exit status."""
    check_names(args)
    from fastllama.verify import check

    report = check(
        args.model,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        device=args.device,
        against=args.against,
        progress=False if args.quiet else None,
    )
    if args.json:
        print(json.dumps(report.as_json()))
    else:
        print(report.summary() if args.quiet else report.table())
    return 0 if report.ok else DISAGREEMENT
