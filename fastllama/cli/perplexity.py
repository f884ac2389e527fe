"""`fastllama perplexity`: how well a model predicts a text, and what quantization costs it."""

from __future__ import annotations

import argparse
import importlib.resources
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastllama.cli.options import (
    add_model_options,
    add_quantize_option,
    add_runtime_options,
    check_names,
    failure_in_words,
    needed_tokenizer,
    open_parts,
    quantization,
    runtime_options,
)
from fastllama.cli.parser import add_command as add
from fastllama.cli.text import read_document
from fastllama.errors import check_range, counted
from fastllama.layers.quantization import NONE

if TYPE_CHECKING:
    from fastllama.io.formats.base import Checkpoint
    from fastllama.io.tokenizer import Tokenizer
    from fastllama.runtime.llm import LLM
    from fastllama.verify import Comparison, Estimate, Perplexity

SAME = True  # --against without a value
CONTEXT = 1024
STEP_TOKENS = 2048  # room in the KV cache beyond one context; steps of this many tokens run at full speed
BUNDLED = "heldout_seed.txt"
DETAILS = """Feeds the text in windows of --context tokens, each --stride tokens after the one before, and scores every
token of a document but its first once. The perplexity is exp of the mean negative log-likelihood per token. With a
stride equal to the context, windows do not overlap and the first tokens of each have little context; a smaller stride
takes longer and gives lower, more faithful figures. Compare perplexities of one tokenizer and one protocol only. The
whole file is one document, begun with BOS where the tokenizer adds it; with --per-line each line that is not blank is a
document, between BOS and EOS. Newlines are universal: CR LF and CR are read as LF, and a line ends nowhere else.
Without --file: held-out stories that the bundled model has not seen, one per line.
With --against, also reports the loss of a quantized model: the difference of the negative log-likelihoods (dNLL), the
KL divergence of its next-token distributions from the reference's, and the share of tokens where both have the same
likeliest token. +- gives the standard error, clustered by document, or by window where there is one document; for
differences it is paired, and far smaller than that of either perplexity. Both models are in memory at once."""


def add_command(commands: Any) -> None:
    """Define the subcommand."""
    parser = add(
        commands,
        "perplexity",
        "measure how well a model predicts a text, and what quantization costs",
        run,
        details=DETAILS,
        examples=(
            "",
            "--quantize int4 --against",
            "--model path/to/model --file wiki.test.raw --context 2048",
            "--model path/to/gptq-model --against path/to/model --file wiki.test.raw --json",
        ),
    )
    add_model_options(parser, adapter=False)
    add_quantize_option(parser)
    add_runtime_options(parser, speculation=False)
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "-f",
        "--file",
        metavar="TEXT",
        help="text file, in UTF-8; - is standard input (default: held-out stories)",
    )
    group.add_argument(
        "--per-line", action="store_true", help="each line of the file is a document, between BOS and EOS"
    )
    group.add_argument(
        "--context",
        type=int,
        default=CONTEXT,
        metavar="N",
        help=f"window length in tokens, at most the model's context (default {CONTEXT})",
    )
    group.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens from one window's start to the next, 1 to --context (default: half of it)",
    )
    group.add_argument(
        "--against",
        nargs="?",
        const=SAME,
        metavar="M2",
        help="compare with this model, as stored; without a value, with the same model not quantized (default: off)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--quiet", action="store_true", help="print one line, and no progress")


