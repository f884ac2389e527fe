"""Text from arguments, files and standard input: bytes, read as strict UTF-8."""

from __future__ import annotations

import io
import os
import re
import stat
import sys
from argparse import ArgumentTypeError
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

from fastllama.errors import brief

PATIENCE = 1.0  # seconds of waiting for standard input before a message
SIMPLE = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
_ESCAPE = re.compile(r"""\\([ntr\\'"])|((?:\\x[0-9a-fA-F]{2})+)|((?:\\u[0-9a-fA-F]{4})+)""")


def read_prompt(path: str, *, quiet: bool = False) -> str:
    """The text of a file, or of standard input for "-", without byte order mark and last newline.

    quiet: print no message while waiting for standard input. Raises ValueError if the text is empty or not UTF-8,
    OSError if it cannot be read.
    """
    source = "standard input" if path == "-" else path
    if path == "-":
        with _announced(quiet):
            data = sys.stdin.buffer.read()
    else:
        data = Path(path).read_bytes()
    if not data:
        raise ValueError(f"{source} is empty; legal: text (the empty prompt is --prompt '')")
    return decode(data, source).removesuffix("\n").removesuffix("\r")


def read_input(*, quiet: bool = False) -> str:
    """Piped or redirected standard input, read as by `read_prompt`; "" where there is none.

    Neither a terminal nor a device such as /dev/null is read.
    """
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except io.UnsupportedOperation:  # sys.stdin was replaced by a stream without a descriptor
        mode = stat.S_IFREG
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return ""
    with _announced(quiet):
        data = sys.stdin.buffer.read()
    return decode(data, "standard input").removesuffix("\n").removesuffix("\r")


def read_document(path: str, *, per_line: bool) -> tuple[str, str]:
    """A text for evaluation or calibration, from a file or, for "-", standard input; and its name.

    The last newline is dropped unless per_line. Raises ValueError if the text is empty or not UTF-8, OSError if it
    cannot be read.
    """
    source = "standard input" if path == "-" else path
    text = decode(sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes(), source)
    if not per_line:
        text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise ValueError(f"{source} is empty; legal: a text")
    return text, source


def decode(data: bytes, source: str) -> str:
    """Decode UTF-8, without the byte order mark that Windows programs write.

    Raises ValueError with the source, the invalid byte and its offset.
    """
    try:
        return data.removeprefix(BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        start = error.start + (len(BOM_UTF8) if data.startswith(BOM_UTF8) else 0)
        raise ValueError(f"{source} is not UTF-8: byte 0x{data[start]:02x} at offset {start}") from None


def unescape(text: str, name: str) -> str:
    r"""Replace the escapes \n, \t, \r, \\, \', \", \xHH (a byte of UTF-8) and \uHHHH.

    Every other backslash stays, as in llama.cpp. Raises ValueError with the argument's name where \x or \u do not
    encode a character.
    """

    def character(found: re.Match[str]) -> str:
        simple, octets, units = found.groups()
        try:
            if octets:
                return bytes.fromhex(octets.replace("\\x", "")).decode()
            return SIMPLE[simple] if simple else bytes.fromhex(units.replace("\\u", "")).decode("utf-16-be")
        except UnicodeDecodeError:
            what = r"UTF-8; legal: as \xc3\xa9 or \u00e9" if octets else r"UTF-16; legal: as \u00e9 or \ud83d\ude00"
            raise ValueError(f"{name} holds {found[0]}, which is not {what}") from None

    return _ESCAPE.sub(character, text)


def argument(value: str) -> str:
    """The argparse type of text options; the text may begin with a dash: `--prompt -hello` is `--prompt=-hello`.

    Read as UTF-8 whatever the locale, as files are. Raises ArgumentTypeError for invalid UTF-8.
    """
    try:
        return os.fsencode(value).decode()
    except UnicodeDecodeError as error:
        what = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        locale = f"the locale's encoding is {sys.getfilesystemencoding()}"
        raise ArgumentTypeError(f"{brief(value)} is not UTF-8: {what}; {locale}") from None


@contextmanager
def _announced(quiet: bool) -> Iterator[None]:
    """Print a line to standard error where reading standard input takes longer than PATIENCE."""
    line = "fastllama: reading the prompt from standard input"
    timer = Timer(PATIENCE, print, (line,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if not quiet:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
