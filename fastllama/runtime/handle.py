"""Runs a batch of requests on an LLM's engine until all have finished."""

from __future__ import annotations

from collections import OrderedDict, abc
from collections.abc import Callable
from typing import TypeVar

from fastllama.errors import RequestError
from fastllama.progress import progress_bar
from fastllama.runtime.calls import naming_prompt
from fastllama.runtime.engine import Engine
from fastllama.runtime.generation import Generation
from fastllama.runtime.prompts import Prepared

T = TypeVar("T")


class EngineHandle:
    """Runs requests on the caller's thread. After close(), it keeps no reference to the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine

    @property
    def engine(self) -> Engine:
        """The engine. Raises RuntimeError after close()."""
        if self._engine is None:
            raise RuntimeError("this LLM is closed; make a new one")
        return self._engine

    def close(self) -> None:
        """Drop the reference to the engine. May be called twice."""
        if self._engine is not None:
            self._engine.access.evict()
            self._engine = None

    def leave(self, generation: Generation) -> None:
        """Abort an unfinished request whose output is no longer read."""
        engine = self._engine
        if engine is not None and not generation.finished and not engine.access.forked:
            engine.abort(generation)

    def run(
        self,
        prompts: abc.Sequence[Prepared],
        output: Callable[[Generation], T],
        *,
        description: str,
        progress: bool | None,
    ) -> list[T]:
        """Run the prompts and return `output(generation)` of each, in order. If anything raises, all are aborted.

        description, progress: of the progress bar. Raises RequestError after all have ended if a request failed or was
        aborted; its `outputs` contains the output of every request.
        """
        generations: list[Generation] = []
        try:
            for number, prepared in enumerate(prompts):
                with naming_prompt(number, len(prompts)):
                    generations.append(self.engine.add(prepared))
            self._finish(generations, description, progress)
        except BaseException:
            for generation in generations:
                self.leave(generation)
            raise
        outputs = [output(generation) for generation in generations]
        for number, generation in enumerate(generations):
            if (failure := generation.failure()) is not None:
                where = f"prompt {number} of {len(prompts)}: " if len(prompts) > 1 else ""
                raise RequestError(f"{where}{failure}", outputs, reason=failure.reason) from failure.__cause__
        return outputs

    def _finish(self, generations: list[Generation], description: str, progress: bool | None) -> None:
        """Step the engine until these requests have finished."""
        shown = False if len(generations) < 2 else progress
        pending = OrderedDict.fromkeys(generations)
        with progress_bar(description, shown, total=len(generations), unit="prompt") as bar:
            while pending:
                before = len(pending)
                for generation in self.engine.step():
                    if generation.finished:
                        pending.pop(generation, None)
                while pending and (first := next(iter(pending))).finished:  # in another thread's step
                    del pending[first]
                bar.update(before - len(pending))
