"""Passes a request's deltas from the engine's thread to the asyncio loop that reads them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from fastllama.errors import RequestError
from fastllama.runtime.outputs import CompletionOutput, FinishReason, RequestDelta, RequestMetrics, TokenLogprob


@dataclass
class _Gain:
    """Unread tokens and text of one sample."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class Mailbox:
    """Deltas of one request. Unread ones are merged: a client that never reads costs its tokens once.

    Any thread may put, one task reads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._gains: dict[int, _Gain] = {}
        self._prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        self._metrics: RequestMetrics | None = None
        self._error: BaseException | None = None
        self._over = False  # nothing more will be put
        self._reader: asyncio.Future[None] | None = None

    def put(
        self,
        pieces: Iterable[CompletionOutput],
        *,
        prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None,
        metrics: RequestMetrics | None = None,
    ) -> asyncio.Future[None] | None:
        """Add unread pieces; returns the waiting reader, to be woken, if there is one."""
        with self._lock:
            for piece in pieces:
                gain = self._gains.setdefault(piece.index, _Gain())
                gain.text.append(piece.text)
                gain.token_ids.extend(piece.token_ids)
                if piece.logprobs is not None:
                    gain.logprobs = gain.logprobs or []
                    gain.logprobs.extend(piece.logprobs)
                gain.finish_reason, gain.stop_reason = piece.finish_reason, piece.stop_reason
            if prompt_logprobs is not None:
                self._prompt_logprobs = prompt_logprobs
            if metrics is not None:
                self._metrics = metrics
            return self._take_reader()

    def end(self, error: BaseException | None = None) -> asyncio.Future[None] | None:
        """Mark the end, with an error to raise once all is read; returns the waiting reader, if there is one."""
        with self._lock:
            self._error, self._over = error, True
            return self._take_reader()

    def take(self, reader: asyncio.Future[None]) -> RequestDelta | None:
        """Returns all that is unread; if nothing is, registers the reader, to be woken, and returns None.

        Raises RequestError if the request failed, StopAsyncIteration after its end.
        """
        with self._lock:
            if self._gains or self._metrics is not None:
                outputs = tuple(_output(index, self._gains[index]) for index in sorted(self._gains))
                delta = RequestDelta(outputs, self._prompt_logprobs, self._metrics)
                self._gains, self._prompt_logprobs, self._metrics = {}, None, None
                return delta
            if self._error is not None:
                error, self._error = self._error, None
                if isinstance(error, RequestError):
                    raise error
                raise RequestError(f"the request failed: {error!r}") from error
            if self._over:
                raise StopAsyncIteration
            self._reader = reader
            return None

    def _take_reader(self) -> asyncio.Future[None] | None:
        reader, self._reader = self._reader, None
        return reader


def wake(readers: Iterable[asyncio.Future[None] | None]) -> None:
    """Wake readers, so that they check their mailboxes again, with one call per event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for reader in readers:
        if reader is not None:
            by_loop.setdefault(reader.get_loop(), []).append(reader)
    for loop, futures in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, futures)
        except RuntimeError:  # that loop is closed, and its readers are gone
            continue


def _resolve(futures: Iterable[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


def _output(index: int, gain: _Gain) -> CompletionOutput:
    return CompletionOutput(
        index=index,
        text="".join(gain.text),
        token_ids=tuple(gain.token_ids),
        finish_reason=gain.finish_reason,
        stop_reason=gain.stop_reason,
        logprobs=None if gain.logprobs is None else tuple(gain.logprobs),
    )
