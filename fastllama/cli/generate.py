"""`fastllama generate`: completes one prompt, printed token by token."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fastllama.cli.options import (
    Loaded,
    add_model_options,
    add_quantize_option,
    add_runtime_options,
    add_sampling_options,
    check_names,
    describe_defaults,
    failure_in_words,
    load,
    sampling_params,
)
from fastllama.cli.parser import add_command as add
from fastllama.cli.text import argument, read_input, read_prompt, unescape
from fastllama.cli.timings import Timings
from fastllama.runtime.outputs import CompletionOutput, RequestOutput, TokenLogprob
from fastllama.runtime.params import SamplingParams

if TYPE_CHECKING:
    from fastllama.io.tokenizer import Tokenizer

FILL = "<FILL_ME>"
DETAILS = f"""Prints the prompt and, as it is generated, its completion; statistics go to standard error.
Without a prompt option, piped or redirected standard input is the prompt; where there is none, or the prompt is empty,
the model begins a new text. The last newline of a file or of standard input is not part of the prompt. A prompt with
{FILL} in it is infilled there, by a model trained for infilling (Code Llama).
With --n above 1, samples are printed when all are finished."""


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
    source.add_argument(
        "-p", "--prompt", type=argument, metavar="TEXT", help="text to complete, taken literally; see --escape"
    )
    source.add_argument("-f", "--prompt-file", metavar="F", help="file with the prompt, in UTF-8")
    source.add_argument("stdin", nargs="?", metavar="-", help="read the prompt from standard input")
    parser.add_argument(
        "-e", "--escape", action="store_true", help=r"interpret \n, \t, \\, \uHHHH ... in the prompt, as in --stop"
    )
    parser.add_argument(
        "--n", type=int, default=1, metavar="N", help="completions to sample (default 1); -n is --max-tokens"
    )
    parser.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="print each token's log-probability and those of the N likeliest tokens, as a table or in the JSON",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: text, token_ids, finish_reason...")
    parser.add_argument("--quiet", action="store_true", help="print no statistics")
    add_model_options(parser)
    add_quantize_option(parser)
    add_runtime_options(parser)
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> int:
    """Generate, and return the exit status."""
    more = {"n": args.n, "logprobs": args.logprobs}
    sampling_params(args, **more)
    check_names(args)
    prompt = _prompt(args)
    loaded = load(args)
    defaults = loaded.llm.sampling_defaults
    text = PromptText.of(prompt, loaded.tokenizer)
    params = sampling_params(args, defaults, **more, **text.ends)
    with failure_in_words():
        if params.n == 1 and not args.json:
            output = _stream(loaded, text, params)
        else:
            (output,) = loaded.llm.generate(text.given, params)
    if args.json:
        print(json.dumps(_as_json(loaded, prompt, params, output)), flush=True)
        return 0
    for sample in output.outputs:
        if params.n > 1:
            print(f"[{sample.index + 1}/{params.n}] {text.before}{sample.text}{text.after}\n", flush=True)
        if sample.logprobs is not None:
            print(f"\n{_table(loaded.tokenizer, sample.logprobs)}", flush=True)
    if not args.quiet:
        reasons = ", ".join(str(sample.finish_reason) for sample in output.outputs)
        print(loaded.describe(), file=sys.stderr)
        said = f"{Timings.of(output).describe()}; finish: {reasons}; seed {params.seed}"
        print(said + describe_defaults(args, defaults), file=sys.stderr)
        if prompt and loaded.tokenizer.chat_template is not None:  # llama.cpp's -p would apply it
            print(
                "--prompt is continued as plain text; fastllama chat applies the model's chat format", file=sys.stderr
            )
    return 0


@dataclass(frozen=True)
class PromptText:
    """The prompt for the runtime, the text before and after its answer, and the stop parameters that infilling adds."""

    before: str
    after: str
    given: str | list[int]
    ends: dict[str, Any]

    @classmethod
    def of(cls, prompt: str, tokenizer: Tokenizer) -> PromptText:
        """A prompt to continue, or to infill where it holds FILL. Raises ValueError where it holds FILL twice."""
        before, *after = prompt.split(FILL)
        if not after:
            return cls(prompt, "", prompt, {})
        if len(after) > 1:
            raise ValueError(f"the prompt holds {FILL} {len(after)} times; legal: once")
        ids = tokenizer.encode_infilling(before, after[0])
        assert tokenizer.infilling is not None
        return cls(before, after[0], ids, {"stop_token_ids": [tokenizer.infilling.end]})


def _prompt(args: argparse.Namespace) -> str:
    if args.stdin not in (None, "-"):
        raise ValueError(
            f"unknown argument {args.stdin!r}; legal: '-' for standard input; a text is given as --prompt TEXT"
        )
    path = args.stdin or args.prompt_file
    if path is not None:
        prompt = read_prompt(path, quiet=args.quiet)
    else:
        prompt = read_input(quiet=args.quiet) if args.prompt is None else args.prompt
    return unescape(prompt, "the prompt") if args.escape else prompt


def _stream(loaded: Loaded, text: PromptText, params: SamplingParams) -> RequestOutput:
    generation = loaded.llm.start(text.given, params)
    print(text.before, end="", flush=True)
    for piece in loaded.llm.follow(generation):
        print(piece, end="", flush=True)
    print(text.after, flush=True)
    return generation.output()


def _table(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> str:
    """A row per token: its piece, log-probability and probability, and the likeliest tokens at its position."""

    def shown(token_id: int, logprob: float) -> str:
        return f"{_piece(tokenizer, token_id)} {100 * math.exp(logprob):.1f} %"

    rows = [("token", "logprob", "probability", "likeliest tokens here")]
    for each in logprobs:
        best = [shown(*one) for one in each.top]
        rows.append(
            (
                _piece(tokenizer, each.token_id),
                f"{each.logprob:.3f}",
                f"{100 * math.exp(each.logprob):.1f} %",
                "  ".join(best),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{piece:{widths[0]}}  {logprob:>{widths[1]}}  {probability:>{widths[2]}}  {best}".rstrip()
        for piece, logprob, probability, best in rows
    )


def _piece(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as quoted text; a token that is part of a character as its bytes."""
    data = tokenizer.token_bytes(token_id, skip_special_tokens=False)
    try:
        return repr(data.decode())
    except UnicodeDecodeError:
        return repr(data)[1:]


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
    found = {name: getattr(sample, name) for name in names}
    return found if sample.logprobs is None else found | {"logprobs": [asdict(each) for each in sample.logprobs]}
