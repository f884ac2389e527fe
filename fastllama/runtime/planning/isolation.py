"""Isolates the requests for which a step fails, so that the others continue."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from fastllama.runtime.planning.sequence import Request
from fastllama.runtime.planning.step import Chunk, Step

T = TypeVar("T")


def run_parts(step: Step, run: Callable[[Step], T]) -> tuple[list[T], dict[Request, Exception]]:
    """Runs a step, split where it raises; returns the results, and the requests that fail alone, with the exception.

    A step that raises is rerun in halves, down to single tokens of single sequences. This finds a fault tied to one
    request, fails no request that has passed, and retries in smaller pieces what ran out of memory. A step of B
    sequences with T tokens takes at most 2 B + 2 log2(T) runs. Only Exception is caught.
    """
    results: list[T] = []
    failures: dict[Request, Exception] = {}
    pending = [step]
    while pending:
        part = pending.pop()
        chunks = tuple(chunk for chunk in part.chunks if chunk.seq.request not in failures)
        if not chunks:
            continue
        if len(chunks) < len(part.chunks):
            part = _part(part, chunks)
        try:
            results.append(run(part))
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # their frames hold the failed run's tensors
            cause = error
        else:
            continue
        halves: tuple[tuple[Chunk, ...], ...]
        if len(chunks) > 1:
            half = len(chunks) // 2
            halves = chunks[:half], chunks[half:]
        elif chunks[0].drafts:
            halves = ((replace(chunks[0], length=1, drafts=()),),)
        elif chunks[0].length > 1:
            halves = _cut(chunks[0])
        else:
            failures[chunks[0].seq.request] = cause
            continue
        pending.extend(_part(part, half) for half in reversed(halves))
    return results, failures


def _part(step: Step, chunks: tuple[Chunk, ...]) -> Step:
    """Returns a step of these chunks, with the page copies that they need.

    A rerun copy may read a page that was written meanwhile, but only at positions that the destination's owner
    overwrites.
    """
    page_ids = {page_id for chunk in chunks for page_id in chunk.seq.page_ids}
    copies = tuple(copy for copy in step.copies if copy[1] in page_ids)
    return Step(chunks, sum(chunk.length == 1 or bool(chunk.drafts) for chunk in chunks), copies)


def _cut(chunk: Chunk) -> tuple[tuple[Chunk, ...], tuple[Chunk, ...]]:
    """Splits a chunk in two; the first part has no samples and must run before the second."""
    half = chunk.length // 2
    first = Chunk(chunk.seq, chunk.start, half, ())
    return (first,), (Chunk(chunk.seq, chunk.start + half, chunk.length - half, chunk.samples),)
