"""Renders log-probabilities of tokens in the two formats of OpenAI's API."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from fastllama.io.tokenizer import Tokenizer
from fastllama.runtime.outputs import TokenLogprob
from fastllama.serve import wire

_LEAST = -9999.0  # replaces minus infinity, which JSON lacks; OpenAI's value for very unlikely tokens


def _token_bytes(tokenizer: Tokenizer, token_id: int, *, skip_special_tokens: bool = False) -> bytes:
    """Returns a token's bytes; empty for an id without a token, since a model may have more embeddings."""
    if token_id >= tokenizer.vocab_size:
        return b""
    return tokenizer.token_bytes(token_id, skip_special_tokens=skip_special_tokens)


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return _token_bytes(tokenizer, token_id).decode("utf-8", "replace")


class ShownBytes:
    """The visible bytes of a text's tokens, in order.

    begun: whether text precedes it; otherwise the first token's leading space is dropped, as in Tokenizer.decode.
    """

    def __init__(self, tokenizer: Tokenizer, *, begun: bool, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._drops_space = tokenizer.adds_leading_space and not begun

    def of(self, token_id: int, *, ends: bool = False) -> bytes | None:
        """Returns the bytes of the next token; None if it is invisible. ends: it is a stop token, so invisible."""
        data = b"" if ends else _token_bytes(self._tokenizer, token_id, skip_special_tokens=self._skip)
        if data and self._drops_space:
            self._drops_space = False
            return data.removeprefix(b" ")
        return data or None


class ChatEntries:
    """Turns reports of an answer, as they arrive, into the entries of a chat's logprobs.

    Their bytes join to the answer before a stop string is cut: without the leading space of a text of its own, and
    without bytes for invisible tokens, which keep their names.
    """

    def __init__(self, tokenizer: Tokenizer, *, begun: bool = False, skip_special_tokens: bool = True) -> None:
        """begun: whether the answer continues a text, and so keeps its leading space."""
        self._tokenizer = tokenizer
        self._shown = ShownBytes(tokenizer, begun=begun, skip_special_tokens=skip_special_tokens)

    def of(self, reports: Sequence[TokenLogprob], *, ended: bool = False) -> wire.ChatLogprobs:
        """Returns the entries of the next tokens; ended: the last is a stop token."""
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
    """Turns reports of a text, as they arrive, into the columns of a completion's logprobs.

    An offset is the position in the visible text of the character that contains the token's first byte, U+FFFD for
    invalid bytes. An invisible token's offset is the end of the text before it.
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
        """before: token ids before the first report's. offset: characters shown before its text.

        shows_top: False leaves the column of the likeliest tokens null.
        """
        self._tokenizer, self._shows_top = tokenizer, shows_top
        end = _end_of(before, tokenizer, skip_special_tokens=skip_special_tokens)
        self._shown = ShownBytes(tokenizer, begun=bool(end), skip_special_tokens=skip_special_tokens)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(end)
        # A prompt that ends inside a character has shown it as U+FFFD; the completed character begins before the
        # answer.
        self._least, self._num_certain = offset, offset - self._num_pending

    @property
    def _num_pending(self) -> int:
        """Characters with missing bytes: one or none."""
        return int(bool(self._decoder.getstate()[0]))

    def of(
        self, token_ids: Sequence[int], reports: Iterable[TokenLogprob | None], *, ended: bool = False
    ) -> wire.CompletionLogprobs:
        """Returns the columns of the next tokens; a missing report is null.

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
        """Returns the offset of the next token's text."""
        data = self._shown.of(token_id, ends=ends) or b""
        # The last character up to the token's first byte, which may continue an earlier one.
        self._num_certain += len(self._decoder.decode(data[:1]))
        place = self._num_certain + self._num_pending - len(data[:1])
        self._num_certain += len(self._decoder.decode(data[1:]))
        return max(place, self._least)

    def _top(self, report: TokenLogprob) -> dict[str, float]:
        """Likeliest tokens by text, the better one if two share a text; includes the actual token, as OpenAI does."""
        top: dict[str, float] = {}
        for token_id, logprob in (*report.top, (report.token_id, report.logprob)):
            top.setdefault(_text(self._tokenizer, token_id), max(logprob, _LEAST))
        return top


def _end_of(token_ids: Sequence[int], tokenizer: Tokenizer, *, skip_special_tokens: bool) -> bytes:
    """Returns a prompt's last visible bytes: four or more, the most of a character, or all there are."""
    data = b""
    for token_id in reversed(token_ids):
        if len(data) >= 4:
            break
        data = _token_bytes(tokenizer, token_id, skip_special_tokens=skip_special_tokens) + data
    return data


def joined(first: wire.CompletionLogprobs, second: wire.CompletionLogprobs) -> wire.CompletionLogprobs:
    """Returns the columns of a text and of its continuation, joined."""
    return wire.CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=None if first.top_logprobs is None else first.top_logprobs + (second.top_logprobs or []),
        text_offset=first.text_offset + second.text_offset,
    )
