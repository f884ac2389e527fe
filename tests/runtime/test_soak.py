"""A long run of mixed requests over few pages: every output is the one its request gets alone, and all pages return.

300 requests by default; `pytest --soak 5000 tests/runtime/test_soak.py` takes as many as one likes.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor

from benchmarks.soak import alive
from fastllama import LLM, AsyncEngine, LlamaForCausalLM, SamplingParams
from fastllama.errors import QueueFullError, RequestError
from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.runtime.drafting.speculation import Pace
from fastllama.runtime.outputs import CompletionOutput
from fastllama.runtime.serving.async_engine import RequestStream
from tests.runtime.models import VOCAB, check_idle, ours, prompt_of
from tests.runtime.serving.test_async_engine import all_of, joined, until_it_fails
from tests.runtime.test_generation import Pieces

EOS, CURSED, POISONED = 11, 95, 96
BANNED = {CURSED: -1000.0, POISONED: -1000.0}
SIZES = {"max_model_len": 96, "page_size": 16, "max_num_seqs": 6, "max_num_batched_tokens": 24, "progress": False}
CLIENTS = 30
Fate = Literal["read", "sleep", "fork", "cancel", "close", "let go", "deadline", "cursed", "poisoned"]


class Trying(LlamaForCausalLM):
    """Raises for the cursed token, has NaN for the poisoned one, and memory for few rows now and then."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        self.calls, self.num_failures, self.share = random.Random(1), 0, 0.0

    def forward(self, ids: Tensor, batch: BatchMeta, kv: KVCache) -> Tensor:
        logits = super().forward(ids, batch, kv)
        cursed = bool((ids == CURSED).any())
        if cursed or (len(ids) > 3 and self.calls.random() < self.share):
            self.num_failures += not cursed
            for layer in kv.layers:  # a step that failed may have left anything in its slots
                layer.k_pages[batch.slots // 16, :, batch.slots % 16] = torch.nan
            raise MemoryError
        return torch.where((ids[batch.logits_rows] == POISONED)[:, None], torch.nan, logits)


class Letters(Pieces):
    """Its tokens from 4 on are the letters, round and round; a text is encoded to the first ones of each."""

    def __init__(self) -> None:
        super().__init__([bytes([97 + number % 26]) for number in range(VOCAB - 4)])

    def _encode_raw(self, text: str, *, template: bool = False) -> list[int]:
        return [4 + ord(letter) - 97 for letter in text if letter != " "]


@dataclass(frozen=True)
class Order:
    """A request and what becomes of its client."""

    prompt: list[int]
    params: SamplingParams
    fate: Fate


def warmer(token_ids: list[int], logits: Tensor) -> Tensor:
    """A logits processor that hangs on the tokens before."""
    logits[4 + len(token_ids) % 80] += 3
    return logits


def even(token_ids: list[int], logits: Tensor) -> Tensor:
    """A logits processor that bans."""
    logits[1::2] = -torch.inf
    return logits


def orders(count: int) -> list[Order]:
    rng = random.Random(3)
    stories = [[token % 95 for token in prompt_of(60, seed=seed)] for seed in range(3)]
    found = []
    for _ in range(count):
        prompt = [*rng.choice(stories)[: rng.choice([1, 3, 10, 20, 35, 60])], rng.randrange(3, 95)]
        fate: Fate = rng.choice(
            ["read"] * 8 + ["fork", "sleep", "cancel", "close", "let go", "deadline", "cursed", "poisoned"]
        )
        if fate in ("cursed", "poisoned"):
            prompt[-1] = CURSED if fate == "cursed" else POISONED
        max_tokens = 32 if fate == "fork" else rng.randint(1, 20)
        params = SamplingParams(
            n=1 if fate == "fork" else rng.choice([1, 1, 1, 2, 3]),
            max_tokens=max_tokens,
            min_tokens=max_tokens if fate == "fork" else rng.choice([0, 0, max_tokens // 2, max_tokens]),
            temperature=rng.choice([0.0, 2.0, 4.0]),
            top_k=rng.choice([0, 8]),
            top_p=rng.choice([1.0, 0.8]),
            repetition_penalty=rng.choice([1.0, 1.3]),
            presence_penalty=rng.choice([0.0, 0.0, 0.5]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.3, -0.3]),
            logit_bias=BANNED,
            allowed_token_ids=rng.choice([None, None, range(3, 60)]),
            bad_words=rng.choice([(), (), ("ab", "k")]),
            logits_processors=rng.choice([(), (), (), (warmer,), (even, warmer)]),
            logprobs=rng.choice([None, None, 2]),
            prompt_logprobs=rng.choice([None, None, None, 1]),
            seed=rng.randrange(2**63),
            stop=rng.choice([(), ("ab", "q"), ("xyz", "k")]),
            stop_token_ids=rng.choice([(), (20, 21)]),
            ignore_eos=rng.random() < 0.5,
        )
        found.append(Order(prompt, params, fate))
    return found


def llm_of(
    model: LlamaForCausalLM, num_pages: int, num_host_pages: int = 0, draft: LlamaForCausalLM | None = None
) -> LLM:
    pages = {"kv_cache_tokens": 16 * num_pages, "host_cache_tokens": 16 * num_host_pages}
    return LLM(model, tokenizer=Letters(), deterministic=True, speculation=draft, **pages, **SIZES)


async def add(engine: AsyncEngine, order: Order) -> RequestStream:
    """Queue it, again and again while the queue is full."""
    while True:
        try:
            return engine.add_request(order.prompt, order.params, deadline=0.0 if order.fate == "deadline" else 1000)
        except QueueFullError:
            await asyncio.sleep(0.005)


async def forked(
    engine: AsyncEngine, stream: RequestStream, forks: Counter[str]
) -> tuple[dict[int, CompletionOutput], dict[int, CompletionOutput] | None]:
    """The answers of a request and its fork; None where the request had ended before."""
    first = await anext(stream)
    while True:
        try:
            other = engine.fork(stream)
            break
        except QueueFullError:
            await asyncio.sleep(0.005)
    forks["asked"] += 1
    whole = joined([first, *await all_of(stream)])
    try:
        return whole, joined(await all_of(other))
    except RequestError as refused:
        if "has ended" not in str(refused):
            raise
        forks["refused"] += 1
        return whole, None


async def live(engine: AsyncEngine, order: Order, forks: Counter[str]) -> dict[int, CompletionOutput] | None:
    """The answer of a client with this fate; None where it left."""
    stream = await add(engine, order)
    if order.fate == "cancel":
        reader = asyncio.ensure_future(all_of(stream))
        await asyncio.sleep(0.01)
        reader.cancel()
        await asyncio.wait([reader])
        return None
    if order.fate in ("close", "let go"):
        await stream.__anext__()
        if order.fate == "close":
            stream.close()
        return None
    if order.fate == "fork":
        whole, other = await forked(engine, stream, forks)
        assert other in (None, whole), "of the same seed"
        return whole
    if order.fate == "sleep":
        await asyncio.sleep(0.3)
    if order.fate == "cursed":
        await until_it_fails(stream, "MemoryError")
        return None
    if order.fate == "poisoned":
        return joined(await until_it_fails(stream, "not finite numbers"))
    return joined(await all_of(stream))


async def soak(llm: LLM, wanted: list[Order]) -> list[dict[int, CompletionOutput] | None]:
    found: list[dict[int, CompletionOutput] | None] = [None] * len(wanted)
    numbers, forks = iter(range(len(wanted))), Counter[str]()

    async def client(engine: AsyncEngine) -> None:
        for number in numbers:
            found[number] = await live(engine, wanted[number], forks)

    async with AsyncEngine(llm, max_queue_size=CLIENTS // 2) as engine:
        await asyncio.gather(*(client(engine) for _ in range(CLIENTS)))
        await engine.drain()
        counted = engine.statistics()
    fates = Counter(order.fate for order in wanted)
    assert counted.num_accepted == len(wanted) + forks["asked"] == counted.request_seconds.count
    assert counted.num_failed == fates["cursed"] + forks["refused"]
    assert forks["asked"] == fates["fork"] > forks["refused"], "every request ended before its fork"
    assert (counted.num_queued, counted.num_running) == (0, 0)
    assert min(counted.num_preemptions, counted.num_cached_tokens, counted.num_rejected) > 20, "too few events"
    if llm.engine.speculation is not None:
        assert counted.num_accepted_tokens > 200, "hardly a draft was accepted"
    assert counted.num_host_hit_tokens > 20
    assert asyncio.all_tasks() == {asyncio.current_task()}
    return found


@pytest.mark.parametrize("drafts", [False, True], ids=["no drafts", "drafts"])
def test_every_survivor_gets_what_it_gets_alone(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, drafts: bool
) -> None:
    """With drafts of a model of the same weights, accepted except at a request's last token, and without."""
    monkeypatch.setattr(Pace, "pays", lambda *args: True)
    wanted = orders(request.config.getoption("--soak"))
    model = ours(eos=(EOS,), kind=Trying, dtype=torch.float32)
    assert isinstance(model, Trying)
    draft = ours(dtype=torch.float32) if drafts else None
    before = alive()
    with llm_of(model, 8, num_host_pages=12, draft=draft) as llm:
        model.share = 0.05
        found = asyncio.run(soak(llm, wanted))
        model.share = 0.0
        check_idle(llm.engine)
        assert model.num_failures > 20
    with llm_of(model, 24) as llm:
        for order, samples in zip(wanted, found, strict=True):
            if order.fate in ("read", "sleep", "fork"):
                (alone,) = llm.generate(order.prompt, order.params)
                assert samples == {sample.index: sample for sample in alone.outputs}
            elif order.fate == "poisoned":
                assert samples is not None
                assert {sample.finish_reason for sample in samples.values()} == {"error"}
            elif order.fate == "deadline":
                assert samples is not None
                assert [sample.finish_reason for sample in samples.values()] == ["deadline"]
    assert alive() == before
