"""Capture and replay of decode steps: as a CUDA graph on a GPU, as a recording of ops on a CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import UntypedStorage

from fastllama.arithmetic import ceil_div, power_of_2
from fastllama.kernels.dispatch.recording import record

logger = logging.getLogger("fastllama")
T = TypeVar("T")


class Capture(Protocol):
    """Captures steps on a kind of device. limit: most graphs kept; the least recently used is dropped."""

    limit: int

    def shape(self, num_seqs: int, num_pages: int) -> tuple[int, int]:
        """Returns the rows and the pages per row of the graph for num_seqs sequences of at most num_pages pages."""

    def capture(self, run: Callable[[], T]) -> tuple[T, Callable[[], T] | None]:
        """Returns the result of `run`, and a function that replays it and returns it again; None if it cannot.

        Raises what `run` raises. A failed capture is logged.
        """


class RecordingCapture:
    """Capture on a CPU: rows are exact, pages rounded up to a power of two."""

    limit = 64  # of some hundred small Python objects each; all share the largest one's tensors

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: list[UntypedStorage] = []

    def shape(self, num_seqs: int, num_pages: int) -> tuple[int, int]:
        return num_seqs, power_of_2(num_pages)

    def capture(self, run: Callable[[], T]) -> tuple[T, Callable[[], T] | None]:
        result, recording = record(run, self._device, self._memory)
        return result, recording.replay if recording.replayable else None


class GraphCapture:
    """Capture on a GPU: rows rounded up to a bucket, with the most pages that a sequence may have.

    Graphs share a memory pool for intermediates, in which a smaller graph reuses a larger one's memory, but not vice
    versa. So warm-up captures the largest first.
    """

    limit = 1024  # all that there are: 10 for 256 sequences, 20 with drafts, 70 for 4096

    def __init__(self, device: torch.device, max_pages: int) -> None:
        self._device, self._max_pages = device, max_pages
        self._pool: Any = None

    def shape(self, num_seqs: int, num_pages: int) -> tuple[int, int]:
        return bucket(num_seqs), self._max_pages

    def capture(self, run: Callable[[], T]) -> tuple[T, Callable[[], T] | None]:
        with torch.cuda.device(self._device):
            result = run()  # the step itself; this also compiles, which must not happen during capture
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph, begun = torch.cuda.CUDAGraph(), False
            try:
                # Only errors of this thread invalidate the capture; other threads may use the GPU. The stream context
                # restores the current stream if the end of an invalid capture raises, which torch does not.
                with (
                    torch.cuda.stream(torch.cuda.current_stream()),
                    torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
                ):
                    begun = True
                    kept = run()
            except BaseException as error:
                _abandon(graph, self._pool, begun)
                if not isinstance(error, Exception):
                    raise
                logger.warning(
                    "decode steps run eagerly from now on, which is slower, because one could not be "
                    "captured as a CUDA graph: %r",
                    _cause(error),
                    exc_info=error,
                )
                return result, None

        def replay() -> T:
            with torch.cuda.device(self._device):
                graph.replay()
            return kept  # keeps its memory, which the graph writes to, allocated

        return result, replay


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any, begun: bool) -> None:
    """Release what torch keeps of a capture whose end has raised (CUDAGraph::capture_end of torch 2.11 and 2.13).

    The graph would keep the pool and all its memory allocated. Torch 2.11 would also serve later allocations from the
    pool, and break the device's random generator.
    """
    try:
        graph.pool()
    except RuntimeError:  # it has not ended
        device = torch.cuda.current_device()
        numbers = torch.cuda.default_generators[device]
        numbers.graphsafe_set_state(numbers.clone_state())
        try:
            torch._C._cuda_endAllocateToPool(device, pool)
        except RuntimeError:  # it has not begun, or torch has done this
            if not begun:
                return
        torch._C._cuda_releasePool(device, pool)


def _cause(error: BaseException) -> BaseException:
    """Returns the first exception of a chain: the end of a failed capture raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def bucket(num_seqs: int) -> int:
    """Rounds up to a power of two up to 64, to a multiple of 64 above: the matmul kernels' row tiles in any case."""
    return power_of_2(num_seqs) if num_seqs <= 64 else ceil_div(num_seqs, 64) * 64


def buckets(most: int) -> Iterator[int]:
    """Every `bucket` of 1 to `most` sequences, ascending."""
    rows = 1
    while rows < bucket(most):
        yield rows
        rows = bucket(rows + 1)
    yield rows
