"""Keys and values moved to the host come back unchanged, spare work, and are never used where a copy failed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fastllama import LLM, SamplingParams
from fastllama.errors import RequestError
from fastllama.layers.batch import KVCache
from fastllama.runtime.device import memory
from fastllama.runtime.device.host_cache import HostCache
from fastllama.runtime.device.runner import Runner, StepLogits
from fastllama.runtime.planning.block_pool import Transfer
from fastllama.runtime.planning.scheduler import Scheduler
from fastllama.runtime.planning.step import Step
from tests.runtime.models import ours, prompt_of, running
from tests.runtime.planning.test_isolation import cursed
from tests.runtime.test_engine import HOT, alone, finish, tokens_of

PROMPTS = [prompt_of(length, seed=3) for length in (15, 31, 14, 30, 47, 13, 46)]
FEW: dict[str, Any] = {"kv_cache_tokens": 112, "max_model_len": 112}
LONG = SamplingParams(temperature=3.0, seed=3, max_tokens=30)
CONFIG = ours(dtype=torch.float32).config


def bits(kv: KVCache, page_id: int) -> list[bytes]:
    """The contents of a page, in all layers."""
    return [tensor[page_id].view(torch.uint8).numpy().tobytes() for layer in kv.layers for tensor in layer.tensors()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_pages_travel_in_order_and_whole(dtype: torch.dtype) -> None:
    kv = KVCache.allocate(CONFIG, 4, 16, dtype, "cpu")
    for layer in kv.layers:
        for tensor in layer.tensors():
            tensor.view(torch.uint8).random_(0, 256)
    before = [bits(kv, page_id) for page_id in range(4)]
    host = HostCache(kv, CONFIG, 20)
    # Two pages of the host. The second stands for a page that is given up at once; the first is used twice.
    host.transfer([Transfer(0, 5), Transfer(1, 5), Transfer(2, 4), Transfer(4, 0), Transfer(3, 4), Transfer(5, 2)])
    host.transfer([Transfer(4, 1)])
    assert [bits(kv, page_id) for page_id in range(4)] == [before[place] for place in (2, 3, 1, 3)]
    assert len({tuple(page) for page in before}) == 4


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Returns a function: the number of tokens that models computed since its last call."""
    counts, run = [], Runner.run

    def counting(self: Runner, step: Step, *before: Any) -> StepLogits:
        counts.append(sum(chunk.length for chunk in step.chunks))
        return run(self, step, *before)

    def count() -> int:
        total = sum(counts)
        counts.clear()
        return total

    monkeypatch.setattr(Runner, "run", counting)
    return count


@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_preempted_requests_come_back_with_less_work(kind: str, computed: Callable[[], int]) -> None:
    def work(**options: Any) -> tuple[list[Any], int]:
        with running(ours(), kv_cache_dtype=kind, **FEW, **options) as llm:
            computed()
            found = [tokens_of(output) for output in llm.generate(PROMPTS, LONG)]
            assert llm.engine.scheduler.num_preemptions > 2
            return found, computed()

    expected, recomputed = work()
    found, brought = work(host_cache_tokens=400)
    assert found == expected
    wanted = sum(map(len, PROMPTS)) + len(PROMPTS) * (LONG.max_tokens - 1)
    assert wanted <= brought < recomputed
    assert brought - wanted < (recomputed - wanted) / 2, "only pages that were not full are computed again"


def ask_between(llm: LLM, prompt: Sequence[int]) -> tuple[list[Any], int]:
    """The answer to the next turn of a conversation, after others have filled the cache, and its cached tokens."""
    (first,) = llm.generate(list(prompt), HOT)
    for other in PROMPTS:
        llm.generate(other, LONG)
    turn = [*prompt, *first.outputs[0].token_ids, 9, 8, 7]
    (answer,) = llm.generate(turn, HOT)
    assert tokens_of(answer) == alone(turn)
    return tokens_of(answer), answer.metrics.num_cached_tokens


