"""The asyncio interface: requests from any number of tasks, run by one thread that owns the engine."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor

from fastllama.errors import brief, check_range
from fastllama.io.chat.messages import Tags
from fastllama.runtime.calls import check_params, check_request_id, checked, reject
from fastllama.runtime.llm import LLM
from fastllama.runtime.outputs import RequestOutput, ScoreOutput
from fastllama.runtime.params import SamplingParams
from fastllama.runtime.prompts import Prepared, Prompt, length_of
from fastllama.runtime.serving.order import Order
from fastllama.runtime.serving.statistics import Health, Snapshot
from fastllama.runtime.serving.stream import RequestStream
from fastllama.runtime.serving.worker import Worker
from fastllama.runtime.values import flag, plain

AT_ONCE = 8192  # characters or ids of a prompt that the event loop tokenizes and checks itself: 2 to 4 ms
_CENTURY = 3.2e9  # seconds: the longest deadline


class AsyncEngine:
    """Serves an LLM to asyncio: tasks of any event loop add requests, and one thread runs them in one batch.

    llm: owned by the engine until its shutdown, or until the engine and its streams are garbage-collected; it stays
    open. Closing it shuts the engine down.
    max_queue_size: requests that may wait to be scheduled; further ones are rejected.

    An exception fails only the request that raised it and frees its pages. A slow reader delays no other request: its
    unread deltas are merged. `async with` shuts down at its end.
    Raises RuntimeError if another AsyncEngine owns the LLM; in a forked process, each method does.
    """

    def __init__(self, llm: LLM, *, max_queue_size: int = 1024) -> None:
        check_range("max_queue_size", max_queue_size, 1)
        self._llm, self._access = llm, llm.engine.access
        self.worker = Worker(llm.engine, max_queue_size)
        weakref.finalize(self, self.worker.end, "the AsyncEngine was garbage-collected").atexit = False

    @property
    def max_queue_size(self) -> int:
        """Most requests that may wait to be scheduled."""
        return self.worker.max_queue_size

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        deadline: float | None = None,
        request_id: str | None = None,
        tags: Tags = "refuse",
        add_special_tokens: bool = True,
        continues_text: bool | None = None,
        **unknown: Any,
    ) -> RequestStream:
        """Queue a prompt: a text, token ids, or the messages of a chat.

        deadline: seconds from now, after which unfinished samples end with "deadline", between two steps; if the prompt
        is still being tokenized, the stream raises RequestError with that reason.
        request_id: names it for `abort`; None makes one. tags, add_special_tokens, continues_text: as in LLM.chat,
        LLM.generate and LLM.start.
        Raises at once, and queues nothing: QueueFullError if max_queue_size requests wait, ValueError or TypeError for
        a request that can never run, RuntimeError while the engine drains or after its shutdown. A prompt of more than
        8192 characters is tokenized on another thread; its errors are raised by the stream, as RequestError.
        """
        reject(unknown, "AsyncEngine.add_request", AsyncEngine.add_request)
        how = checked(tags=tags, add_special_tokens=add_special_tokens)
        how["continues_text"] = None if continues_text is None else flag("continues_text", continues_text)
        self._access.check_process()
        check_params(params)
        params = self._llm.default_params if params is None else params
        prepare = partial(self._llm.prompts.prepare, prompt, params, **how)
        return self._queue(self._order(request_id, deadline), prompt, params, prepare)

    def check_room(self) -> None:
        """Raise QueueFullError, counted as rejected, if `add_request` would; call it before preparing a prompt."""
        self._access.check_process()
        self.worker.check_room()

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> RequestOutput:
        """Returns the whole output of a prompt. Arguments and errors are those of `add_request` and its stream."""
        stream = self.add_request(prompt, params, **options)
        async for _ in stream:
            pass
        return stream.output()

    async def score(
        self,
        prompt: Prompt,
        start: int = 1,
        *,
        top_logprobs: int = 0,
        deadline: float | None = None,
        request_id: str | None = None,
        tags: Tags = "refuse",
        add_special_tokens: bool = True,
        **unknown: Any,
    ) -> ScoreOutput:
        """Returns log-probabilities of a prompt's own tokens from position `start` on; see LLM.score.

        Other arguments and errors are those of `add_request` and its stream; missing the deadline raises RequestError.
        """
        reject(unknown, "AsyncEngine.score", AsyncEngine.score)
        how = checked(tags=tags, add_special_tokens=add_special_tokens)
        self._access.check_process()
        prepare = partial(self._llm.prompts.prepare_scored, prompt, start, top_logprobs=top_logprobs, **how)
        stream = self._queue(self._order(request_id, deadline), prompt, None, prepare)
        async for _ in stream:
            pass
        return stream.score()

    def fork(
        self,
        stream: RequestStream,
        params: SamplingParams | None = None,
        *,
        deadline: float | None = None,
        request_id: str | None = None,
    ) -> RequestStream:
        """Fork an unfinished request at its current token; see LLM.fork.

        The first delta contains what the other has generated. Raises what `add_request` raises; if the request cannot
        be forked, the stream raises.
        """
        self._access.check_process()
        if not isinstance(stream, RequestStream):
            raise TypeError(f"stream is {brief(stream)}; legal: what AsyncEngine.add_request returns")
        check_params(params)
        order = self._order(request_id, deadline)
        self.worker.fork(stream.order, order, params)
        return RequestStream(order, self._access, self._leave)

    def abort(self, request_id: str, why: str = "AsyncEngine.abort was called") -> None:
        """End a request by its id; its stream raises RequestError with the reason "abort", whose text ends in `why`.

        No effect on a finished or unknown request.
        """
        self._access.check_process()
        self.worker.abort(request_id, why)

    def abort_all(self, why: str = "AsyncEngine.abort_all was called") -> None:
        """End all requests added so far, as `abort` does."""
        self._access.check_process()
        self.worker.abort_all(why)

    async def reset_prefix_cache(self) -> None:
        """Drop all cached keys and values between two steps; see LLM.reset_prefix_cache."""
        self._access.check_process()
        await asyncio.wrap_future(self.worker.call(lambda engine: engine.reset_prefix_cache()))

    async def update_weights(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Replace weights between two steps; see LLM.update_weights."""
        self._access.check_process()
        await asyncio.wrap_future(self.worker.call(lambda engine: engine.update_weights(tensors)))

    async def drain(self) -> None:
        """Refuse new requests from now on, and wait until all others have ended. May be called twice."""
        self._access.check_process()
        await asyncio.wrap_future(self.worker.drain())

    async def shutdown(self) -> None:
        """Abort all requests, refuse new ones, and end the thread. May be called twice."""
        self._access.check_process()
        self.worker.end("the engine was shut down")
        await asyncio.get_running_loop().run_in_executor(None, self.worker.thread.join)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()

    def statistics(self) -> Snapshot:
        """Returns counters and histograms so far. Thread-safe."""
        self._access.check_process()
        return self.worker.snapshot()

    def health(self) -> Health:
        """Returns whether the thread lives, the age of its step, and the failed steps in a row. Thread-safe.

        After a permanent fault (`error`), all requests have ended with the cause and new ones are refused: a device
        fault needs a new process, any other a new LLM.
        """
        self._access.check_process()
        return self.worker.health()

    def _leave(self, order: Order) -> None:
        self.worker.leave(order)

    def _order(self, request_id: str | None, deadline: float | None) -> Order:
        check_request_id(request_id, ())
        order = Order(self.worker.new_id() if request_id is None else request_id, None)
        if deadline is not None:
            deadline = plain(deadline)
            check_range("deadline", deadline, 0)
            order.deadline = order.arrival + float(min(deadline, _CENTURY))
        return order

    def _queue(
        self, order: Order, prompt: Prompt, params: SamplingParams | None, prepare: Callable[[], Prepared]
    ) -> RequestStream:
        """Prepare a prompt here if it is short, else on the tokenizer's thread, and queue it."""

        def prepare_and_check() -> Prepared:
            prepared = prepare()
            self._llm.engine.check_request(prepared.token_ids, prepared.params, prepared.scoring)
            return prepared

        if length_of(prompt) <= AT_ONCE:
            self.worker.add(order, prepare_and_check())
        else:
            self._llm.prompts.check_length(prompt, params)
            self.worker.add(order, prepare_and_check)
        return RequestStream(order, self._access, self._leave)
