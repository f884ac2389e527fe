"""The deltas of one request, as its task reads them."""

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

    To close it, to cancel the task that waits for its next delta, or to let go of it aborts the request. What came
    while nobody read is one delta. It ends like this only where the request ended by itself or by its deadline; behind
    the last delta of one that failed or was aborted it raises RequestError, with the cause.
    Raises RuntimeError where a second task reads while one waits, and in a forked process.
    """

    def __init__(self, order: Order, access: Access, leave: Callable[[Order], None]) -> None:
        """leave: of who runs the request, and told that nobody reads any more; kept, and with it what it belongs to."""
        self.order, self._access, self._leave = order, access, leave
        self._closed = self._reading = False

    @property
    def request_id(self) -> str:
        """The request's id, for AsyncEngine.abort."""
        return self.order.request_id

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestDelta:
        self._access.check_process()  # whose mailbox may be locked for good
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
        """The whole request, once its last delta was read. Raises RuntimeError before."""
        return self._ended().output()

    def score(self) -> ScoreOutput:
        """The same of a prompt that was scored."""
        return self._ended().score()

    def _ended(self) -> Generation:
        generation = self.order.generation
        if generation is None or not generation.finished:
            raise RuntimeError(f"request {self.request_id!r} has not ended; legal: after the stream's last delta")
        return generation

    def close(self) -> None:
        """Abort the request, if it has not ended; nothing more is read. May be called twice."""
        self._access.check_process()
        self._closed = True
        wake([self.order.mailbox.end()])
        self._leave(self.order)

    async def aclose(self) -> None:
        """The same, for contextlib.aclosing."""
        self.close()

    def __del__(self) -> None:
        self._leave(self.order)
