"""The entry of the command: its arguments, its exit statuses, and one line for every mistake of its user."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress

import fastllama
from fastllama import env
from fastllama.cli import bench, chat, eval, generate, info, perplexity, quantize, serve, verify
from fastllama.cli.parser import Parser
from fastllama.errors import BackendError, ExtraRequiredError, why_unusable

USER_ERROR, BUG, INTERRUPTED, BROKEN_PIPE = 2, 70, 130, 141
STATUSES = f"""exit status:
  0 success, {verify.DISAGREEMENT} verify found a disagreement or a case of bench decode failed,
  {USER_ERROR} a wrong argument, file or checkpoint, {BUG} a bug of fastllama, or serve's engine is beyond repair,
  {INTERRUPTED} interrupted by Ctrl-C, {BROKEN_PIPE} the reader of the output went away"""
# What to try where memory does not suffice, for commands that lack --max-model-len or have something better.
SMALLER = {"quantize": "fewer --samples or a smaller --context"}
EXAMPLES = """examples:
  fastllama generate --prompt "Once upon a time"
  fastllama chat --model meta-llama/Llama-2-7b-chat-hf
  fastllama serve
  fastllama info
  fastllama quantize path/to/model path/to/model-int4 --calibration text.txt
  fastllama verify --model path/to/model --dtype bfloat16
  fastllama perplexity --quantize int4 --against
  fastllama bench runtime"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (by default the process's own) and return its exit status."""
    with _standard_streams():
        return _run(list(sys.argv[1:] if argv is None else argv) or ["--help"])


def _run(argv: list[str]) -> int:
    debug = "--debug" in argv  # by hand, so that it also covers what is wrong with the arguments
    try:
        args = _parser().parse_args(argv)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # an answer that the terminal cannot show is no reason to end it
        level = logging.INFO if debug else logging.ERROR if args.quiet else logging.WARNING
        with _log_to_stderr(level), _repaired_interpreter():
            status: int = args.run(args)
        print(end="", flush=True)
        return status
    except BrokenPipeError:
        _drop_output()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        _say("")
        return INTERRUPTED
    except Exception as error:
        message = _users_mistake(error, argv[0])
        if debug or message is None:
            _say(traceback.format_exc().rstrip())
        if message is None:
            _say("fastllama: this is a bug in fastllama; please report it with the lines above")
            return BUG
        _say(f"fastllama: error: {' '.join(message.split())}")
        _drop_output()
        return USER_ERROR


def _say(line: str) -> None:
    """A line on standard error; where that cannot be written, the exit status is all there is."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


@contextmanager
def _standard_streams() -> Iterator[None]:
    """Within, streams that the process was started without (pythonw, a service, `2>&-`) are there, and empty.

    print(file=None) would write to standard output what is meant for standard error, and the next file that is opened
    would get the number of the stream that lacks, and all that C libraries write to it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # becomes the lowest number that is free
    names = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    with ExitStack() as opened:
        for name in names:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, opened.enter_context(open(os.devnull, mode, encoding="utf-8")))
        try:
            yield
        finally:
            for name in names:
                setattr(sys, name, None)


def _parser() -> Parser:
    parser = Parser(
        prog="fastllama",
        description="Fast Llama inference. `fastllama COMMAND --help` says more.",
        epilog=f"{EXAMPLES}\n\n{STATUSES}",
    )
    parser.add_argument("--version", action="version", version=f"fastllama {fastllama.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", title="commands", required=True)
    for module in (generate, chat, serve, info, quantize, verify, perplexity, eval, bench):
        module.add_command(commands)
    return parser


def _drop_output() -> None:
    """Give up what can no longer be written: at exit it would be tried again, and fail with a traceback."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _users_mistake(error: Exception, command: str) -> str | None:
    """What to tell the user, None where the fault is ours. Arguments are typed here, so a TypeError never is his."""
    # torch has a class for memory of a GPU only; for a CPU's it has words.
    words = "out of memory", "can't allocate memory", "Cannot allocate memory"
    exhausted = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    if exhausted or isinstance(error, MemoryError):
        smaller = SMALLER.get(command, "--dtype bfloat16 or a smaller --max-model-len")
        return f"out of memory: try {smaller}" + (f" ({error})" if str(error) else "")
    if isinstance(error, ImportError) and not isinstance(error, ExtraRequiredError):
        ours = (error.name or "").startswith("fastllama")
        return None if ours else f"a package that is needed cannot be imported: {error}"
    if isinstance(error, RuntimeError) and "driver" in str(error):  # torch's, of a GPU whose driver is too old or gone
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, OSError, BackendError, ExtraRequiredError)):
        return str(error)
    return None


@contextmanager
def _log_to_stderr(level: int) -> Iterator[None]:
    """Show the library's own log, as `fastllama: warning: ...`, while the command runs."""
    logger = logging.getLogger("fastllama")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _repaired_interpreter() -> AbstractContextManager[None]:
    """Where Triton kernels are interpreted, they round as on a GPU while the command runs: stock, bf16 is wrong."""
    if not env.triton_interpret() or why_unusable("triton"):
        return nullcontext()
    from fastllama.testing.interpreter import repaired

    return repaired()


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"fastllama: {record.levelname.lower()}: {record.getMessage()}"
