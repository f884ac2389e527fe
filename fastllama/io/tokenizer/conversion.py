"""A tokenizer of transformers as one of ours, by way of the files that it writes."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastllama.errors import CheckpointError, ExtraRequiredError, brief, shown
from fastllama.io.tokenizer.base import CONTROL_PIECES, INFILLING_PIECES, Tokenizer
from fastllama.io.tokenizer.find import load_tokenizer

_LOG = logging.getLogger("fastllama")
# What tokenizers differ in: spaces, line ends, digits, case, code, scripts, composed signs, unknown signs, nothing.
_TEXTS = (
    "",
    "a",
    "Hello, world! It's 12:30.",
    "two  spaces,   three, and a tab\there ",
    "lines\nand\n\nmore\r\n\n",
    "def f(x_1, *args):\n    return {'y': x_1 ** 2}  # note\n\n\tif a != b: pass",
    "3.14159 1234567890 0x7F 1,000,000 ²½",
    "CamelCase UPPER naïve café e\u0301 Straße ﬁ",
    "日本語のテキスト 한국어 עברית हिन्दी Ελληνικά ไทย",
    "🙂👩\u200d👩\u200d👧🏽 🇫🇷 \u00a0\u2003\u200b…",
    "https://example.org/?q=a+b&c=%20#top <p>tag</p> [INST] </INST>",
    "\x07\ufffd\U0010ffff",
)
_MOST_ADDED = 32


def as_tokenizer(tokenizer: Any) -> Tokenizer | None:
    """Our tokenizer: one that is given, that at a path, or one of the files that a transformers tokenizer writes.

    The last must have transformers' `save_pretrained` and be called with a text. Both must encode some odd texts alike,
    with its added tokens too. Where they do not, the folder that it came from is tried: transformers 5 reads other ids
    out of what it writes, where SentencePiece vocabularies are "legacy". Else None, and a warning that names the first
    text that differs, or why the files cannot be read.
    Raises TypeError for anything else, what `load_tokenizer` raises, and what `save_pretrained` raises.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if isinstance(tokenizer, (str, Path)):
        return load_tokenizer(tokenizer)
    if isinstance(tokenizer, type) or not (callable(tokenizer) and callable(getattr(tokenizer, "save_pretrained", 0))):
        raise TypeError(
            f"tokenizer is {brief(tokenizer)}; legal: a path, fastllama's Tokenizer, a transformers tokenizer, or None"
        )
    name = str(getattr(tokenizer, "name_or_path", None) or type(tokenizer).__name__)
    with tempfile.TemporaryDirectory(prefix="fastllama-tokenizer-") as written:
        tokenizer.save_pretrained(written)
        found, trouble = _read(Path(written), tokenizer)
    if trouble and Path(name).is_dir():
        origin, other_trouble = _read(Path(name), tokenizer)
        if origin and not other_trouble and (found is None or origin.chat_template == found.chat_template):
            return origin
    if found is None or trouble:
        _LOG.warning("tokenizer %s is not used, only token ids go in and out: %s", shown(name), shown(trouble, 400))
        return None
    found.path = Path(name, found.path.name)  # what messages name, as the file itself is gone
    return found


def _read(folder: Path, theirs: Any) -> tuple[Tokenizer | None, str]:
    """The tokenizer of a folder, and why it is not the same as another; "" where it is."""
    try:
        ours = load_tokenizer(folder)
    except (CheckpointError, ExtraRequiredError, FileNotFoundError) as error:
        return None, str(error).replace(f"{folder}/", "").replace(str(folder), "its files")
    for text, found, expected in _encoded(ours, theirs):
        if found != expected:
            return ours, f"of the text {brief(text)} it makes {brief(expected)}, ours {brief(found)}"
    return ours, ""


def _encoded(ours: Tokenizer, theirs: Any) -> Iterator[tuple[str, list[int], list[int]]]:
    """Texts, and the ids of each by both, where ours is to be as transformers: the class Tokenizer tells where not."""
    for text in _TEXTS:
        yield text, ours.encode(text), _ids(theirs(text))
    unasked = {*INFILLING_PIECES, getattr(theirs, "fill_token", None), *(() if ours.chat_template else CONTROL_PIECES)}
    pieces = {*ours.special_pieces(), *getattr(theirs, "added_tokens_encoder", ())}
    added = [piece for piece in sorted(pieces) if piece not in unasked][:_MOST_ADDED]
    for text in (*_TEXTS, *(f"a {piece} b{piece}c\n" for piece in added)):
        yield text, ours.encode_template(text), _ids(theirs(text, add_special_tokens=False))


def _ids(encoded: Any) -> list[int]:
    return [int(token_id) for token_id in encoded["input_ids"]]
