"""The stream of one request's deltas, read by an asyncio task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fastllama.runtime.access import Access
from fastllama.runtime.generation import Generation
from fastllama.runtime.outputs import RequestDelta, RequestOutput, ScoreOutput
from fastllama.runtime.serving.mailbox import wake
from fastllama.runtime.serving.order import Order


class RequestStream:
    """The deltas of one request, for one task: `async for delta in stream`.

    Closing or dropping it, or cancelling the task that waits for its next delta, aborts the request. Unread output is
    merged into one delta. Iteration ends normally if the request finished or reached its deadline; after the last delta
    of a request that failed or was aborted it raises RequestError with the cause.
    Raises RuntimeError if a second task reads while one waits, and in a forked process.
    """

    def __init__(self, order: Order, access: Access, leave: Callable[[Order], None]) -> None:
        """leave: called when the stream is no longer read; the stream keeps a reference to it and its owner."""
        self.order, self._access, self._leave = order, access, leave
        self._closed = self._reading = False

    @property
    def request_id(self) -> str:
        """The request's id, for AsyncEngine.abort."""
        return self.order.request_id

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestDelta:
        self._access.check_process()  # of the fork, in which the mailbox may be locked for good
        if self._reading:
            raise RuntimeError("a task waits for this stream's next delta already; legal: one reader")
        self._reading = True
        try:
            while not self._closed:
                reader = asyncio.get_running_loop().create_future()
                delta = self.order.mailbox.take(reader)
                if delta is not None:
                    return delta
                await reader
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._reading = False
        raise StopAsyncIteration

    def output(self) -> RequestOutput:
        """Returns the whole request after its last delta was read. Raises RuntimeError before."""
        return self._ended().output()

    def score(self) -> ScoreOutput:
        """As `output`, for a prompt that was scored."""
        return self._ended().score()

    def _ended(self) -> Generation:
        generation = self.order.generation
        if generation is None or not generation.finished:
            raise RuntimeError(f"request {self.request_id!r} has not ended; legal: after the stream's last delta")
        return generation

    def close(self) -> None:
        """Abort the request, if it has not ended, and end the stream. May be called twice."""
        self._access.check_process()
        self._closed = True
        wake([self.order.mailbox.end()])
        self._leave(self.order)

    async def aclose(self) -> None:
        """As `close`, for contextlib.aclosing."""
        self.close()

    def __del__(self) -> None:
        self._leave(self.order)
