"""`fastllama quantize`: quantizes a model to 4 or 8 bits with calibration data, and writes a new folder."""

from __future__ import annotations

import argparse
import importlib.resources
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastllama.cli.options import (
    MODELS,
    add_place_options,
    add_tokenizer_option,
    check_names,
    needed_tokenizer,
    open_parts,
)
from fastllama.cli.parser import add_command as add
from fastllama.cli.text import read_document
from fastllama.errors import check_range, counted
from fastllama.layers.quantization import METHODS, SCHEMES, WITHOUT_TEXT, check_method

if TYPE_CHECKING:
    import torch

    from fastllama.io.formats.base import Checkpoint

SAMPLES, CONTEXT = 128, 2048
PACKAGED = "calibration.txt"
TEXT_OPTIONS = ("--calibration", "--per-line", "--samples", "--context")
DETAILS = """Writes DST, a Hugging Face folder in the formats of compressed-tensors, which transformers and vLLM read
too, with the tokenizer. DST appears complete or not at all: a signal, an error or a full disk leaves no partial folder.
gptq (any scheme), awq and awq+gptq (int4), smoothquant and smoothquant+gptq (w8a8) calibrate on each layer's inputs
over a text. rtn (any scheme) rounds to nearest, hqq (int4) fits zeros and scales to each weight: they need no text.
Give a text like those that the model will see. It is one document, begun with BOS where the tokenizer adds it and cut
into windows of --context tokens; with --per-line each line that is not blank is a document, between BOS and EOS. Where
there are more than --samples, that many are taken, evenly spaced. Default text: packaged stories, one per line.
Weights stay in host memory; --device holds one block at a time. With --resume each finished block is kept in FOLDER
until DST is written, and the same command resumes from there."""

_LOG = logging.getLogger("fastllama")


def add_command(commands: Any) -> None:
    """Define the subcommand."""
    parser = add(
        commands,
        "quantize",
        "write a model with weights in 4 or 8 bits",
        run,
        details=DETAILS,
        examples=(
            "tiny tiny-int4",
            "path/to/model path/to/model-int4 --method awq+gptq --calibration text.txt --resume blocks",
            "meta-llama/Llama-2-7b-hf llama-w8a8 --scheme w8a8 --method smoothquant --calibration - --per-line < text",
            "path/to/model path/to/model-int8 --scheme int8 --method rtn",
        ),
    )
    parser.add_argument("SRC", help=f"'tiny' (packaged), {MODELS}")
    path = os.path.expanduser  # where the shell has not, as in --resume=~/blocks
    parser.add_argument("DST", type=path, help="folder to write, new or empty")
    group = parser.add_argument_group("quantization")
    group.add_argument(
        "--scheme",
        choices=SCHEMES,
        default="int4",
        help="int4, int8: weights in 4 or 8 bits; w8a8: weights and activations in 8 bits (default int4)",
    )
    group.add_argument("--method", choices=tuple(METHODS), default="gptq", help="quantization method (default gptq)")
    group.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="columns per scale: 32, 64, 128, or -1 for whole rows (default: 128 for int4, else -1)",
    )
    group.add_argument(
        "--resume",
        type=path,
        metavar="FOLDER",
        help="keep finished blocks here, and resume from those found (default: off)",
    )
    text = parser.add_argument_group("calibration text")
    text.add_argument(
        "--calibration",
        type=path,
        metavar="TEXT",
        help="text file, in UTF-8; - is standard input (default: packaged stories)",
    )
    text.add_argument(
        "--per-line", action="store_true", help="each line of the file is a document, between BOS and EOS"
    )
    text.add_argument(
        "--samples", type=int, metavar="N", help=f"maximum number of documents or windows (default {SAMPLES})"
    )
    text.add_argument(
        "--context",
        type=int,
        metavar="N",
        help=f"window length in tokens, at most the model's context (default {CONTEXT})",
    )
    group = parser.add_argument_group("model")
    add_tokenizer_option(group)
    add_place_options(group)
    parser.add_argument("--quiet", action="store_true", help="print one line, and no progress")


def run(args: argparse.Namespace) -> int:
    """Quantize, write, print, and return the exit status."""
    _check_options(args)
    check_names(args)
    _check_places(args)
    text, source = _text(args)
    job = Quantization.of(args, text)
    _warn(args, job)
    with _orderly_end():
        seconds = _write(args, job)
    from fastllama.io.checkpoint import open_checkpoint

    before, after = (f"{each.nbytes / 1e6:,.1f} MB" for each in (job.checkpoint, open_checkpoint(Path(args.DST))))
    sizes = f"{after} of weights, {before} before"
    print(f"{args.DST}: {sizes}" if args.quiet else _table(args, job, sizes, source, seconds))
    return 0


@dataclass(frozen=True)
class Quantization:
    """What to quantize, on which documents and device. tokenizer: the folder or file to copy, None without one."""

    checkpoint: Checkpoint
    documents: list[list[int]]
    tokenizer: Path | None
    device: torch.device

    @classmethod
    def of(cls, args: argparse.Namespace, text: str | None) -> Quantization:
        """From the arguments; checks everything that can be checked without the weights."""
        from fastllama.io.documents import calibration_documents
        from fastllama.io.load import resolve_device
        from fastllama.io.save import Companions
        from fastllama.layers.quantizing import check_documents

        device = resolve_device(args.device)
        checkpoint, tokenizer = open_parts(args.SRC, args.tokenizer, args.dtype, argument="SRC")
        if checkpoint.quantization is not None:
            raise ValueError(
                f"SRC is {args.SRC!r}, whose files hold {checkpoint.quantization} weights; legal: a model that is not "
                "quantized"
            )
        documents = []
        if text is not None:
            needed = needed_tokenizer(tokenizer, args.SRC)
            with _naming_calibration(args):
                documents = calibration_documents(
                    text,
                    needed,
                    per_line=args.per_line or args.calibration is None,
                    context=min(args.context or CONTEXT, checkpoint.config.context_length),
                    samples=args.samples or SAMPLES,
                )
        check_documents(checkpoint.config, documents, args.method)
        place = None if tokenizer is None else Path(args.tokenizer or tokenizer.path.parent)
        Companions.of(place)
        return cls(checkpoint, documents, place, device)


