"""`fastllama generate`: one prompt, its completion as it comes."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from fastllama.cli.options import (
    Loaded,
    add_model_options,
    add_quantize_option,
    add_runtime_options,
    add_sampling_options,
    load,
    no_numbers,
    sampling_params,
)
from fastllama.cli.parser import add_command as add
from fastllama.cli.text import read_prompt
from fastllama.cli.timings import Timings
from fastllama.runtime.outputs import CompletionOutput, RequestOutput
from fastllama.runtime.params import SamplingParams

DETAILS = """Prints the prompt and, as it comes, what the model writes after it; statistics go to standard error.
Of a file or standard input, the newline at the end is no part of the prompt. Without a prompt, as with an
empty one, the model begins a text of its own. With --n above 1, the samples are printed when all are finished."""


def add_command(commands: Any) -> None:
    """Define the subcommand."""
    parser = add(
        commands,
        "generate",
        "complete a text",
        run,
        details=DETAILS,
        examples=(
            '--prompt "Once upon a time"',
            "--prompt-file story.txt --temperature 0 --max-tokens 100",
            "--model meta-llama/Llama-2-7b-hf --n 3 --json - < story.txt",
            "--prompt-file code.py --temperature 0 --speculation prompt_lookup",
        ),
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", default="", metavar="TEXT", help="text to complete")
    source.add_argument("--prompt-file", metavar="F", help="file that holds it, in UTF-8")
    source.add_argument("stdin", nargs="?", metavar="-", help="read it from standard input")
    parser.add_argument("--n", type=int, default=1, metavar="N", help="samples to draw (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: text, token_ids, finish_reason...")
    parser.add_argument("--quiet", action="store_true", help="print no statistics")
    add_model_options(parser)
    add_quantize_option(parser)
    add_runtime_options(parser)
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> int:
    """Generate, and return the exit status."""
    params = sampling_params(args, n=args.n)
    prompt = _prompt(args)
    loaded = load(args)
    if args.json:
        (output,) = loaded.llm.generate(prompt, params)
    elif params.n == 1:
        output = _stream(loaded, prompt, params)
    else:
        (output,) = loaded.llm.generate(prompt, params)
        for sample in output.outputs:
            print(f"[{sample.index + 1}/{params.n}] {prompt}{sample.text}\n", flush=True)
    for sample in output.outputs:
        if sample.finish_reason == "error":
            raise ValueError(no_numbers(sample))
    if args.json:
        print(json.dumps(_as_json(loaded, prompt, params, output)), flush=True)
    elif not args.quiet:
        reasons = ", ".join(str(sample.finish_reason) for sample in output.outputs)
        print(loaded.describe(), file=sys.stderr)
        print(f"{Timings.of(output).describe()}; finish: {reasons}; seed {params.seed}", file=sys.stderr)
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.stdin not in (None, "-"):
        raise ValueError(f"unknown argument {args.stdin!r}; legal: '-' for standard input; a text goes behind --prompt")
    path = args.stdin or args.prompt_file
    return str(args.prompt) if path is None else read_prompt(path)


def _stream(loaded: Loaded, prompt: str, params: SamplingParams) -> RequestOutput:
    generation = loaded.llm.start(prompt, params)
    print(prompt, end="", flush=True)
    for piece in loaded.llm.follow(generation):
        print(piece, end="", flush=True)
    print(flush=True)
    return generation.output()


def _as_json(loaded: Loaded, prompt: str, params: SamplingParams, output: RequestOutput) -> dict[str, Any]:
    """text, token_ids, finish_reason and stop_reason of the one sample, or of each in `samples`."""
    model = loaded.llm.engine.model
    samples = [_sample_as_json(sample) for sample in output.outputs]
    return {
        "model": loaded.name,
        "dtype": str(model.dtype).split(".")[1],
        "device": str(model.device),
        "backend": loaded.backend,
        "prompt": prompt,
        "prompt_token_ids": output.prompt_token_ids,
        **(samples[0] if params.n == 1 else {"samples": samples}),
        "seed": params.seed,
        "timings": {"load_s": loaded.seconds, **Timings.of(output).as_json()},
    }


def _sample_as_json(sample: CompletionOutput) -> dict[str, Any]:
    names = ("text", "token_ids", "finish_reason", "stop_reason")
    return {name: getattr(sample, name) for name in names}
