"""Runs requests to their ends on the caller's thread, all in one continuous batch."""

from __future__ import annotations

from collections import OrderedDict, abc
from collections.abc import Callable
from typing import TypeVar

from fastllama.errors import RequestError
from fastllama.progress import progress_bar
from fastllama.runtime.engine import Engine
from fastllama.runtime.generation import Generation
from fastllama.runtime.prompts import Prepared

T = TypeVar("T")


def add(engine: Engine, prepared: Prepared, request_id: str | None = None) -> Generation:
    """Queue a prompt. Raises what Engine.add_request raises."""
    return engine.add_request(
        prepared.token_ids,
        prepared.params,
        prompt=prepared.text,
        request_id=request_id,
        continues_text=prepared.continues_text,
        scoring=prepared.scoring,
    )


def leave(engine: Engine | None, generation: Generation) -> None:
    """Abort a request that nobody reads any more, if it can still be."""
    if engine is not None and not generation.finished and not engine.access.forked:
        engine.abort(generation)


def run(
    engine: Engine,
    prompts: abc.Sequence[Prepared],
    output: Callable[[Generation], T],
    *,
    description: str,
    progress: bool | None,
) -> list[T]:
    """What `output` makes of each request, in the order of the prompts; where something raises, all are aborted.

    Raises RequestError where a request failed or was aborted, once all have ended: its `outputs` are those of all.
    """
    generations: list[Generation] = []
    try:
        generations.extend(add(engine, prepared) for prepared in prompts)
        _finish(engine, generations, description, progress)
    except BaseException:
        for generation in generations:
            leave(engine, generation)
        raise
    outputs = [output(generation) for generation in generations]
    for number, generation in enumerate(generations):
        if (failure := generation.failure()) is not None:
            where = f"prompt {number} of {len(prompts)}: " if len(prompts) > 1 else ""
            raise RequestError(f"{where}{failure}", outputs, reason=failure.reason) from failure.__cause__
    return outputs


def _finish(engine: Engine, generations: list[Generation], description: str, progress: bool | None) -> None:
    """Run until these requests have finished."""
    shown = False if len(generations) < 2 else progress
    pending = OrderedDict.fromkeys(generations)
    with progress_bar(description, shown, total=len(generations), unit="prompt") as bar:
        while pending:
            before = len(pending)
            for generation in engine.step():
                if generation.finished:
                    pending.pop(generation, None)
            while pending and (first := next(iter(pending))).finished:  # in a step of another thread
                del pending[first]
            bar.update(before - len(pending))
