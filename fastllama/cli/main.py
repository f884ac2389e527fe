"""The command's entry point: its arguments, its exit statuses, and a one-line message for every user error."""

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
  {USER_ERROR} a wrong argument, file or checkpoint, {BUG} a bug in fastllama, or serve's engine has failed for good,
  {INTERRUPTED} interrupted by Ctrl-C, {BROKEN_PIPE} the reader of the output closed it"""
# Advice after running out of memory, for commands that lack --max-model-len or have something better.
SMALLER = {
    "quantize": "fewer --samples or a smaller --context",
    "verify": "--dtype bfloat16",
    "perplexity": "--quantize int4 or a smaller --context",
    "bench": "--dtype bfloat16 or a smaller model",
}
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
    """Run the command with these arguments (default: the process's) and return its exit status."""
    with _standard_streams():
        return _run(list(sys.argv[1:] if argv is None else argv) or ["--help"])


def _run(argv: list[str]) -> int:
    debug = "--debug" in argv  # read by hand, so that it also applies to errors in the arguments
    try:
        args = _parser().parse_args(argv)
        if hasattr(sys.stdout, "reconfigure"):
            # A character that the terminal cannot show must not end the answer.
            sys.stdout.reconfigure(errors="replace")
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
    """Write a line to standard error; where that fails, only the exit status reports the error."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


@contextmanager
def _standard_streams() -> Iterator[None]:
    """Open the null device for standard streams that the process was started without (pythonw, a service, `2>&-`).

    Else print(file=None) would write errors to standard output, and the next file opened would get the descriptor of
    the missing stream, with everything that C libraries write to it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor
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
        description="Fast Llama inference. `fastllama COMMAND --help` describes a command.",
        epilog=f"{EXAMPLES}\n\n{STATUSES}",
    )
    parser.add_argument("--version", action="version", version=f"fastllama {fastllama.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", title="commands", required=True)
    for module in (generate, chat, serve, info, quantize, verify, perplexity, eval, bench):
        module.add_command(commands)
    return parser


def _drop_output() -> None:
    """Discard output that can no longer be written: Python would retry at exit, and fail with a traceback."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _users_mistake(error: Exception, command: str) -> str | None:
    """The message for the user's error; None for a bug of ours, as a TypeError always is: argparse types arguments."""
    # torch has an exception class for GPU memory only; for CPU memory, the message has to be matched.
    words = "out of memory", "can't allocate memory", "Cannot allocate memory"
    exhausted = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    if exhausted or isinstance(error, MemoryError):
        smaller = SMALLER.get(command, "--quantize int4 or a smaller --max-model-len")
        return f"out of memory: try {smaller}" + (f" ({error})" if str(error) else "")
    if isinstance(error, ImportError) and not isinstance(error, ExtraRequiredError):
        ours = (error.name or "").startswith("fastllama")
        return None if ours else f"a required package cannot be imported: {error}"
    # torch's error where the GPU driver is too old or missing.
    if isinstance(error, RuntimeError) and "driver" in str(error):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, OSError, BackendError, ExtraRequiredError)):
        return str(error)
    return None


@contextmanager
def _log_to_stderr(level: int) -> Iterator[None]:
    """Print the library's log to standard error, as `fastllama: warning: ...`, while the command runs."""
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
    """Make interpreted Triton kernels round as on a GPU while the command runs: unpatched, bf16 is wrong."""
    if not env.triton_interpret() or why_unusable("triton"):
        return nullcontext()
    from fastllama.testing.interpreter import repaired

    return repaired()


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"fastllama: {record.levelname.lower()}: {record.getMessage()}"
