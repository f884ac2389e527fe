"""fastllama quantize, ended by a signal: no file stays beside DST, and a new run resumes from finished blocks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread

import pytest

from fastllama import load_model
from fastllama.cli.quantize import _orderly_end
from tests.cli.conftest import Command
from tests.cli.test_main import ROOT
from tests.rounds import exhaustive

ENDING = [signal.SIGTERM, signal.SIGHUP]
# Runs the command, which prints when it has come to a call of a function, and hangs in it.
HANGS = """
import importlib, sys, time
from fastllama.cli.main import main

module, name, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
owner = importlib.import_module(module)
*path, last = name.split(".")
for each in path:
    owner = getattr(owner, each)
original = getattr(owner, last)

def hangs(*given, **named):
    global calls
    calls -= 1
    if calls:
        return original(*given, **named)
    print("there", flush=True)
    time.sleep(100)

setattr(owner, last, hangs)
sys.exit(main(sys.argv[4:]))
"""


@contextmanager
def hanging(call: tuple[str, str, int], *args: str) -> Iterator[subprocess.Popen[str]]:
    """`fastllama quantize` in a process of its own, which has come to the n-th call of a function of a module."""
    module, function, number = call
    with subprocess.Popen(
        [sys.executable, "-c", HANGS, module, function, str(number), "quantize", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "FASTLLAMA_BACKEND": "reference"},
        # Also where the tests run in the background, whose shell ignores Ctrl-C for them.
        preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, *ENDING)],
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        yield process


@pytest.mark.parametrize("finished", [1, exhaustive(3)])
def test_ctrl_c_in_a_process_of_its_own(finished: int, command: Command, tmp_path: Path) -> None:
    blocks, out = tmp_path / "blocks", tmp_path / "out"
    args = ("tiny", str(out), "--resume", str(blocks), "--samples", "2", "--context", "64")
    with hanging(("fastllama.io.finished_blocks", "FinishedBlocks.put", finished + 1), *args) as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.read().splitlines()[-1] == ""
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == [blocks]
    assert len(list(blocks.iterdir())) == finished
    assert all(path.suffix == ".safetensors" for path in blocks.iterdir())
    assert f"resumed: {finished} of 5 blocks were finished\n" in command("quantize", *args).err
    assert not blocks.exists()
    assert load_model(out).config == load_model("tiny").config


@pytest.mark.parametrize("number", ENDING, ids=str)
def test_a_signal_to_end_leaves_nothing_of_what_was_being_written(
    number: signal.Signals, model: str, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    with hanging(("fastllama.io.save", "_write_json", 1), model, str(out), "--method", "rtn") as process:
        assert len(list(out.parent.glob(".out.*.partial"))) == 1
        process.send_signal(number)
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 128 + number
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", ENDING, ids=str)
def test_a_second_signal_does_not_end_the_cleanup_and_the_handlers_are_restored(number: signal.Signals) -> None:
    before = [signal.signal(each, signal.SIG_DFL) for each in ENDING]
    cleaned: list[bool] = []

    def interrupted() -> None:
        with _orderly_end(), ExitStack() as cleanup:
            cleanup.callback(cleaned.append, True)
            for each in ENDING:
                cleanup.callback(signal.raise_signal, each)
            signal.raise_signal(number)

    try:
        with pytest.raises(SystemExit) as caught:
            interrupted()
        assert [signal.getsignal(each) for each in ENDING] == [signal.SIG_DFL] * 2
    finally:
        for each, handler in zip(ENDING, before, strict=True):
            signal.signal(each, handler)
    assert cleaned == [True]
    assert caught.value.code == 128 + number


def test_what_is_ignored_as_under_nohup_stays_so_and_a_handler_of_the_program_is_left() -> None:
    seen: list[int] = []
    before = [
        signal.signal(signal.SIGHUP, signal.SIG_IGN),
        signal.signal(signal.SIGTERM, lambda number, _: seen.append(number)),
    ]
    try:
        with _orderly_end():
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
    finally:
        for each, handler in zip((signal.SIGHUP, signal.SIGTERM), before, strict=True):
            signal.signal(each, handler)
    assert seen == [signal.SIGTERM]


def test_a_thread_which_cannot_set_handlers_sets_none() -> None:
    ended = []

    def run() -> None:
        with _orderly_end():
            ended.append(True)

    thread = Thread(target=run)
    thread.start()
    thread.join()
    assert ended == [True]
