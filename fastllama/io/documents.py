"""Splits a text into documents of token ids, for perplexity and for calibration."""

from __future__ import annotations

import io
from collections.abc import Iterator

from fastllama.errors import check_range, counted
from fastllama.io.tokenizer import Tokenizer


def text_documents(text: str, tokenizer: Tokenizer, *, per_line: bool = False) -> list[list[int]]:
    r"""Token ids of a text, by document, as for `perplexity`.

    One document, with BOS where the tokenizer's files specify it and without EOS; or with per_line one for each line
    that is not blank, between BOS (where the vocabulary has one) and EOS, as short training documents are. In both
    cases newlines are universal: \r\n and \r are read as \n, and a line ends nowhere else.
    Raises ValueError where all lines are blank.
    """
    read = io.StringIO(text, newline=None)  # universal newlines
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if not per_line:
        ids, ends_in_eos = tokenizer.encode(read.read()), tokenizer.encode("")[-1:] == [eos]
        return [ids[:-1] if ends_in_eos else ids]
    lines = [line.removesuffix("\n") for line in read]
    filled = [line for line in lines if line.strip()]
    if not filled:
        raise ValueError(f"each of the text's {counted(len(lines), 'line')} is blank; legal: one that is not")
    before = [] if bos is None else [bos]
    return [[*before, *tokenizer.encode(line, bos=False), eos] for line in filled]


def calibration_documents(
    text: str, tokenizer: Tokenizer, *, per_line: bool, context: int, samples: int
) -> list[list[int]]:
    """Calibration documents of a text: `text_documents`, cut into windows and sampled.

    A document longer than context is cut into windows of that many tokens, each begun with BOS if the document is; the
    rest is dropped if it is less than half a window. Of more documents than samples, that many are taken, evenly spaced
    from the text's start to its end, so the choice is deterministic.
    Raises ValueError for a context below 2, samples below 1, and a text that is blank or without tokens.
    """
    check_range("context", context, 2)
    check_range("samples", samples, 1)
    documents = text_documents(text, tokenizer, per_line=per_line)
    found = [window for ids in documents for window in _windows(ids, tokenizer.bos_token_id, context)]
    if not found or not text.strip():
        raise ValueError("the text is blank; legal: one that is not")
    count = min(samples, len(found))
    return [found[(2 * number + 1) * len(found) // (2 * count)] for number in range(count)]


def _windows(ids: list[int], bos: int | None, context: int) -> Iterator[list[int]]:
    """A document in windows of at most context tokens; none for a document without text."""
    start = ids[:1] if bos is not None and ids[:1] == [bos] else []
    text, size = ids[len(start) :], context - len(start)
    for begin in range(0, len(text), size):
        window = text[begin : begin + size]
        if begin == 0 or 2 * len(window) >= size:
            yield [*start, *window]
