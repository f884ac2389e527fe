"""How a decode step is captured and run again: as a CUDA graph on a GPU, as a record of its ops on a CPU."""

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
    """How steps are captured on a kind of device. limit: graphs that are kept, of the shapes that were run last."""

    limit: int

    def shape(self, num_seqs: int, num_pages: int) -> tuple[int, int]:
        """Rows, and pages of each, of the graph for so many sequences, whose longest has so many pages."""

    def capture(self, run: Callable[[], T]) -> tuple[T, Callable[[], T] | None]:
        """What `run` returns, computed now, and what computes and returns it again; None where nothing can.

        Raises what `run` raises when it computes. That it cannot be captured is logged.
        """


class RecordingCapture:
    """On a CPU: rows as they are, and the power of two of pages."""

    limit = 64  # of some hundred small Python objects each; all share the memory of the largest one's tensors

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: list[UntypedStorage] = []

    def shape(self, num_seqs: int, num_pages: int) -> tuple[int, int]:
        return num_seqs, power_of_2(num_pages)

    def capture(self, run: Callable[[], T]) -> tuple[T, Callable[[], T] | None]:
        result, recording = record(run, self._device, self._memory)
        return result, recording.replay if recording.replayable else None


class GraphCapture:
    """On a GPU: rows of a bucket, all pages that a sequence may have.

    Graphs share the memory of what is between inputs and logits: a pool, in which a smaller graph fits where a larger
    one has been, and not the other way round. So warm-up captures the largest first.
    """

    limit = 1024  # all that there are: 10 for 256 sequences, 20 with guesses, 70 for 4096

    def __init__(self, device: torch.device, max_pages: int) -> None:
        self._device, self._max_pages = device, max_pages
        self._pool: Any = None

    def shape(self, num_seqs: int, num_pages: int) -> tuple[int, int]:
        return bucket(num_seqs), self._max_pages

    def capture(self, run: Callable[[], T]) -> tuple[T, Callable[[], T] | None]:
        with torch.cuda.device(self._device):
            result = run()  # the step itself; besides, what compiles at a first call must not do so while capturing
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph, begun = torch.cuda.CUDAGraph(), False
            try:
                # Errors of this thread alone: whatever else the process does on the GPU meanwhile is allowed. The
                # stream in front is put back where the end of an invalid capture raises, which torch leaves undone.
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
                    "decode steps run as they are written from now on, which takes longer, for one could not be "
                    "captured as a CUDA graph: %r",
                    _cause(error),
                    exc_info=error,
                )
                return result, None

        def replay() -> T:
            with torch.cuda.device(self._device):
                graph.replay()
            return kept  # so that its memory, which the graph writes to, is given to nobody else

        return result, replay


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any, begun: bool) -> None:
    """Take back what torch leaves of a capture whose end has raised (CUDAGraph::capture_end of torch 2.11 and 2.13).

    The graph would hold the pool, and with it all memory in there, for ever. Torch 2.11 would also give from the pool
    whatever is allocated later, and draw no random numbers on the device any more.
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
    """What was raised first: the end of a capture raises anew for what went wrong inside."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def bucket(num_seqs: int) -> int:
    """The power of two up to 64, beyond that the multiple of 64: products' kernels take so many rows in any case."""
    return power_of_2(num_seqs) if num_seqs <= 64 else ceil_div(num_seqs, 64) * 64


def buckets(most: int) -> Iterator[int]:
    """Every `bucket` of 1 to `most` sequences, ascending."""
    rows = 1
    while rows < bucket(most):
        yield rows
        rows = bucket(rows + 1)
    yield rows
