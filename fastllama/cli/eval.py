"""`fastllama eval`: runs lm-eval benchmarks on this runtime."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fastllama.bench.files import output_file, write_record
from fastllama.cli.options import (
    add_capacity_options,
    add_model_options,
    add_quantize_option,
    add_runtime_options,
    add_seed_option,
    check_names,
    failure_in_words,
    load,
)
from fastllama.cli.parser import add_command as add
from fastllama.errors import ExtraRequiredError, check_range, why_unusable

DETAILS = """Runs tasks of EleutherAI's lm-evaluation-harness (pip install 'fastllama[eval]') and prints its table: each
metric with its standard error. A folder selects all tasks and groups that its yaml files define; a name or pattern
given with it selects among those. Other names and patterns are lm-eval's own tasks, most of which download their data.
Log-likelihoods are defined as in lm-eval's `hf` model; the choices of one question share the keys and values of its
context through the prefix cache."""


def add_command(commands: Any) -> None:
    """Define the subcommand."""
    parser = add(
        commands,
        "eval",
        "measure a model on benchmarks of lm-eval",
        run,
        details=DETAILS,
        examples=(
            "--tasks hellaswag,arc_easy --model meta-llama/Llama-3.2-1B",
            "--tasks path/to/tasks --quantize int8",
            "--tasks gsm8k --model path/to/chat-model --apply-chat-template --limit 100 --json",
        ),
    )
    parser.add_argument(
        "--tasks", required=True, metavar="T", help="folders of task files, task names or patterns, separated by commas"
    )
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="ask only the first N questions of each task (default: all)"
    )
    parser.add_argument(
        "--apply-chat-template", action="store_true", help="format questions with the tokenizer's chat template"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--output", type=output_file, metavar="FILE", help="write that object to a file, too")
    parser.add_argument("--quiet", action="store_true", help="print no progress and no statistics")
    add_model_options(parser)
    add_quantize_option(parser)
    add_runtime_options(parser, speculation=False)
    add_capacity_options(parser)
    add_seed_option(
        parser.add_argument_group("sampling"), default=0, help="random seed of tasks that sample (default 0)"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate, and return the exit status."""
    folders, names = _folders_and_names(args.tasks)
    for name, least in (("num_fewshot", 0), ("limit", 1)):
        if getattr(args, name) is not None:
            check_range(f"--{name.replace('_', '-')}", getattr(args, name), least)
    check_names(args)
    if why_unusable("lm_eval"):
        raise ExtraRequiredError("fastllama eval", "lm_eval", "eval")
    from fastllama.integrations.lm_eval import FastLlamaLM
    from fastllama.integrations.lm_eval.tasks import evaluate, load_tasks, no_bars, table

    with no_bars() if args.quiet else nullcontext():
        tasks = load_tasks(folders, names)
        loaded = load(args)
        model = FastLlamaLM(loaded.llm)
        with failure_in_words():
            results = evaluate(
                model,
                tasks,
                num_fewshot=args.num_fewshot,
                limit=args.limit,
                apply_chat_template=args.apply_chat_template,
            )
    report = json.dumps({"model": loaded.name, **results}, default=str)
    print(report if args.json else table(results), flush=True)
    if args.output is not None:
        write_record(args.output, json.loads(report))  # after printing, so that a full disk loses no results
    if not args.quiet:
        print(loaded.describe(), file=sys.stderr)
        cached = f"{model.num_cached_tokens:,} of them from the prefix cache"
        print(f"{model.num_prompt_tokens:,} prompt tokens, {cached}", file=sys.stderr)
    return 0


def _folders_and_names(given: str) -> tuple[list[Path], list[str]]:
    """Splits --tasks into folders, which must exist and hold yaml files, and names."""
    folders, names = [], []
    for word in filter(None, map(str.strip, given.split(","))):
        path = Path(word).expanduser()
        if not path.is_dir() and os.sep not in word and not word.startswith("."):
            names.append(word)
        elif not path.is_dir():
            raise FileNotFoundError(f"--tasks {word}: there is no such folder")
        elif next(path.glob("**/*.yaml"), None) is None:
            raise ValueError(f"--tasks {word} holds no task; legal: a folder with task files of lm-eval, *.yaml")
        else:
            folders.append(path)
    if not folders and not names:
        raise ValueError(f"--tasks is {given!r}; legal: folders, task names or patterns, separated by commas")
    return folders, names
