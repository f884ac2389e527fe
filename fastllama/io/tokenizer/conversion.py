"""Converts a tokenizer of transformers into ours, through the files that it saves."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastllama.errors import CheckpointError, ExtraRequiredError, brief, shown
from fastllama.io.formats.json_files import read_json
from fastllama.io.tokenizer.base import CONTROL_PIECES, INFILLING_PIECES, Tokenizer
from fastllama.io.tokenizer.find import load_tokenizer
from fastllama.io.tokenizer.settings import CONFIG, NAMES

_LOG = logging.getLogger("fastllama")
# Texts on which tokenizers differ: spaces, line ends, digits, case, programs, scripts, composed and unknown signs, an
# empty text; and spaces before punctuation, which `clean_up_tokenization_spaces` removes from a decoded text.
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
    "Well , it 's so . Do n't we 've ?",
)
_MOST_ADDED = 32


class _Reading(NamedTuple):
    """A converted tokenizer; the reason why it cannot replace the given one, or ""; tolerated differences."""

    tokenizer: Tokenizer | None
    trouble: str = ""
    remarks: tuple[str, ...] = ()


def as_tokenizer(tokenizer: Any) -> Tokenizer | None:
    """Our tokenizer: the given one, the one at a path, or one read from the files that a transformers tokenizer saves.

    The last must have transformers' `save_pretrained` and `__call__`. Both must have the same special tokens, encode
    some odd texts alike, with its added tokens too, and decode the ids alike. Where they differ with the files read by
    the rules of transformers 5.23 (it overrides the leading space of a "legacy" Llama), tokenizer.json is read without
    them. Else the result is None, and a warning names the first difference, or why the files cannot be read.

    Two differences only cause a warning: the text after `<s>`, `</s>` or `<unk>`, since plain prompts are encoded
    alike, and `clean_up_tokenization_spaces`, which many files set, transformers before 5 obeys, and ours never does.
    Raises TypeError for anything else, and the errors of `load_tokenizer` and `save_pretrained`.
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
        reading = _read(Path(written), tokenizer)
        if reading.tokenizer and (reading.trouble or reading.remarks) and _forget_class(Path(written)):
            literal = _read(Path(written), tokenizer)
            reading = min(reading, literal, key=lambda each: (bool(each.trouble), len(each.remarks)))
    found, trouble, remarks = reading
    if found is None or trouble:
        _LOG.warning("tokenizer %s is not used, only token ids go in and out: %s", shown(name), shown(trouble, 400))
        return None
    for remark in remarks:
        _LOG.warning("tokenizer %s is used, but %s", shown(name), shown(remark, 400))
    found.path = Path(name, found.path.name)  # for messages; the file itself is gone
    return found


def _forget_class(folder: Path) -> bool:
    """Drop the class name from tokenizer_config.json, so that it cannot override tokenizer.json; True if changed."""
    if not (folder / "tokenizer.json").is_file() or not (folder / CONFIG).is_file():
        return False
    content = read_json(folder / CONFIG)
    if content.pop("tokenizer_class", None) is None:
        return False
    (folder / CONFIG).write_text(json.dumps(content), encoding="utf-8")
    return True


def _read(folder: Path, theirs: Any) -> _Reading:
    """The tokenizer of a folder, compared with transformers'."""
    try:
        ours = load_tokenizer(folder)
    except (CheckpointError, ExtraRequiredError, FileNotFoundError) as error:
        return _Reading(None, str(error).replace(f"{folder}/", "").replace(str(folder), "its files"))
    for name, found, expected in _named(ours, theirs):
        if found != expected:
            return _Reading(ours, f"its {name} is {brief(expected)}, ours {brief(found)}")
    remarks = []
    after_control_pieces = [_in_words(piece) for piece in CONTROL_PIECES]
    for text, ids, expected_ids in _encoded(ours, theirs):
        if ids != expected_ids:
            seen = f"of the text {brief(text)} it makes {brief(expected_ids)}, ours {brief(ids)}"
            if text not in after_control_pieces or _special(ours, ids) != _special(ours, expected_ids):
                return _Reading(ours, seen)
            remarks.append(f"text after a control piece is encoded differently: {seen}")
    cleaned = []
    for ids, found, expected in _decoded(ours, theirs):
        if found != expected:
            seen = f"the ids {brief(ids)} are the text {brief(expected)} by it, {brief(found)} by ours"
            if not getattr(theirs, "clean_up_tokenization_spaces", False) or found != _uncleaned(theirs, ids):
                return _Reading(ours, seen)
            cleaned.append(f"its clean_up_tokenization_spaces is not followed: {seen}")
    return _Reading(ours, "", (*remarks[:1], *cleaned[:1]))


def _named(ours: Tokenizer, theirs: Any) -> Iterator[tuple[str, str | int | None, str | int | None]]:
    """The special tokens that chat templates can read, and the ids of BOS and EOS: name, ours, transformers'."""
    named = getattr(theirs, "special_tokens_map", None)
    if isinstance(named, Mapping):
        others = (
            name for name, piece in named.items() if isinstance(piece, str) and name not in (*NAMES, "fill_token")
        )
        for name in (*NAMES, *others):
            yield name, ours.special_tokens.get(name), named.get(name)
    for name in ("bos_token_id", "eos_token_id"):
        token_id = getattr(theirs, name, None)
        if token_id is not None:  # ours may find tokens in the vocabulary that theirs does not name
            yield name, getattr(ours, name), token_id


def _encoded(ours: Tokenizer, theirs: Any) -> Iterator[tuple[str, list[int], list[int]]]:
    """Texts, and the ids of each by both, where ours must equal transformers'; class Tokenizer lists the exceptions."""
    for text in _TEXTS:
        yield text, ours.encode(text), _ids(theirs(text))
    unasked = {*INFILLING_PIECES, getattr(theirs, "fill_token", None), *(() if ours.chat_template else CONTROL_PIECES)}
    pieces = {*ours.special_pieces(), *getattr(theirs, "added_tokens_encoder", ())}
    added = [piece for piece in sorted(pieces) if piece not in unasked][:_MOST_ADDED]
    for text in (*_TEXTS, *map(_in_words, added)):
        yield text, ours.encode_template(text), _ids(theirs(text, add_special_tokens=False))


def _decoded(ours: Tokenizer, theirs: Any) -> Iterator[tuple[list[int], str, str]]:
    """Ids of texts, and the text of each by both; nothing where theirs cannot decode."""
    if callable(getattr(theirs, "decode", None)):
        for text in _TEXTS:
            ids = ours.encode_template(text)
            yield ids, ours.decode(ids), theirs.decode(ids, skip_special_tokens=True)


def _uncleaned(theirs: Any, ids: list[int]) -> str:
    return str(theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _in_words(piece: str) -> str:
    """A text with an added piece, between words and within one."""
    return f"a {piece} b{piece}c\n"


def _special(ours: Tokenizer, ids: list[int]) -> list[int]:
    return [token_id for token_id in ids if token_id in ours.special_ids]


def _ids(encoded: Any) -> list[int]:
    return [int(token_id) for token_id in encoded["input_ids"]]
