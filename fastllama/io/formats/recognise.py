"""Recognises a file by its first bytes, for the error about a file that is not what its name promises."""

from __future__ import annotations

import json
import re
from pathlib import Path

_HEAD = 4096
_AGAIN = "download it again, logged in where it is gated"
_NOT_READ = "which is not read; give the Hugging Face folder that it was made from"
_MAGIC = {
    b"GGUF": f"a GGUF file, {_NOT_READ}",
    b"lmgg": f"a GGML file of an old llama.cpp, {_NOT_READ}",
    b"fmgg": f"a GGML file of an old llama.cpp, {_NOT_READ}",
    b"tjgg": f"a GGML file of an old llama.cpp, {_NOT_READ}",
    b"24ka": "a llama2.c file",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"\xfd7zXZ\0": "an xz archive; unpack it",
    b"BZh": "a bzip2 archive; unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it",
    b"Rar!\x1a": "a RAR archive; unpack it",
    b"\x89HDF\r\n\x1a\n": f"an HDF5 file (Keras, TensorFlow), {_NOT_READ}",
    b"\x93NUMPY": f"a NumPy array, {_NOT_READ}",
    b"\0\x05\x16\x07": "macOS metadata of a file, not the file itself; copy it without the ._ files",
}
_TORCH_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # pickled first by torch.save before 1.6
_TIKTOKEN = re.compile(rb"(?:[A-Za-z0-9+/]+={0,2} \d+\r?\n){2}")
_PIECE = re.compile(rb"\x0a.{1,2}?\x0a[\x01-\x40]", re.DOTALL)  # ModelProto.pieces[0].piece, with its length bytes
_XML_CODE = re.compile(r"<(?:Code|Message)>([\w .]{1,60})<")
_TEXT_CONTROLS = frozenset("\t\n\r\f\b")


def what_is(path: Path) -> str | None:
    """A noun phrase for the file at `path`, followed by advice where there is some.

    Reads the first 4096 bytes only and raises nothing: `f"{path} is {what_is(path)}"` is a sentence. None for an
    unknown format, or a missing file.
    """
    try:
        if path.is_symlink() and not path.exists():
            return f"a link that leads nowhere (to {str(path.readlink())!r}); copy what it links to as well"
        if path.is_dir():
            return "a folder"
        if not path.is_file():
            return "no regular file" if path.exists() else None
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except PermissionError:
        return "a file that this user may not read; change its permissions"
    except OSError as error:
        return f"a file that cannot be read ({error.strerror})"
    return _binary(head) or _text(head)


def _binary(head: bytes) -> str | None:
    if not head:
        return f"empty; {_AGAIN}"
    if head[:1] == b"\x80" and _TORCH_MAGIC in head[:64]:
        return "PyTorch weights (torch.save's old format)"
    if not any(head):
        return "zero bytes where its content should begin, as an unfinished download leaves it; download it again"
    if found := next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None):
        return found
    if head.startswith(b"PK"):
        return "PyTorch weights (torch.save)" if b"/data.pkl" in head[:512] else "a zip archive; unpack it"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 1 << 32:
        return "a safetensors file"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a Python pickle"
    if _PIECE.match(head):
        return "a SentencePiece model"
    if head[:1] == b"\x08" and head[2:3] == b"\x12" and 0 < head[1] < 32:  # ModelProto.ir_version, producer_name
        return f"an ONNX model, {_NOT_READ}"
    return None


def _text(head: bytes) -> str | None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16 text; save it as UTF-8"
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3 or len(head) < _HEAD:  # else the end of `head` cuts a character
            return None
        text = head[: error.start].decode("utf-8-sig")
    if any(ord(letter) < 32 and letter not in _TEXT_CONTROLS for letter in text):
        return None
    text = text.lstrip()
    lower = text[:1000].lower()
    if text.startswith("version https://git-lfs"):
        return "a Git LFS pointer, not the file itself; run `git lfs pull`"
    if _TIKTOKEN.match(head):
        return "a tiktoken table, as Llama 3's own tokenizer.model; use its tokenizer.json"
    if lower.startswith(("<!doctype html", "<html", "<head", "<body")) or (
        lower.startswith("<!--") and "<html" in lower
    ):
        return f"a web page saved under that name, not the file itself; {_AGAIN}"
    if lower.startswith(("<?xml", "<error")):
        code = _XML_CODE.search(text)
        status = f" ({code[1]})" if code else ""
        return f"an XML answer of a server{status}, not the file itself; {_AGAIN}"
    if text.startswith(("{", "[")):
        return _json(text)
    return f"text that begins with {_begin(text)}, not the file itself; {_AGAIN}"


def _json(text: str) -> str:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):  # longer than the bytes read, or not JSON
        return "a JSON file"
    error = content.get("error") or content.get("message") if isinstance(content, dict) else None
    if isinstance(error, str) and len(content) < 5:
        return f"an error message of a server ({_begin(error)}), not the file itself; {_AGAIN}"
    return "a JSON file"


def _begin(text: str) -> str:
    line = text.splitlines()[0] if text else ""
    return repr(line if len(line) <= 60 else line[:57] + "...")
