"""The entry point: help, exit statuses, exceptions, signals, and readers that go away."""

from __future__ import annotations

import io
import logging
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

import fastllama
from fastllama.cli import info, main
from fastllama.errors import BackendError, ExtraRequiredError
from fastllama.runtime.device import memory
from tests.cli.conftest import Command

ROOT = Path(fastllama.__file__).parents[1]
FULL = Path("/dev/full")
COMMANDS = ("generate", "chat", "serve", "info", "quantize", "verify", "perplexity", "eval", "bench")
NESTED = ("bench runtime", "bench decode")


def start(*args: str, stdout: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
    """`python -m fastllama`, as a shell would run it, with the ops that start fastest."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FASTLLAMA_BACKEND": "reference"}
    environment.pop("PYTHONUNBUFFERED", None)  # what is still buffered at exit is what these tests are about
    return subprocess.Popen(
        [sys.executable, "-m", "fastllama", *args],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's child would ignore it
    )


def fails_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `info` raise."""

    monkeypatch.setattr(info, "_versions", lambda: fail(error))


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    "args", [["--version"], ["--help"], *([*name.split(), "--help"] for name in (*COMMANDS, *NESTED))], ids=" ".join
)
def test_what_needs_no_model_loads_nothing_heavy(args: list[str]) -> None:
    code = f"""
import sys
from fastllama.cli.main import main
try:
    main({args!r})
except SystemExit as done:
    heavy = {{"torch", "numpy", "triton", "numba", "sentencepiece", "transformers", "huggingface_hub", "tqdm",
        "matplotlib"}}
    print(done.code, sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr == "0 []\n"
    assert (fastllama.__version__ if args == ["--version"] else "usage: fastllama") in done.stdout


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_the_help_names_every_command_with_examples(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main.main(args)
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"    {name} " in shown for name in COMMANDS)
    assert "examples:\n  fastllama generate --prompt" in shown
    assert "70 a bug" in shown


@pytest.mark.parametrize("name", [*COMMANDS, *NESTED])
def test_every_example_is_one_that_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The examples in the help of a command, given to its own parser."""
    with pytest.raises(SystemExit):
        main.main([*name.split(), "--help"])
    examples = capsys.readouterr().out.split("examples:\n")[1].splitlines()
    assert examples
    for example in examples:
        words = shlex.split(example.split(" < ")[0])
        assert " ".join(words).startswith(f"fastllama {name}")
        assert main._parser().parse_args(words[1:]).command == name.split()[0]


@pytest.mark.parametrize("name", [*(each for each in COMMANDS if each not in ("info", "bench")), *NESTED, "bench ops"])
def test_advice_after_running_out_of_memory_names_options_of_the_command(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    advice = main._users_mistake(MemoryError(), name.split()[0])
    options = [word for word in (advice or "").split() if word.startswith("--")]
    with pytest.raises(SystemExit):
        main.main([*name.split(), "--help"])
    text = capsys.readouterr().out
    assert options
    assert all(option in text for option in options)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("n is 0;\n  legal: 1"), "n is 0; legal: 1"),
        (FileNotFoundError("there is no model"), "there is no model"),
        (PermissionError(13, "Permission denied", "a/b"), "a/b: Permission denied"),
        (OSError("the disk is gone"), "the disk is gone"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (BackendError("no Triton kernel"), "no Triton kernel"),
        (
            ExtraRequiredError("this", "tokenizers", "hf"),
            "this needs 'tokenizers', which is not installed: pip install",
        ),
        (
            ImportError("libomp.so.5: cannot open shared object file", name="torch._C"),
            "a required package cannot be imported: libomp.so.5",
        ),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "a required package cannot be imported"),
        (RuntimeError("The NVIDIA driver on your system is too old"), "The NVIDIA driver on your system is too old"),
        (MemoryError(), "out of memory: try --quantize int4 or a smaller --max-model-len\n"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory: try --quantize"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: try --quantize"),
    ],
    ids=repr,
)
def test_a_mistake_of_the_user_is_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    fails_with(error, monkeypatch)
    done = command("info")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(f"fastllama: error: {says}")
    assert done.err.count("\n") == 1
    shown = command("info", "--debug")
    assert (shown.status, shown.out) == (2, "")
    assert shown.err.startswith("Traceback")
    assert shown.err.endswith(done.err)


