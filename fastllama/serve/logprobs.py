"""Log-probabilities of tokens in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastllama.io.detokenizer import IncrementalDetokenizer
from fastllama.io.tokenizer import Tokenizer
from fastllama.runtime.outputs import TokenLogprob
from fastllama.serve import wire

_LEAST = -9999.0  # stands for minus infinity, which JSON does not have; OpenAI's number for what is very unlikely


def _token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """Of a token, special ones spelled; none for an id without a piece: a model may have more embeddings."""
    return tokenizer.token_bytes(token_id, skip_special_tokens=False) if token_id < tokenizer.vocab_size else b""


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return _token_bytes(tokenizer, token_id).decode("utf-8", "replace")


def chat_logprobs(tokenizer: Tokenizer, reports: Iterable[TokenLogprob]) -> wire.ChatLogprobs:
    """An entry for each token, whose bytes join to the text where the tokens hold parts of characters."""

    def spell(token_id: int) -> tuple[str, list[int]]:
        data = _token_bytes(tokenizer, token_id)
        return data.decode("utf-8", "replace"), list(data)

    entries = []
    for report in reports:
        tops = []
        for token_id, logprob in report.top:
            text, data = spell(token_id)
            tops.append(wire.TopLogprob(token=text, logprob=max(logprob, _LEAST), bytes=data))
        text, data = spell(report.token_id)
        logprob = max(report.logprob, _LEAST)
        entries.append(wire.ChatLogprob(token=text, logprob=logprob, bytes=data, top_logprobs=tops))
    return wire.ChatLogprobs(content=entries)


class LogprobsTable:
    """Turns a text's reports, as they come, into the columns of a completion's logprobs.

    Offsets are where a token's text begins in the text that is shown: special tokens add none where they are skipped,
    and each part of a character begins where the character does.
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
        self._tokenizer, self._offset, self._shows_top = tokenizer, offset, shows_top
        known = [token_id for token_id in before if token_id < tokenizer.vocab_size]
        self._detokenizer = IncrementalDetokenizer(tokenizer, known, skip_special_tokens=skip_special_tokens)

    def of(self, token_ids: Iterable[int], reports: Iterable[TokenLogprob | None]) -> wire.CompletionLogprobs:
        """The columns of these tokens, which follow those of the call before; no report: null."""
        columns = wire.CompletionLogprobs(
            tokens=[], token_logprobs=[], top_logprobs=[] if self._shows_top else None, text_offset=[]
        )
        for token_id, report in zip(token_ids, reports, strict=True):
            columns.tokens.append(_text(self._tokenizer, token_id))
            columns.token_logprobs.append(None if report is None else max(report.logprob, _LEAST))
            columns.text_offset.append(self._offset)
            if columns.top_logprobs is not None:
                columns.top_logprobs.append(None if report is None else self._top(report))
            if token_id < self._tokenizer.vocab_size:
                self._offset += len(self._detokenizer.push(token_id))
        return columns

    def _top(self, report: TokenLogprob) -> dict[str, float]:
        """By text, the better where two tokens share one; the actual token is always in it, as with OpenAI."""
        top: dict[str, float] = {}
        for token_id, logprob in (*report.top, (report.token_id, report.logprob)):
            top.setdefault(_text(self._tokenizer, token_id), max(logprob, _LEAST))
        return top


def joined(first: wire.CompletionLogprobs, second: wire.CompletionLogprobs) -> wire.CompletionLogprobs:
    """The columns of a text and of what follows it."""
    return wire.CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=None if first.top_logprobs is None else first.top_logprobs + (second.top_logprobs or []),
        text_offset=first.text_offset + second.text_offset,
    )