def run(args: argparse.Namespace) -> int:
    """Measure, print, and return the exit status."""
    _check_options(args)
    text, source = _text(args)
    check_names(args)
    job = Measurement.of(args, text)
    from fastllama.verify import compare, perplexity

    windows: dict[str, Any] = {"context": job.context, "stride": job.stride, "progress": False if args.quiet else None}
    own = {"quantization": quantization(args), "kv_cache_dtype": args.kv_cache_dtype}
    comparison, reference = None, ""
    with _opened(args, job, args.model, **own) as llm:
        model = _describe(args.model, llm, args, args.kv_cache_dtype)
        with failure_in_words():
            if args.against is None:
                found = perplexity(llm, job.documents, **windows)
            else:
                with _opened(args, job, job.against, quantization=None, kv_cache_dtype="auto") as other:
                    reference = _describe(job.against, other, args, "auto")
                    comparison = compare(llm, other, job.documents, **windows)
                found = comparison.model
    if args.json:
        figures = found.as_json() if comparison is None else comparison.as_json()
        print(json.dumps(_conditions(args, job, model, reference, source) | figures))
    elif args.quiet:
        print(_summary(found, comparison))
    else:
        print(_table(job, args.context, found, comparison, model, reference, source))
    return 0


@dataclass(frozen=True)
class Measurement:
    """What to measure. limit: the longest context that the models take. against: the reference."""

    documents: list[list[int]]
    context: int
    stride: int
    limit: int
    tokenizer: Tokenizer
    against: str

    @classmethod
    def of(cls, args: argparse.Namespace, text: str) -> Measurement:
        """From the arguments; checks everything that can be checked without the weights."""
        from fastllama.io.documents import text_documents
        from fastllama.io.load import resolve_device
        from fastllama.verify.perplexity import check_documents

        resolve_device(args.device)
        checkpoint, tokenizer = open_parts(args.model, args.tokenizer, args.dtype)
        if args.against is SAME:
            _check_same(args, checkpoint)
        tokenizer = needed_tokenizer(tokenizer, args.model)
        per_line = args.per_line or args.file is None
        documents = text_documents(text, tokenizer, per_line=per_line)
        check_documents(documents)
        limit, against = checkpoint.config.context_length, args.model
        if args.against not in (None, SAME):
            against = args.against
            other, theirs = open_parts(against, None, args.dtype, argument="--against")
            sizes = checkpoint.config.vocab_size, other.config.vocab_size
            if sizes[0] != sizes[1]:
                said = f"vocabulary of {sizes[1]} tokens and {args.model!r} of {sizes[0]}"
                raise ValueError(f"--against is {against!r}, which has a {said}; legal: a model with the same tokens")
            if theirs is not None and text_documents(text, theirs, per_line=per_line) != documents:
                raise ValueError(
                    f"--against is {against!r}, whose tokenizer reads the text as other tokens than that of "
                    f"{args.model!r}; legal: a model with the same tokens"
                )
            limit = min(limit, other.config.context_length)
        context = min(args.context, limit)
        stride = max(context // 2, 1) if args.stride is None else min(args.stride, context)
        return cls(documents, context, stride, limit, tokenizer, against)


def _check_options(args: argparse.Namespace) -> None:
    """Raise for options that are wrong for every model."""
    check_range("--context", args.context, 1)
    if args.stride is not None:
        check_range("--stride", args.stride, 1, args.context)


def _check_same(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Raise where the files hold no unquantized weights to compare with, or the measured model is not quantized."""
    claim = "--against compares with the same model, not quantized"
    if checkpoint.quantization is not None:
        raise ValueError(
            f"{claim}, but the files of {args.model!r} hold {checkpoint.quantization} weights; legal: a model after "
            "--against"
        )
    if args.quantize in ("auto", NONE) and args.kv_cache_dtype == "auto":
        raise ValueError(
            f"{claim}, and so is this one; legal: with --quantize or --kv-cache-dtype, or a model after --against"
        )


def _text(args: argparse.Namespace) -> tuple[str, str]:
    """The text and its name; the last newline is dropped where the whole file is one document."""
    if args.file is None:
        bundled = importlib.resources.files("fastllama").joinpath("assets", "tiny", BUNDLED)
        return bundled.read_text(encoding="utf-8"), f"{BUNDLED}, stories that the bundled model has not seen"
    return read_document(args.file, per_line=args.per_line)


@contextmanager
def _opened(args: argparse.Namespace, job: Measurement, model: str, **kind: Any) -> Iterator[LLM]:
    """A model whose KV cache is as small as the job allows, so that a second model fits."""
    from fastllama.runtime.llm import LLM

    length = max(job.context, 2)
    with LLM(
        model,
        tokenizer=job.tokenizer,
        dtype=args.dtype,
        device=args.device,
        max_model_len=length,
        kv_cache_tokens=max(length, min(sum(map(len, job.documents)), length + STEP_TOKENS)),
        progress=False if args.quiet else None,
        **runtime_options(args) | kind,
    ) as llm:
        yield llm


def _describe(name: str, llm: LLM, args: argparse.Namespace, kv_cache_dtype: str) -> str:
    """A model's name, dtype, quantization and device, for the table."""
    built = llm.engine.model
    words = [str(built.dtype).removeprefix("torch.")]
    words += [f"weights in {llm.quantization}"] * (llm.quantization is not None)
    words += [f"KV cache in {kv_cache_dtype}"] * (kv_cache_dtype != "auto")
    words += ["deterministic"] * args.deterministic
    return f"{name} ({', '.join(words)}) on {built.device}"


def _conditions(args: argparse.Namespace, job: Measurement, model: str, reference: str, source: str) -> dict[str, Any]:
    """The JSON's fields other than figures. against: None where nothing is compared."""
    return {
        "described": model,
        "against": reference or None,
        "text": source,
        "per_line": args.per_line or args.file is None,
        "context": job.context,
        "stride": job.stride,
    }


def _table(
    job: Measurement,
    asked: int,
    found: Perplexity,
    comparison: Comparison | None,
    model: str,
    reference: str,
    source: str,
) -> str:
    """A line per figure. asked: the value of --context, before the model's limit."""
    capped = "" if asked <= job.limit else f" (not {asked}: the model takes no more)"
    compared = "" if comparison is None else ", comparing included"
    rows = [
        ("model", model),
        ("text", f"{source}: {counted(found.documents, 'document')}"),
        ("protocol", f"{counted(found.windows, 'window')}, context {job.context}{capped}, stride {job.stride}"),
        ("tokens", f"{found.tokens:,}, {found.tokens_per_second:,.0f} a second{compared}"),
        ("perplexity", _shown(found.perplexity, ".4f")),
    ]
    if comparison is not None:
        rows += [("against", reference), ("perplexity", _shown(comparison.reference.perplexity, ".4f"))]
        rows += _differences(comparison)
    clusters = found.documents if found.documents > 1 else found.windows
    kind = "document" if found.documents > 1 else "window"
    said = f"+- one standard error, by {kind}" if clusters > 1 else "no standard errors: there is one window"
    width = max(len(name) for name, _ in rows)
    return "\n".join([*(f"{name:{width}}  {value}" for name, value in rows), said])


def _differences(comparison: Comparison) -> list[tuple[str, str]]:
    share = comparison.top1
    error = None if share.standard_error is None else 100 * share.standard_error
    return [
        ("dNLL", f"{_shown(comparison.nll_difference, '+.3g')} nats per token"),
        ("KL", f"{_shown(comparison.kl, '.3g')} nats per token"),
        ("top-1", f"{_shown(type(share)(100 * share.value, error), '.2f')} % of tokens"),
    ]


def _summary(found: Perplexity, comparison: Comparison | None) -> str:
    """One line."""
    rows = [] if comparison is None else _differences(comparison)
    return ", ".join([f"perplexity {_shown(found.perplexity, '.4f')}", *(f"{name} {value}" for name, value in rows)])


def _shown(estimate: Estimate, form: str) -> str:
    error = estimate.standard_error
    return f"{estimate.value:{form}}" + ("" if error is None else f" +- {error:{form.lstrip('+').replace('3g', '2g')}}")