def test_the_next_turn_of_an_old_conversation_finds_the_last() -> None:
    prompt = prompt_of(40, seed=7)
    with running(ours(), **FEW) as llm:
        answer, cached = ask_between(llm, prompt)
        assert cached == 0
    with running(ours(), **FEW, host_cache_tokens=400) as llm:
        assert ask_between(llm, prompt) == (answer, 48)
        assert llm.engine.pool.num_host_hit_tokens == 48
        assert llm.engine.pool.num_evictions == 0


def test_what_comes_back_is_what_the_host_holds() -> None:
    """NaN there is NaN in the answer."""
    prompt = prompt_of(40, seed=7)
    with running(ours(), **FEW, host_cache_tokens=400) as llm:
        llm.generate(prompt, HOT)
        for other in PROMPTS:
            llm.generate(other, LONG)
        host = llm.engine._runner.host
        assert host is not None
        for _, pages in host._pairs:
            pages.fill_(torch.nan)
        with pytest.raises(RequestError, match="not finite numbers"):
            llm.generate(prompt, HOT)


class Failure:
    """Makes `HostCache.transfer` raise at some of its calls, which leaves the destinations undefined."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException, calls: Sequence[int]) -> None:
        self.num_calls, transfer = 0, HostCache.transfer

        def failing(host: HostCache, transfers: Sequence[Transfer]) -> None:
            transfer(host, transfers)
            self.num_calls += 1
            if self.num_calls in calls:
                first = host._num_device_pages
                for _, destination in transfers:
                    for device, pages in host._pairs:
                        (device[destination] if destination < first else pages[destination - first]).fill_(torch.nan)
                raise error

        monkeypatch.setattr(HostCache, "transfer", failing)


@pytest.mark.parametrize("call", range(1, 13, 3))
def test_requests_outlive_a_host_cache_that_fails(
    call: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failure = Failure(monkeypatch, RuntimeError("no such memory"), range(call, 1000))
    with running(ours(), **FEW, host_cache_tokens=400) as llm:
        generations = [llm.engine.add_request(prompt, LONG) for prompt in PROMPTS]
        finish(llm.engine, *generations)
        assert [tokens_of(each.output()) for each in generations] == [alone(prompt, LONG) for prompt in PROMPTS]
        assert failure.num_calls == call
        assert llm.engine._runner.host is None
        assert llm.engine.pool.num_host_pages == 0
    assert [record.getMessage() for record in caplog.records] == [
        "the host cache is disabled, because a copy failed: RuntimeError('no such memory')"
    ]


def test_an_interrupted_transfer_is_forgotten_and_the_next_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = range(1, 30, 3)
    failure = Failure(monkeypatch, KeyboardInterrupt(), calls)
    caught = 0
    with running(ours(), **FEW, host_cache_tokens=400) as llm:
        generations = [llm.engine.add_request(prompt, LONG) for prompt in PROMPTS]
        while not all(generation.finished for generation in generations):
            try:
                llm.engine.step()
            except KeyboardInterrupt:
                caught += 1
                llm.engine.pool.check_invariants()
        assert [tokens_of(each.output()) for each in generations] == [alone(prompt, LONG) for prompt in PROMPTS]
        assert caught == sum(call <= failure.num_calls for call in calls) > 2
        assert llm.engine.pool.num_host_hit_tokens > 0


def test_a_step_in_parts_moves_its_pages_once(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    noted: list[int] = []
    transfer, schedule = HostCache.transfer, Scheduler.schedule

    def moving(host: HostCache, transfers: Sequence[Transfer]) -> None:
        moved.extend(map(id, transfers))
        transfer(host, transfers)

    def noting(scheduler: Scheduler) -> Step | None:
        step = schedule(scheduler)
        kept.append(step)
        noted.extend(map(id, step.transfers if step is not None else ()))
        return step

    kept: list[Step | None] = []  # so that no id is given out again
    monkeypatch.setattr(HostCache, "transfer", moving)
    monkeypatch.setattr(Scheduler, "schedule", noting)
    model = cursed(token=-1)
    with running(model, **FEW, host_cache_tokens=400) as llm:
        model.most = 2
        generations = [llm.engine.add_request(prompt, LONG) for prompt in PROMPTS]
        finish(llm.engine, *generations)
        assert [tokens_of(each.output()) for each in generations] == [alone(prompt, LONG) for prompt in PROMPTS]
        assert llm.engine.pool.num_host_hit_tokens > 0
    assert model.num_failures > 10
    assert moved == noted


def test_an_engine_that_starts_anew_trusts_neither_tier() -> None:
    with running(ours(), **FEW, host_cache_tokens=400) as llm:
        for prompt in PROMPTS:
            llm.generate(prompt, LONG)
        before = llm.engine.pool
        llm.engine._consistency.torn = True
        assert [tokens_of(output) for output in llm.generate(PROMPTS, HOT)] == [alone(prompt) for prompt in PROMPTS]
        assert llm.engine.pool is not before
        assert llm.engine.pool.num_host_pages == before.num_host_pages == 25


def test_its_size_is_logged_and_must_fit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def made(**options: Any) -> list[str]:
        with caplog.at_level(logging.INFO, "fastllama"), running(ours(), **options):
            return [record.getMessage() for record in caplog.records if "host cache" in record.getMessage()]

    assert made() == []
    assert made(host_cache_tokens=100_000) == ["host cache: 100000 tokens, 0.10 GB"], "1 KiB for each in fp64"
    refusal = r"^host_cache_tokens is 100000, which takes 0\.10 GB; legal here: what fits into "
    with monkeypatch.context() as patch:
        # On a CPU both caches are in one memory.
        patch.setattr(memory, "available_bytes", lambda device: 100_000 * 1024 + 2**20 - 1)
        with pytest.raises(ValueError, match=refusal + r"0\.10 GB$"):
            made(host_cache_tokens=100_000)

    def refusing(*given: Any, pinned: bool = False) -> KVCache:
        raise RuntimeError("out of memory that can be pinned")

    kv = KVCache.allocate(CONFIG, 4, 16, torch.float64, "cpu")
    monkeypatch.setattr(KVCache, "allocate", refusing)
    with pytest.raises(ValueError, match=refusal):
        HostCache(kv, CONFIG, 100_000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_pinned_pages_are_one_block(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch pins the next power of two, which the check and the log state."""
    empty, blocks = torch.empty, []

    def pinning(size: Any, *, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = empty(size, **options)
        if pin_memory:
            blocks.append(made)
        return made

    monkeypatch.setattr(torch, "empty", pinning)
    kv = KVCache.allocate(CONFIG, 3, 16, dtype, "cpu", pinned=True)
    (block,) = blocks
    tensors = [tensor for layer in kv.layers for tensor in layer.tensors()]
    assert all(tensor.untyped_storage().data_ptr() == block.data_ptr() for tensor in tensors)
    assert sum(tensor.nbytes for tensor in tensors) == block.nbytes == 48 * KVCache.bytes_per_token(CONFIG, dtype)
    assert all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in tensors)
    assert {tensor.shape for tensor in tensors[:2]} == {kv.layers[0].k_pages.shape}
    taken = KVCache.pinned_bytes(CONFIG, 48, dtype)
    assert taken & (taken - 1) == 0
    assert block.nbytes <= taken < 2 * block.nbytes


def test_the_check_counts_what_a_pinned_block_takes() -> None:
    cpu, cuda = (memory.host_bytes(CONFIG, 33, 16, torch.float32, torch.device(kind)) for kind in ("cpu", "cuda"))
    assert cpu == 48 * KVCache.bytes_per_token(CONFIG, torch.float32)
    assert cuda == KVCache.pinned_bytes(CONFIG, 48, torch.float32) > cpu
    assert memory.host_bytes(CONFIG, 0, 16, torch.float32, torch.device("cuda")) == 0
