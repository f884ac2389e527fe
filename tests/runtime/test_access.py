"""Threads share an LLM step by step, no call enters a step that runs, and two LLMs of one model do not interfere."""

from __future__ import annotations

import gc
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import LLM, LlamaForCausalLM, SamplingParams
from fastllama.errors import RequestError
from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.layers.config import RopeScaling
from fastllama.runtime.access import Access
from tests.io import tokenizer_samples as samples
from tests.runtime.models import ours, prompt_of, running
from tests.runtime.serving.test_forked import held_by_another_thread
from tests.runtime.test_engine import HOT, PROMPTS, alone, tokens_of
from tests.runtime.test_generation import Pieces

PIECES = 2048  # of the bundled tokenizer
TEXTS = ["Once upon a time", "The dog", "A little girl", "Tom and Sue"]
SHORT = SamplingParams(temperature=3.0, seed=5, max_tokens=12)
WITHIN = "this LLM was called from within one of its steps; legal: calls between steps"


def _generate(llm: LLM, text: str) -> str:
    return "|".join(output.outputs[0].text for output in llm.generate([text, text + "!"], SHORT))


def _chat(llm: LLM, text: str) -> str:
    return llm.chat([{"role": "user", "content": text}], SHORT).outputs[0].text


def _stream(llm: LLM, text: str) -> str:
    return "".join(llm.stream(text, SHORT))


def _fork(llm: LLM, text: str) -> str:
    """A request that may have been forked at any of its steps, or have ended before."""
    first = llm.start(text, SHORT)
    follow = llm.follow(first)
    head = next(follow, "")
    with suppress(ValueError):  # it has ended, by the steps of the others
        forked = llm.fork(first)
        if "".join(llm.follow(forked)) != head + "".join(follow):
            return "a fork differs"
    return first.output().outputs[0].text if first.finished else head + "".join(follow)


def _abort(llm: LLM, text: str) -> str:
    """Its tokens so far are a beginning of the whole answer: no more is known, and other answers do not show it."""
    started = llm.start(text, replace(SHORT, max_tokens=200), request_id=f"{text} {threading.get_ident()}")
    llm.engine.step()
    llm.abort(started.request.request_id)
    ends = {sample.finish_reason for sample in started.output().outputs}
    return "" if started.finished and ends == {"abort"} else f"not aborted: {ends}"


JOBS: tuple[Callable[[LLM, str], str], ...] = (_generate, _chat, _stream, _fork, _abort)


def wrong_answers_of_threads() -> list[str]:
    """Differences between the answers that four threads get from one LLM in rounds of every job, and those alone."""
    wrong: list[str] = []
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with running(ours(vocab_size=PIECES), tokenizer=samples.tokenizer("tiny"), max_num_seqs=6) as llm:
            right = {(job, text): job(llm, text) for job in JOBS for text in TEXTS}

            def work(number: int) -> None:
                for turn in range(3 * len(JOBS)):
                    job, text = JOBS[(number + turn) % len(JOBS)], TEXTS[(number * turn) % len(TEXTS)]
                    try:
                        found = job(llm, text)
                    except Exception as error:
                        wrong.append(f"{job.__name__}: {error!r}")
                    else:
                        if found != right[job, text]:
                            wrong.append(f"{job.__name__}: {found!r}, not {right[job, text]!r}")

            threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(250)
                wrong += ["a thread hangs"] * thread.is_alive()
    finally:
        sys.setswitchinterval(before)
    return wrong


def test_threads_share_an_llm_and_each_gets_what_it_gets_alone() -> None:
    assert wrong_answers_of_threads() == []


def test_no_assert_is_what_keeps_threads_apart() -> None:
    script = "from tests.runtime.test_access import wrong_answers_of_threads as f; print(*f(), 'through')"
    found = subprocess.run(
        [sys.executable, "-O", "-c", script], capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2]
    )
    assert found.stdout == "through\n", found.stderr


def test_who_waits_gets_in_before_another_thread_makes_two_steps() -> None:
    seen: list[bool] = []  # for each step, whether it holds the marker
    asked = threading.Semaphore(0)
    asks = [8, 16, 24, 32, 40]  # the steps in which the other thread asks

    class Watched(LlamaForCausalLM):
        def forward(self, ids: Tensor, batch: BatchMeta, kv: KVCache) -> Tensor:
            seen.append((ids == 96).sum().item() == 5)
            if asks and len(seen) == asks[0]:
                asked.release()
                threading.Event().wait(0.05)  # until it waits indeed
            return super().forward(ids, batch, kv)

    params = SamplingParams(temperature=0, max_tokens=80, logit_bias={96: -1000.0})
    with running(ours(kind=Watched)) as llm, ThreadPoolExecutor(1) as other:
        seen.clear()
        busy = other.submit(llm.generate, PROMPTS[0], params)
        while asks:
            assert asked.acquire(timeout=60)
            started = llm.engine.add_request([96] * 5, replace(params, max_tokens=1))
            while not started.finished:
                llm.engine.step()
            llm.reset_prefix_cache()
            assert seen.index(True, asks[0]) <= asks[0] + 1, "it runs in the next step but one, at the latest"
            asks.pop(0)
        assert len(tokens_of(busy.result()[0])[0]) == 80


