"""The asyncio face: requests from any number of tasks, answered by one thread that owns the engine."""

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

AT_ONCE = 8192  # characters or ids of a prompt that are tokenized and checked at once: 2 to 4 ms of the event loop
_CENTURY = 3.2e9  # seconds: a deadline beyond it is as good as none


class AsyncEngine:
    """Serves an LLM to asyncio: any task of any loop adds requests, one thread of its own runs them all together.

    llm: nobody else uses it until the engine is shut down, or nobody holds the engine or a stream of it any more; it
    stays open. Closing it shuts the engine down.
    max_queue_size: requests that may wait until they begin; those that come beside them are rejected.

    A request that raises ends by itself: the others go on, and its pages come back. Nobody who does not read slows
    the others down: deltas that nobody has read are one. `async with` shuts down at its end.
    Raises RuntimeError where another AsyncEngine has the LLM; in a forked process, each method does.
    """

    def __init__(self, llm: LLM, *, max_queue_size: int = 1024) -> None:
        check_range("max_queue_size", max_queue_size, 1)
        self._llm, self._access = llm, llm.engine.access
        self.worker = Worker(llm.engine, max_queue_size)
        weakref.finalize(self, self.worker.end, "nobody holds the engine").atexit = False

    @property
    def max_queue_size(self) -> int:
        """Requests that may wait until they begin."""
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

        deadline: seconds from now, after which what has not finished does with "deadline", between two steps; while the
        prompt is still tokenized, its stream raises RequestError with that reason.
        request_id: names it for `abort`; None makes one. tags, add_special_tokens, continues_text: as in LLM.chat,
        LLM.generate and LLM.start.
        Raises at once, and queues nothing: QueueFullError if max_queue_size requests wait, ValueError or TypeError for
        what can never run, RuntimeError when the engine drains or was shut down. A prompt of more than 8192 characters
        is tokenized elsewhere: what is wrong with it the stream raises, as RequestError.
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
        """Raise QueueFullError, counted among the rejected, where `add_request` would: before a prompt is prepared."""
        self._access.check_process()
        self.worker.check_room()

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> RequestOutput:
        """The whole answer to a prompt; arguments and errors are those of `add_request` and its stream."""
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
        """Log-probabilities of a prompt's own tokens from position `start` on; see LLM.score.

        The other arguments and the errors are those of `add_request` and its stream; what is not scored by its deadline
        raises RequestError.
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
        """A second request that goes on from where an unfinished one stands; see LLM.fork.

        Its first delta holds what the other has generated. Raises what `add_request` does; what cannot be forked then,
        its stream raises.
        """
        self._access.check_process()
        if not isinstance(stream, RequestStream):
            raise TypeError(f"stream is {brief(stream)}; legal: what AsyncEngine.add_request returns")
        check_params(params)
        order = self._order(request_id, deadline)
        self.worker.fork(stream.order, order, params)
        return RequestStream(order, self._access, self._leave)

    def abort(self, request_id: str, why: str = "AsyncEngine.abort was called") -> None:
        """End a request by its id: its stream raises RequestError with the reason "abort", whose text ends in `why`.

        Without effect on a request that ended or never was.
        """
        self._access.check_process()
        self.worker.abort(request_id, why)

    def abort_all(self, why: str = "AsyncEngine.abort_all was called") -> None:
        """End all requests that were added before, as `abort` does one."""
        self._access.check_process()
        self.worker.abort_all(why)

    async def reset_prefix_cache(self) -> None:
        """Forget all keys and values, between two steps; see LLM.reset_prefix_cache."""
        self._access.check_process()
        await asyncio.wrap_future(self.worker.call(lambda engine: engine.reset_prefix_cache()))

    async def update_weights(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Replace weights, between two steps; see LLM.update_weights."""
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
        """Counters and histograms up to now. Any thread may ask."""
        self._access.check_process()
        return self.worker.snapshot()

    def health(self) -> Health:
        """Whether the thread lives, how long its step runs, how many failed in a row. Any thread may ask.

        An engine that is beyond repair (`error`) has ended all requests with the cause, and refuses new ones: a device
        that fails for good needs another process, anything else another LLM.
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
