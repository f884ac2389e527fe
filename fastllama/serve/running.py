"""A job's requests on the engine, started all or none, and their merged deltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING

from fastllama.runtime.outputs import FinishReason, RequestDelta, RequestMetrics
from fastllama.serve.errors import ApiError, invalid
from fastllama.serve.jobs import Job

if TYPE_CHECKING:
    from fastllama.runtime.generation import Generation
    from fastllama.runtime.serving.async_engine import AsyncEngine
    from fastllama.runtime.serving.stream import RequestStream


class RunningJob:
    """The requests of one job on the engine."""

    def __init__(self, streams: Sequence[RequestStream]) -> None:
        self._streams = streams
        self._failure: ApiError | None = None

    @classmethod
    def begin(cls, engine: AsyncEngine, job: Job, seconds: float) -> RunningJob:
        """Queue every prompt with this many seconds to wait and run. Thread-safe.

        Raises ApiError for more prompts than the queue can hold, and what add_request raises; then nothing stays
        queued.
        """
        if len(job.prompts) > engine.max_queue_size:
            most = f"legal: at most {engine.max_queue_size}, this server's --max-queue-size"
            raise invalid(f"prompt has {len(job.prompts)} prompts; {most}", "prompt")
        streams: list[RequestStream] = []
        try:
            for prompt in job.prompts:
                ids, goes_on = prompt.token_ids, job.continues_text
                streams.append(engine.add_request(ids, job.params, deadline=seconds, continues_text=goes_on))
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return cls(streams)

    def deltas(self) -> AsyncGenerator[tuple[int, RequestDelta], None]:
        """Yields (prompt index, delta) as they arrive.

        Raises what a prompt's stream raises, and the error passed to `cut`.
        """
        return self._of_one(self._streams[0]) if len(self._streams) == 1 else self._merged()

    def cut(self, failure: ApiError) -> None:
        """End an unfinished job with this error, without waiting for the engine, whose step may hang."""
        generations = self._generations()
        if len(generations) < len(self._streams) or not all(each.finished for each in generations):
            self._failure = failure
            self.close()

    def close(self) -> None:
        """Abort the unfinished requests. May be called twice."""
        for stream in self._streams:
            stream.close()

    def metrics(self) -> list[RequestMetrics]:
        """Returns the metrics so far of each prompt that the engine has."""
        return [generation.metrics() for generation in self._generations()]

    def finish_reasons(self) -> set[FinishReason]:
        """Returns the finish reasons of the samples that have ended."""
        sequences = [seq for each in self._generations() for seq in each.request.sequences]
        return {seq.finish_reason for seq in sequences if seq.finish_reason is not None}

    @property
    def num_generated_tokens(self) -> int:
        """Tokens generated so far, read or not."""
        return sum(each.num_generated_tokens for each in self.metrics())

    def _generations(self) -> list[Generation]:
        return [each.order.generation for each in self._streams if each.order.generation is not None]

    async def _of_one(self, stream: RequestStream) -> AsyncGenerator[tuple[int, RequestDelta], None]:
        async for delta in stream:
            yield 0, delta
        self._check()

    async def _merged(self) -> AsyncGenerator[tuple[int, RequestDelta], None]:
        """Merge the streams; unread deltas accumulate in each stream."""
        queue: asyncio.Queue[tuple[int, RequestDelta] | Exception | None] = asyncio.Queue(1)

        async def pump(index: int, stream: RequestStream) -> None:
            try:
                async for delta in stream:
                    await queue.put((index, delta))
            except Exception as error:
                await queue.put(error)
            else:
                await queue.put(None)

        tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(self._streams)]
        try:
            num_open = len(tasks)
            while num_open:
                got = await queue.get()
                if got is None:
                    num_open -= 1
                elif isinstance(got, Exception):
                    raise got
                else:
                    yield got
        finally:
            for task in tasks:
                task.cancel()
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