@pytest.fixture
def access() -> Iterator[Access]:
    made = Access()
    yield made
    assert free(made)


def free(access: Access) -> bool:
    """Whether another thread gets in at once."""
    with ThreadPoolExecutor(1) as pool:

        def enter() -> bool:
            if not access._entrance.acquire(timeout=5):
                return False
            access._entrance.release()
            if not access.acquire(timeout=5):
                return False
            access.release()
            return True

        return pool.submit(enter).result()


def enter(access: Access) -> None:
    with access:
        assert access.inside


def test_an_interrupt_at_any_moment_leaves_the_lock_free(access: Access) -> None:
    """Real ones, for with Python's tracing they come where the interpreter never looks for signals."""

    def interrupt(*given: Any) -> None:
        raise KeyboardInterrupt

    before, delays, caught = signal.signal(signal.SIGALRM, interrupt), random.Random(0), 0
    try:
        while caught < 300:
            try:
                signal.setitimer(signal.ITIMER_REAL, delays.uniform(1e-6, 3e-5))
                for _ in range(100):
                    enter(access)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                caught += 1
                assert (access.inside, access._entrance.locked()) == (False, False)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("num_before", [0, 1])
def test_an_interrupt_while_it_waits_leaves_the_lock_free(num_before: int, access: Access) -> None:
    """As the first that waits, and as the second."""
    main = threading.main_thread().ident
    assert main == threading.get_ident()
    others = [threading.Thread(target=enter, args=(access,)) for _ in range(num_before)]
    with held_by_another_thread(access):
        for other in others:
            other.start()
            while not access._entrance.locked():
                threading.Event().wait(0.001)
        ctrl_c = threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT))
        ctrl_c.start()
        with pytest.raises(KeyboardInterrupt):
            enter(access)
        assert not access.inside
    for other in others:
        other.join(60)
        assert not other.is_alive()


def test_one_thread_at_a_time_has_it_alone_and_who_waits_meanwhile_is_refused(access: Access) -> None:
    ended, refused = threading.Event(), []

    def wait_outside() -> None:
        with pytest.raises(RuntimeError, match=r"^this LLM serves an AsyncEngine; legal: ") as raised:
            enter(access)
        refused.append(raised.value)

    owner = threading.Thread(target=ended.wait)
    waits = threading.Thread(target=wait_outside)
    with access:
        waits.start()
        while not access._entrance.locked():
            threading.Event().wait(0.001)
        access._owner = None
        # What `claim` does, within its `with`.
        access._owner = type("Owner", (), {"thread": owner, "end": ended.set})()  # type: ignore[assignment]
    waits.join(60)
    assert len(refused) == 1
    with pytest.raises(RuntimeError, match=r"^this LLM serves an AsyncEngine; legal: "):
        access.claim(threading.current_thread(), ended.set)
    owner.start()
    access.evict()
    assert not owner.is_alive()
    access.give_up()
    enter(access)