def test_memory_that_quantize_lacks_is_saved_by_its_own_options(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, detail in ((MemoryError(), ""), (RuntimeError("CUDA out of memory."), " (CUDA out of memory.)")):
        monkeypatch.setattr("fastllama.cli.quantize._check_options", lambda args, error=error: fail(error))
        said = f"fastllama: error: out of memory: try fewer --samples or a smaller --context{detail}\n"
        assert command("quantize", "tiny", "out").err == said


def test_debug_covers_the_arguments_too(command: Command) -> None:
    plain, shown = command("info", "--zzz"), command("info", "--zzz", "--debug")
    assert plain.status == shown.status == 2
    assert shown.err.startswith("Traceback")
    assert shown.err.endswith(plain.err)


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("odd"),
        TypeError("odd"),
        KeyError("odd"),
        RuntimeError("odd"),
        ImportError("cannot import name 'x'", name="fastllama.io"),
    ],
    ids=repr,
)
def test_a_bug_is_shown_in_full(command: Command, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    fails_with(error, monkeypatch)
    done = command("info")
    assert done.status == 70
    assert done.err.startswith("Traceback")
    assert done.err.endswith("fastllama: this is a bug in fastllama; please report it with the lines above\n")
    assert command("info", "--debug").status == 70


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
@pytest.mark.parametrize("error", [None, ValueError("n is 0"), KeyError("odd"), KeyboardInterrupt()], ids=repr)
def test_without_a_console_the_status_is_the_same_and_nothing_goes_astray(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException | None
) -> None:
    """Python's stream is None under pythonw, in a service or after `2>&-`."""
    if error is not None:
        fails_with(error, monkeypatch)
    usual = main.main(["info"]), *capsys.readouterr()
    monkeypatch.setattr(sys, name, None)
    found = main.main(["info"]), *capsys.readouterr()
    assert getattr(sys, name) is None
    assert found[0] == usual[0]
    assert found[1] == ("" if name == "stdout" else usual[1])
    assert bool(found[2]) == (bool(usual[2]) and name != "stderr")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("line", ["info --zzz", "verify --model ./nowhere", "bench runtime --dtype x", "generate -"])
def test_closed_streams_give_no_traceback(line: str, closed: str) -> None:
    shell = f"{shlex.quote(sys.executable)} -m fastllama {line} {closed}"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == (0 if "2>" in closed else 1)


def test_an_impossible_backend_is_one_line(command: Command, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLLAMA_BACKEND", "triton")
    for args in (("generate", "--model", model), ("verify", "--model", model)):
        done = command(*args)
        assert (done.status, done.out) == (2, "")
        assert done.err.startswith("fastllama: error: op ")
        assert done.err.count("\n") == 1
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setitem(sys.modules, "triton", None)  # Python's own mark of what is not installed
        assert "needs Triton on cpu: pip install triton" in command("generate", "--model", model).err
    monkeypatch.setenv("FASTLLAMA_BACKEND", "fastest")
    assert command("info").err.startswith("fastllama: error: environment variable FASTLLAMA_BACKEND is 'fastest'")


@pytest.mark.parametrize(("options", "shown"), [([], True), (["--quiet"], False)])
def test_the_log_is_shown_unless_quiet(
    command: Command, model: str, monkeypatch: pytest.MonkeyPatch, options: list[str], shown: bool
) -> None:
    # 16 tokens of KV cache are less than the model's context, which is worth a warning
    monkeypatch.setattr(memory, "available_bytes", lambda device: 16 * 512 * 4)
    logger = logging.getLogger("fastllama")
    before = list(logger.handlers), logger.level
    done = command("generate", "--model", model, "--max-tokens", "2", *options)
    assert done.status == 0
    assert ("fastllama: warning: max_model_len is " in done.err) == shown
    assert (logger.handlers, logger.level) == before


def test_an_answer_that_the_terminal_cannot_show_is_shown_in_part(
    command: Command, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert command("generate", "--model", model, "--prompt", "Zoë", "--max-tokens", "1").status == 0
    assert terminal.buffer.getvalue().startswith(b"Zo?")


def test_a_reader_that_goes_away_ends_it_quietly(model: str) -> None:
    """The case of `fastllama generate | head -c 4`."""
    with start("generate", "--model", model, "--prompt", "once", "--max-tokens", "200") as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == "o"
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line() -> None:
    with FULL.open("w") as full, start("info", stdout=full) as process:
        assert process.stderr is not None
        assert process.stderr.read() == "fastllama: error: No space left on device\n"
    assert process.returncode == 2


def test_ctrl_c_ends_it_without_a_traceback(tmp_path: Path) -> None:
    fifo = tmp_path / "prompt"
    os.mkfifo(fifo)
    # Opening a FIFO returns when the other side has opened it too; the command then waits for the text of its prompt.
    with start("generate", "--prompt-file", str(fifo)) as process, fifo.open("w"):
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.read() == "\n"
    assert process.returncode == 130
