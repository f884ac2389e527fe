"""Log-probabilities of tokens in the two shapes of OpenAI's API."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from fastllama.io.tokenizer import Tokenizer
from fastllama.runtime.outputs import TokenLogprob
from fastllama.serve import wire

_LEAST = -9999.0  # stands for minus infinity, which JSON does not have; OpenAI's number for what is very unlikely


def _token_bytes(tokenizer: Tokenizer, token_id: int, *, skip_special_tokens: bool = False) -> bytes:
    """Of a token, special ones spelled or none; none for an id without a piece: a model may have more embeddings."""
    if token_id >= tokenizer.vocab_size:
        return b""
    return tokenizer.token_bytes(token_id, skip_special_tokens=skip_special_tokens)


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return _token_bytes(tokenizer, token_id).decode("utf-8", "replace")


class ShownBytes:
    """The bytes that a text's tokens show, one after another.

    begun: a text stands before it; else the space is left out that its first token begins with, as in Tokenizer.decode.
    """

    def __init__(self, tokenizer: Tokenizer, *, begun: bool, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._drops_space = tokenizer.adds_leading_space and not begun

    def of(self, token_id: int, *, ends: bool = False) -> bytes | None:
        """Those of the next token; None if it shows no text. ends: it is a stop token, which shows none."""
        data = b"" if ends else _token_bytes(self._tokenizer, token_id, skip_special_tokens=self._skip)
        if data and self._drops_space:
            self._drops_space = False
            return data.removeprefix(b" ")
        return data or None


class ChatEntries:
    """Turns an answer's reports, as they come, into the entries of a chat's logprobs.

    Their bytes join to the answer, as it is before a stop string cuts it: of the space that the first token of a text
    of its own begins with, it has none, and a token that shows no text keeps its name, but has no bytes.
    """

    def __init__(self, tokenizer: Tokenizer, *, begun: bool = False, skip_special_tokens: bool = True) -> None:
        """begun: the answer goes on with a text, and so keeps its space."""
        self._tokenizer = tokenizer
        self._shown = ShownBytes(tokenizer, begun=begun, skip_special_tokens=skip_special_tokens)

    def of(self, reports: Sequence[TokenLogprob], *, ended: bool = False) -> wire.ChatLogprobs:
        """The entries of these tokens, which follow those of the call before; ended: the last is a stop token."""
        entries = []
        for place, report in enumerate(reports, 1):
            tops = []
            for token_id, logprob in report.top:
                data = _token_bytes(self._tokenizer, token_id)
                text = data.decode("utf-8", "replace")
                tops.append(wire.TopLogprob(token=text, logprob=max(logprob, _LEAST), bytes=list(data)))
            shown = self._shown.of(report.token_id, ends=ended and place == len(reports))
            text = _text(self._tokenizer, report.token_id) if shown is None else shown.decode("utf-8", "replace")
            logprob = max(report.logprob, _LEAST)
            entries.append(wire.ChatLogprob(token=text, logprob=logprob, bytes=list(shown or b""), top_logprobs=tops))
        return wire.ChatLogprobs(content=entries)


class LogprobsTable:
    """Turns a text's reports, as they come, into the columns of a completion's logprobs.

    Offsets are where a token's text begins in the text that is shown: that of the character that its first byte is
    part of, U+FFFD where the bytes are none. A token without text stands behind all before it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        before: Sequence[int] = (),
        *,
        offset: int = 0,
        skip_special_tokens: bool = True,
        shows_top: bool = True,
    ) -> None:
        """before: token ids in front of the first report's. offset: characters shown in front of its text.

        shows_top: False leaves the column of the likeliest tokens null.
        """
        self._tokenizer, self._shows_top = tokenizer, shows_top
        end = _end_of(before, tokenizer, skip_special_tokens=skip_special_tokens)
        self._shown = ShownBytes(tokenizer, begun=bool(end), skip_special_tokens=skip_special_tokens)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(end)
        # A prompt that ends inside a character has shown it, as U+FFFD: what it becomes begins before the answer.
        self._least, self._num_certain = offset, offset - self._num_pending

    @property
    def _num_pending(self) -> int:
        """Characters whose bytes are not all there: one or none."""
        return int(bool(self._decoder.getstate()[0]))

    def of(
        self, token_ids: Sequence[int], reports: Iterable[TokenLogprob | None], *, ended: bool = False
    ) -> wire.CompletionLogprobs:
        """The columns of these tokens, which follow those of the call before; no report: null.

        ended: the last is a stop token.
        """
        columns = wire.CompletionLogprobs(
            tokens=[], token_logprobs=[], top_logprobs=[] if self._shows_top else None, text_offset=[]
        )
        for place, (token_id, report) in enumerate(zip(token_ids, reports, strict=True), 1):
            columns.tokens.append(_text(self._tokenizer, token_id))
            columns.token_logprobs.append(None if report is None else max(report.logprob, _LEAST))
            columns.text_offset.append(self._place(token_id, ends=ended and place == len(token_ids)))
            if columns.top_logprobs is not None:
                columns.top_logprobs.append(None if report is None else self._top(report))
        return columns

    def _place(self, token_id: int, *, ends: bool) -> int:
        """Where the next token's text begins."""
        data = self._shown.of(token_id, ends=ends) or b""
        # It is the last of the characters up to its first byte, with which an earlier one may go on.
        self._num_certain += len(self._decoder.decode(data[:1]))
        place = self._num_certain + self._num_pending - len(data[:1])
        self._num_certain += len(self._decoder.decode(data[1:]))
        return max(place, self._least)

    def _top(self, report: TokenLogprob) -> dict[str, float]:
        """By text, the better where two tokens share one; the actual token is always in it, as with OpenAI."""
        top: dict[str, float] = {}
        for token_id, logprob in (*report.top, (report.token_id, report.logprob)):
            top.setdefault(_text(self._tokenizer, token_id), max(logprob, _LEAST))
        return top


def _end_of(token_ids: Sequence[int], tokenizer: Tokenizer, *, skip_special_tokens: bool) -> bytes:
    """What a prompt's last tokens show: four bytes, for no character has more, or all that there are."""
    data = b""
    for token_id in reversed(token_ids):
        if len(data) >= 4:
            break
        data = _token_bytes(tokenizer, token_id, skip_special_tokens=skip_special_tokens) + data
    return data


def joined(first: wire.CompletionLogprobs, second: wire.CompletionLogprobs) -> wire.CompletionLogprobs:
    """The columns of a text and of what follows it."""
    return wire.CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=None if first.top_logprobs is None else first.top_logprobs + (second.top_logprobs or []),
        text_offset=first.text_offset + second.text_offset,
    )