Call = Callable[[LLM], Any]
CALLS: dict[str, Call] = {
    "generate": lambda llm: llm.generate([3, 4]),
    "start": lambda llm: llm.start([3, 4]),
    "chat": lambda llm: llm.chat([{"role": "user", "content": "a"}]),
    "reset_prefix_cache": lambda llm: llm.reset_prefix_cache(),
    "update_weights": lambda llm: llm.update_weights({}),
    "close": lambda llm: llm.close(),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_from_a_logits_processor_fails_that_request_in_a_sentence(call: str) -> None:
    def processor(token_ids: list[int], logits: Tensor) -> Tensor:
        if len(token_ids) == 3:
            CALLS[call](llm)
        return logits

    params = [HOT, replace(HOT, logits_processors=[processor]), HOT]
    with running(ours(), tokenizer=Pieces([bytes([65 + n]) for n in range(20)]), chat_format="llama2") as llm:
        with pytest.raises(RequestError, match=r"^prompt 1 of 3: request '1' failed: RuntimeError") as raised:
            llm.generate(PROMPTS, params)
        assert str(raised.value.__cause__) == WITHIN
        first, broken, last = raised.value.outputs
        assert [tokens_of(first), tokens_of(last)] == [alone(PROMPTS[0]), alone(PROMPTS[2])]
        assert tokens_of(broken) == [alone(PROMPTS[1])[0][:3]]
        assert tokens_of(llm.generate(PROMPTS[1], HOT)[0]) == alone(PROMPTS[1])


def test_a_call_from_a_forward_hook_fails_whom_it_is_made_for() -> None:
    class Calling(LlamaForCausalLM):
        def forward(self, ids: Tensor, batch: BatchMeta, kv: KVCache) -> Tensor:
            if (batch.positions == 22).any():  # of the second prompt
                calls[0]()
            return super().forward(ids, batch, kv)

    calls: list[Callable[[], Any]] = [lambda: None]
    with running(ours(kind=Calling)) as llm:
        calls[0] = lambda: llm.generate([3, 4])
        short = replace(HOT, max_tokens=2)  # the others' positions differ
        with pytest.raises(RequestError) as raised:
            llm.generate(PROMPTS, [short, HOT, short])
        assert str(raised.value.__cause__) == WITHIN
        assert [output.outputs[0].finish_reason for output in raised.value.outputs] == ["length", "error", "error"]
        calls[0] = lambda: None
        assert tokens_of(llm.generate(PROMPTS[1], HOT)[0]) == alone(PROMPTS[1])


def test_a_call_from_a_tokenizer_within_a_step_fails_that_request() -> None:
    class Asking(Pieces):
        asks = False

        def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes:
            if self.asks and token_id == 4:
                llm.generate([3, 4])
            return super().token_bytes(token_id, skip_special_tokens=skip_special_tokens)

    tokenizer = Asking([b"a", b"b"])
    bias = [replace(HOT, logit_bias={token: 1000.0}) for token in (5, 4)]
    with running(ours(), tokenizer=tokenizer) as llm:
        tokenizer.asks = True
        with pytest.raises(RequestError, match=r"^prompt 1 of 2: ") as raised:
            llm.generate([[5], [5, 5]], bias)
        assert str(raised.value.__cause__) == WITHIN
        assert raised.value.outputs[0].outputs[0].text == "b" * 10


def test_a_stream_that_is_let_go_of_within_a_step_aborts_its_request_without_an_error() -> None:
    streams: list[Any] = []

    def processor(token_ids: list[int], logits: Tensor) -> Tensor:
        if len(token_ids) == 2:
            streams.clear()
            gc.collect()
        return logits

    with running(ours(), tokenizer=Pieces([])) as llm:
        let_go = llm.start(PROMPTS[2], replace(HOT, max_tokens=100))
        streams.append(llm.follow(let_go))
        params = replace(HOT, logits_processors=[processor])
        assert tokens_of(llm.generate(PROMPTS[1], params)[0]) == alone(PROMPTS[1])
        assert [sample.finish_reason for sample in let_go.output().outputs] == ["abort"]
        assert len(let_go.output().outputs[0].token_ids) <= 4


@pytest.mark.parametrize("scaling", [None, RopeScaling("dynamic", 2.0)])
def test_two_llms_of_one_model_leave_each_other_alone(scaling: RopeScaling | None) -> None:
    """The shorter one is made last; dynamic rope depends on the length of each sequence."""
    params = SamplingParams(temperature=0, max_tokens=30)
    prompts = {700: prompt_of(600 if scaling else 200), 64: prompt_of(20)}

    def model() -> LlamaForCausalLM:
        made = ours()
        made.config = replace(made.config, rope_scaling=scaling)
        return made

    def longest(length: int) -> int:
        return length if scaling else min(length, 512)

    def answers(llm: LLM, length: int) -> list[tuple[int, ...]]:
        llm.reset_prefix_cache()
        return tokens_of(llm.generate(prompts[length], params)[0])

    right = {}
    for length in prompts:
        with running(model(), max_model_len=longest(length)) as llm:
            right[length] = answers(llm, length)
    shared = model()
    with running(shared, max_model_len=longest(700)) as long, running(shared, max_model_len=64) as short:
        pairs = [(long, 700), (short, 64)]
        for llm, length in pairs * 2:
            assert answers(llm, length) == right[length]
        with ThreadPoolExecutor(2) as pool:
            found = [pool.submit(answers, *pair) for pair in pairs * 4]
        assert [each.result() for each in found] == [right[length] for _, length in pairs * 4]


def test_the_weights_of_a_model_that_another_llm_runs_cannot_be_changed() -> None:
    model = ours(dtype=torch.float32)
    with running(model) as first:
        before = tokens_of(first.generate(PROMPTS[0], HOT)[0])
        with pytest.raises(ValueError, match=r"^quantization is 'int8' for a model that another LLM runs, .*; legal: "):
            LLM(model, quantization="int8", kv_cache_tokens=1024, progress=False)
        with running(model) as second:
            for llm in (first, second):
                with pytest.raises(RuntimeError, match=r"^another LLM runs this model, .*; legal: one LLM of a model$"):
                    llm.update_weights({})
        second.close()
        del second, llm
        assert tokens_of(first.generate(PROMPTS[0], HOT)[0]) == before
        first.update_weights({})
