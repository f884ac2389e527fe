"""Random requests with all options, and clients that read, close, drop, cancel, abort or fork them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastllama import LLM, AsyncEngine, SamplingParams
from fastllama.errors import QueueFullError, RequestError
from fastllama.runtime.drafting.draft_model import DraftModel
from fastllama.runtime.generation import Generation
from fastllama.runtime.serving.async_engine import AT_ONCE, RequestStream

CLIENTS = 12  # tasks that share an AsyncEngine
RAISING, BROKEN = 2000, 2001  # tokens on which the model raises, and returns NaN
TEXTS = ("Once upon a time", "The little dog", "It was a cold day, and Tom", "Lily and Ben like to play. One day")


def _unchanged(token_ids: list[int], logits: Tensor) -> Tensor:
    return logits


def _even(token_ids: list[int], logits: Tensor) -> Tensor:
    logits[1::2] = -torch.inf
    return logits


def _raising(token_ids: list[int], logits: Tensor) -> Tensor:
    raise ArithmeticError("a processor that fails")


def _not_finite(token_ids: list[int], logits: Tensor) -> Tensor:
    return torch.full_like(logits, torch.nan)


OPTIONS: tuple[dict[str, Any], ...] = (
    {"n": 2},
    {"n": 3, "max_tokens": 4},
    {"max_tokens": 1, "min_tokens": 0},
    {"min_tokens": 4, "max_tokens": 6},
    {"temperature": 0.0},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"prompt_logprobs": 2},
    {"logprobs": 3},
    {"stop": ("the", "a l", ".")},
    {"stop_token_ids": tuple(range(300, 400)), "include_stop_str_in_output": True},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"logit_bias": {300: 5.0, 301: -torch.inf, 302: 2.5}},
    {"allowed_token_ids": tuple(range(1000))},
    {"bad_words": ("the", "little girl", "happy")},
    {"logits_processors": (_unchanged,)},
    {"logits_processors": (_even, _unchanged)},
    {"ignore_eos": True},
    {"seed": 7},
)


class Faults:
    """Hooks that make a model raise on the token RAISING and return NaN for BROKEN. They prevent captured steps."""

    def __init__(self, llm: LLM) -> None:
        model, speculation = llm.engine.model, llm.engine.speculation
        drafter = speculation.drafter if speculation is not None else None
        drafts = [drafter._runner.model] if isinstance(drafter, DraftModel) else []
        self._handles = [each.register_forward_hook(self._behind) for each in (model, *drafts)]
        self._handles.append(model.register_forward_pre_hook(self._before))

    @staticmethod
    def _before(model: torch.nn.Module, given: tuple[Any, ...]) -> None:
        if bool((given[0] == RAISING).any()):
            raise ArithmeticError("a model that fails")

    @staticmethod
    def _behind(model: torch.nn.Module, given: tuple[Any, ...], logits: Tensor) -> Tensor:
        ids, batch, _ = given
        logits[:, [RAISING, BROKEN]] = -1e4  # else a request that should succeed may sample one
        return torch.where((ids[batch.logits_rows] == BROKEN)[:, None], torch.nan, logits)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


@dataclass(frozen=True)
class Asked:
    """A request. fails: whether it ends with an error if it is read to its end."""

    prompt: str | list[int]
    params: SamplingParams
    fails: bool

    @contextmanager
    def read(self) -> Iterator[None]:
        """Read to the end within this context, it must end as expected: with an error or without."""
        try:
            yield
        except RequestError:
            if not self.fails:
                raise
        else:
            assert not self.fails, f"{self} has not failed"

    def changed(self, **params: Any) -> Asked:
        """A copy with other parameters."""
        return replace(self, params=replace(self.params, **params))


def draw(rng: random.Random, *, model_fails: bool) -> Asked:
    """A random request with up to three of OPTIONS; one in ten fails. model_fails: by a token of its prompt too."""
    options: dict[str, Any] = {"max_tokens": rng.randint(1, 8)}
    for chosen in rng.sample(OPTIONS, rng.randint(0, 3)):
        options |= chosen
    options["max_tokens"] = max(options["max_tokens"], options.get("min_tokens", 0))
    ids = [rng.randrange(3, RAISING) for _ in range(rng.choice([1, 3, 15, 16, 17, 40]))]
    prompt: str | list[int] = rng.choice([ids, ids, [7] * 32 + ids, rng.choice(TEXTS)])
    if rng.random() < 0.02:
        prompt, options["truncate_prompt_tokens"] = "Tom has a red ball. " * (AT_ONCE // 20 + 1), 20
    fails = rng.random() < 0.1
    if fails and model_fails and rng.random() < 0.7:
        prompt = [*ids, rng.choice([RAISING, BROKEN])]
    elif fails:
        options["logits_processors"] = (rng.choice([_raising, _not_finite]),)
    return Asked(prompt, SamplingParams(**options), fails)


class Clients:
    """Tasks that share an AsyncEngine; each treats its requests in one of several ways."""

    def __init__(self, engine: AsyncEngine, rng: random.Random, *, model_fails: bool) -> None:
        self._engine, self._rng, self._model_fails = engine, rng, model_fails
        self._uses = (self._read, self._read, self._close, self._drop, self._cancel, self._abort, self._fork)

    async def run(self, count: int) -> None:
        """Run that many requests."""
        numbers = iter(range(count))

        async def client() -> None:
            for number in numbers:
                asked, use = draw(self._rng, model_fails=self._model_fails), self._rng.choice(self._uses)
                await use(asked)
                if number == count // 2:
                    await self._engine.reset_prefix_cache()

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        await self._engine.drain()

    async def _add(self, asked: Asked, deadline: float | None = None) -> RequestStream:
        return await self._queued(partial(self._engine.add_request, asked.prompt, asked.params, deadline=deadline))

    async def _queued(self, add: Callable[[], RequestStream]) -> RequestStream:
        """Add the request, and retry while the queue is full."""
        while True:
            try:
                return add()
            except QueueFullError:
                await asyncio.sleep(0.002)

    async def _pause(self) -> None:
        await asyncio.sleep(self._rng.random() * 0.01)

    async def _read(self, asked: Asked) -> None:
        """Read to the end; some with a deadline that every request meets, or none."""
        if self._rng.random() < 0.1:
            await self._read_whatever(await self._add(asked, deadline=self._rng.choice([0.0, 0.005])))
            return
        stream = await self._add(asked, deadline=self._rng.choice([None, 1000.0]))
        with asked.read():
            async for _ in stream:
                pass
            stream.output()

    async def _read_whatever(self, stream: RequestStream) -> None:
        with suppress(RequestError):
            async for _ in stream:
                pass

    async def _close(self, asked: Asked) -> None:
        """Close the request in the middle of its answer."""
        stream = await self._add(asked)
        with suppress(RequestError):
            await stream.__anext__()
        stream.close()

    async def _drop(self, asked: Asked) -> None:
        """Drop the last reference to the request, unread."""
        stream = await self._add(asked)
        await self._pause()
        del stream

    async def _cancel(self, asked: Asked) -> None:
        """Cancel the task that reads the stream."""
        reader = asyncio.ensure_future(self._read_whatever(await self._add(asked)))
        await self._pause()
        reader.cancel()
        await asyncio.wait([reader])

    async def _abort(self, asked: Asked) -> None:
        """Abort by request id."""
        stream = await self._add(asked)
        await self._pause()
        self._engine.abort(stream.request_id)
        await self._read_whatever(stream)

    async def _fork(self, asked: Asked) -> None:
        """Fork; the fork's stream raises if the original has ended by then, or reached its token limit."""
        asked = asked.changed(n=1)
        stream = await self._add(asked)
        await self._pause()
        fork = await self._queued(partial(self._engine.fork, stream, asked.changed(seed=8).params))
        if self._rng.random() < 0.3:
            stream.close()
        await asyncio.gather(self._read_whatever(fork), self._read_whatever(stream))


