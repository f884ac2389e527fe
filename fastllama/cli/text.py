"""Text from files and standard input: bytes, read as strict UTF-8."""

from __future__ import annotations

import sys
from pathlib import Path


def read_prompt(path: str) -> str:
    """The text of a file, of standard input where path is "-", less the one newline that ends it.

    Raises ValueError if it is empty or no UTF-8, OSError if it cannot be read.
    """
    source = "standard input" if path == "-" else path
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    if not data:
        raise ValueError(f"{source} is empty; legal: text (the empty prompt is --prompt '')")
    return decode(data, source).removesuffix("\n").removesuffix("\r")


def decode(data: bytes, source: str) -> str:
    """UTF-8 to text. Raises ValueError naming the source, the offending byte and where it is."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}") from None
