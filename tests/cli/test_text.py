"""Texts from arguments, files and standard input."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllama.cli import text


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"\n", "\n"),
        (r"a\tb\r", "a\tb\r"),
        (r"\\n", r"\n"),
        (r"\x41\x0a", "A\n"),
        (r"\xc3\xa9", "é"),
        ("\\u00e9", "é"),
        ("\\ud83d\\ude00", "😀"),
        (r"\"\'", "\"'"),
        (r"\end", r"\end"),
        ("\\", "\\"),
        (r"\x4", r"\x4"),
        ("é\\nü", "é\nü"),
    ],
)
def test_escapes_mean_what_they_mean_elsewhere_and_other_backslashes_themselves(written: str, meant: str) -> None:
    assert text.unescape(written, "--stop") == meant


@pytest.mark.parametrize("written", [r"\xe9", r"\xc3a", "\\ud83d", "\\ude00x"])
def test_an_escape_that_is_no_character_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match=r"--stop holds \\[xu][0-9a-f]+, which is not UTF-"):
        text.unescape(f"ab{written}", "--stop")


@given(st.text())
def test_a_text_whose_backslashes_are_doubled_is_itself(given: str) -> None:
    assert text.unescape(given.replace("\\", "\\\\"), "--stop") == given


@given(st.text(), st.booleans())
def test_a_leading_byte_order_mark_is_dropped_and_no_other(given: str, marked: bool) -> None:
    assert text.decode(given.encode("utf-8-sig" if marked else "utf-8"), "f") == given.removeprefix(
        "" if marked else "\ufeff"
    )


def test_invalid_utf_8_after_a_mark_is_counted_from_the_start() -> None:
    with pytest.raises(ValueError, match="f is not UTF-8: byte 0xff at offset 4"):
        text.decode(b"\xef\xbb\xbfa\xff", "f")


SHOW = "import sys; from fastllama.cli.text import read_input; sys.stdout.write(ascii(read_input()))"


def read_input(**settings: object) -> str:
    return subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True, **settings).stdout  # type: ignore[call-overload]


def test_pipes_files_and_sockets_are_read_and_devices_are_not(tmp_path: Path) -> None:
    assert read_input(input="a fox\n") == "'a fox'"
    assert read_input(input="") == "''"
    assert read_input(stdin=subprocess.DEVNULL) == "''"
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfZo\xc3\xab\r\n")
    with file.open() as opened:
        assert read_input(stdin=opened) == r"'Zo\xeb'"
    here, there = socket.socketpair()
    with here, there:
        here.sendall(b"by socket")
        here.shutdown(socket.SHUT_WR)
        assert read_input(stdin=there) == "'by socket'"
    primary, secondary = os.openpty()  # no terminal input there: reading it would not end
    try:
        assert read_input(stdin=secondary) == "''"
    finally:
        os.close(primary)
        os.close(secondary)


@pytest.mark.parametrize(("quiet", "shown"), [(False, True), (True, False)])
def test_waiting_for_a_prompt_on_a_terminal_is_announced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quiet: bool, shown: bool
) -> None:
    reader, writer = os.pipe()
    timer = threading.Timer(0.2, os.close, (writer,))
    timer.start()
    with open(reader, encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        monkeypatch.setattr(text, "PATIENCE", 0.02)
        assert text.read_input(quiet=quiet) == ""
    assert capsys.readouterr().err == ("fastllama: reading the prompt from standard input\n" if shown else "")
    timer.join()


def test_a_locale_without_utf_8_takes_arguments_as_utf_8_all_the_same() -> None:
    code = "import sys; from fastllama.cli.text import argument; print(ascii(argument(sys.argv[1])))"
    plain = os.environ | {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = [sys.executable, "-c", code]
    done = subprocess.run([*run, "Zo\xeb".encode()], capture_output=True, text=True, env=plain)
    assert done.stdout == "'Zo\\xeb'\n", done.stderr
    done = subprocess.run([*run, b"a\xff"], capture_output=True, text=True, env=plain)
    assert "is not UTF-8: byte 0xff at offset 1; the locale's encoding is ascii" in done.stderr