async def serve(llm: LLM, rng: random.Random, count: int, *, model_fails: bool) -> int:
    """Run that many requests through an AsyncEngine; returns the entries left in its tables at the end."""
    async with AsyncEngine(llm, max_queue_size=CLIENTS // 2) as engine:
        await Clients(engine, rng, model_fails=model_fails).run(count)
        return len(engine.worker.orders) + len(engine.worker._by_generation)


class Callers:
    """Threads that share an LLM; each treats its requests in one of several ways."""

    def __init__(self, llm: LLM, rng: random.Random, *, model_fails: bool) -> None:
        self._llm, self._rng, self._model_fails = llm, rng, model_fails
        self._uses = (self._generate, self._stream, self._close, self._drop, self._abort, self._fork)

    def run(self, count: int) -> None:
        """Run that many requests."""
        with futures.ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(self._one) for _ in range(count)]:
                done.result()
        self._llm.reset_prefix_cache()

    def _one(self) -> None:
        self._rng.choice(self._uses)(draw(self._rng, model_fails=self._model_fails))

    def _generate(self, asked: Asked) -> None:
        with asked.read():
            self._llm.generate([asked.prompt], asked.params)

    def _stream(self, asked: Asked) -> None:
        asked = asked.changed(n=1)
        with asked.read():
            "".join(self._llm.stream(asked.prompt, asked.params))

    def _read_whatever(self, generation: Generation) -> None:
        with suppress(RequestError):
            "".join(self._llm.follow(generation))

    def _close(self, asked: Asked) -> None:
        """Close the request in the middle of its answer."""
        pieces = self._llm.stream(asked.prompt, asked.changed(n=1).params)
        with suppress(RequestError):
            next(pieces, "")
        del pieces

    def _drop(self, asked: Asked) -> None:
        """Drop the last reference to the request, unread."""
        self._llm.stream(asked.prompt, asked.changed(n=1).params)

    def _abort(self, asked: Asked) -> None:
        """Abort by request id."""
        generation = self._llm.start(asked.prompt, asked.changed(n=1).params)
        self._llm.engine.step()
        self._llm.abort(generation.request.request_id)
        self._read_whatever(generation)

    def _fork(self, asked: Asked) -> None:
        """Fork, unless the original has ended or reached its token limit."""
        asked = asked.changed(n=1)
        generation = self._llm.start(asked.prompt, asked.params)
        for _ in range(3):
            self._llm.engine.step()
        with suppress(ValueError):
            self._read_whatever(self._llm.fork(generation, asked.changed(seed=8).params))
        self._read_whatever(generation)