def _check_options(args: argparse.Namespace) -> None:
    """Raise for options that are wrong for every model."""
    check_method(args.scheme, args.method, args.group_size)
    if args.resume == "":
        raise ValueError("--resume is ''; legal: a folder")
    if args.method in WITHOUT_TEXT:
        given = [name for name in TEXT_OPTIONS if getattr(args, name[2:].replace("-", "_")) not in (None, False)]
        if given:
            raise ValueError(f"{given[0]} is given, and method {args.method!r} reads no text; legal: without it")
    for name, least in (("samples", 1), ("context", 2)):
        if getattr(args, name) is not None:
            check_range(f"--{name}", getattr(args, name), least)


def _check_places(args: argparse.Namespace) -> None:
    """Raise where DST or the folder of finished blocks cannot be written, or the latter is inside a model's folder."""
    from fastllama.io.save import check_new_folder, check_writable

    check_new_folder(Path(args.DST), "DST")
    if args.resume is None:
        return
    folder = Path(args.resume)
    for name, model in (("DST", args.DST), ("SRC", os.path.expanduser(args.SRC))):
        if Path(model).resolve() in (folder.resolve(), *folder.resolve().parents):
            raise ValueError(f"--resume is {args.resume!r}, which is {name} or in it; legal: a folder elsewhere")
    check_writable(folder, folder, "--resume")


def _text(args: argparse.Namespace) -> tuple[str | None, str]:
    """The text, None where the method reads none, and its name."""
    if args.method in WITHOUT_TEXT:
        return None, ""
    if args.calibration is not None:
        with _naming_calibration(args):
            return read_document(args.calibration, per_line=args.per_line)
    packaged = importlib.resources.files("fastllama").joinpath("assets", PACKAGED)
    return packaged.read_text(encoding="utf-8"), f"{PACKAGED}, packaged stories"


@contextmanager
def _naming_calibration(args: argparse.Namespace) -> Iterator[None]:
    """Make errors raised within name --calibration, the option that gives the text."""
    try:
        yield
    except OSError as error:
        legal = "legal: a file of text, or - for standard input"
        raise ValueError(f"--calibration is {args.calibration!r}: {error.strerror}; {legal}") from None
    except ValueError as error:
        raise ValueError(f"--calibration: {error}") from None


def _warn(args: argparse.Namespace, job: Quantization) -> None:
    """Log where the calibration text will cost the model accuracy."""
    if not job.documents:
        return
    if args.calibration is None and args.SRC != "tiny":
        _LOG.warning("calibrated on the packaged stories; give a text like yours with --calibration")
    config, tokens = job.checkpoint.config, sum(map(len, job.documents))
    widest = max(config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim)
    if tokens < widest:  # the Hessian is rank-deficient: GPTQ overfits the few rows
        _LOG.warning(
            f"calibrated on {counted(tokens, 'token')}, fewer than the {widest} columns of the widest layer: rtn may "
            "lose less"
        )


@contextmanager
def _orderly_end() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit(128 + signal), so that temporary files are removed.

    Not where the process handles or ignores them already, as under nohup, nor outside the main thread.
    """
    main = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows lacks one
    ours = [number for number in numbers if main and signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, _frame: object) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)  # a second signal would interrupt the clean-up
        raise SystemExit(128 + number)

    try:
        for number in ours:
            signal.signal(number, end)
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _write(args: argparse.Namespace, job: Quantization) -> float:
    """Quantize and write; returns the seconds of quantizing."""
    from fastllama.io.finished_blocks import FinishedBlocks
    from fastllama.io.load import load_model
    from fastllama.io.save import save_model
    from fastllama.layers.quantizing import quantize

    progress = False if args.quiet else None
    finished = None if args.resume is None else FinishedBlocks(Path(args.resume))
    model = load_model(args.SRC, dtype=args.dtype, device="cpu", progress=progress)
    start = time.perf_counter()
    quantize(
        model,
        args.scheme,
        args.method,
        documents=job.documents,
        group_size=args.group_size,
        device=job.device,
        finished=finished,
        progress=progress,
    )
    seconds = time.perf_counter() - start
    if finished is not None and finished.found and not args.quiet:
        blocks = counted(len(model.layers), "block")
        print(f"resumed: {len(finished.found)} of {blocks} were finished", file=sys.stderr)
    save_model(model, args.DST, job.tokenizer)
    if finished is not None:
        finished.discard()
    return seconds


def _table(args: argparse.Namespace, job: Quantization, sizes: str, source: str, seconds: float) -> str:
    """The report, a line per fact. sizes: of the weight files. source: the text's name."""
    read = f"{source}: {counted(len(job.documents), 'document')}, {sum(map(len, job.documents)):,} tokens"
    rows = {
        "wrote": args.DST,
        "size": sizes,
        "quantized": f"{args.scheme} by {args.method} in {seconds:,.1f} s on {job.device}",
        "text": read if job.documents else "none needed",
    }
    if job.tokenizer is not None:
        model = "./tiny" if args.DST == "tiny" else args.DST  # the bare word is the packaged model
        rows["measure"] = shlex.join(["fastllama", "perplexity", "--model", model, "--against", args.SRC])
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())
