"""Random requests, arrivals, cancellations, failures and sizes: every output is the one its request gets alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fastllama import LLM, LlamaForCausalLM, RequestOutput, SamplingParams
from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.runtime.generation import Generation
from fastllama.runtime.outputs import TokenLogprob
from tests.runtime.models import check_idle, ours, prompt_of, running

EOS = (11, 60)
# Prompts are beginnings of these, so that some share pages.
STORIES = [prompt_of(50, seed=5), prompt_of(20, seed=5) + prompt_of(30, seed=6)]


@dataclass(frozen=True)
class Order:
    """A request, the step before which it arrives, and the step before which it is aborted, if it is.

    start: from where on its prompt is scored; None where tokens are generated.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    arrival: int
    abort: int | None
    start: int | None = None

    def queue(self, llm: LLM) -> Generation:
        """Add the request to the engine."""
        if self.start is None:
            return llm.engine.add_request(self.prompt, self.params)
        return llm.engine.add(llm.prompts.prepare_scored(self.prompt, self.start, top_logprobs=2))


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    """Parameters of every kind; as hot as that, tokens do not follow from the prompt alone."""
    choices: dict[str, st.SearchStrategy[Any]] = {
        "n": st.integers(1, 3),
        "temperature": st.sampled_from([0.0, 2.0, 4.0]),
        "top_k": st.sampled_from([0, 5]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "repetition_penalty": st.sampled_from([1.0, 1.5]),
        "presence_penalty": st.sampled_from([0.0, 1.0]),
        "frequency_penalty": st.sampled_from([0.0, -1.0]),
        "stop_token_ids": st.sampled_from([(), (20, 21, 22, 23)]),
        "ignore_eos": st.booleans(),
        "logprobs": st.sampled_from([None, 2]),
        "prompt_logprobs": st.sampled_from([None, 2]),
    }
    wanted = draw(st.fixed_dictionaries({}, optional=choices))
    return SamplingParams(seed=draw(st.integers(0, 2**63 - 1)), max_tokens=draw(st.integers(1, 20)), **wanted)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    prompt = draw(st.sampled_from(STORIES))[: draw(st.integers(1, 50))]
    abort = draw(st.one_of(st.none(), st.none(), st.integers(0, 20)))
    start = draw(st.none() | st.integers(1, len(prompt) - 1)) if len(prompt) > 1 else None
    return Order(tuple(prompt), draw(params()), draw(st.integers(0, 8)), abort, start)


class Failing(LlamaForCausalLM):
    """A model whose calls with these numbers raise."""

    failures: frozenset[int] = frozenset()
    num_calls = 0

    def forward(self, ids: Tensor, batch: BatchMeta, kv: KVCache) -> Tensor:
        self.num_calls += 1
        if self.num_calls in self.failures:
            raise KeyboardInterrupt
        return super().forward(ids, batch, kv)


@functools.cache
def model(kind: type[LlamaForCausalLM]) -> LlamaForCausalLM:
    return ours(eos=EOS, kind=kind)


def numbers(reports: tuple[TokenLogprob | None, ...] | None) -> list[float]:
    """All values of log-probabilities, in one list; None is -1."""
    every = [(-1.0,) if r is None else (r.token_id, r.logprob, *chain(*r.top)) for r in (None, *(reports or ()))]
    return list(chain(*every))


def check_same(found: RequestOutput, expected: RequestOutput) -> None:
    """Everything but times and the cache is equal; log-probabilities, which are fp32, to a few roundings."""
    for mine, theirs in zip(found.outputs, expected.outputs, strict=True):
        assert replace(mine, logprobs=None) == replace(theirs, logprobs=None)
        assert numbers(mine.logprobs) == pytest.approx(numbers(theirs.logprobs), rel=1e-6)
    assert numbers(found.prompt_logprobs) == pytest.approx(numbers(expected.prompt_logprobs), rel=1e-6)


@settings(max_examples=20)
@given(
    wanted=st.lists(orders(), min_size=1, max_size=6),
    num_pages=st.integers(5, 14),
    num_host_pages=st.sampled_from([0, 2, 30]),
    num_seats=st.integers(3, 8),
    spare_budget=st.integers(0, 40),
    failures=st.frozensets(st.integers(1, 30), max_size=3),
)
def test_every_output_is_the_one_its_request_gets_alone(
    wanted: list[Order],
    num_pages: int,
    num_host_pages: int,
    num_seats: int,
    spare_budget: int,
    failures: frozenset[int],
) -> None:
    failing = model(Failing)
    assert isinstance(failing, Failing)
    failing.failures = frozenset()  # none while LLM warms up
    sizes = {
        "max_num_seqs": num_seats,
        "max_num_batched_tokens": num_seats + spare_budget,
        "host_cache_tokens": 16 * num_host_pages,
    }
    with running(failing, kv_cache_tokens=16 * num_pages, max_model_len=75, **sizes) as llm:
        failing.num_calls, failing.failures = 0, failures
        engine, generations, step = llm.engine, {}, 0
        while engine.has_work or len(generations) < len(wanted):
            for number, order in enumerate(wanted):
                if order.arrival == step:
                    generations[number] = order.queue(llm)
                if order.abort is not None and order.arrival + order.abort == step:
                    engine.abort(generations[number])
            try:
                engine.step()
            except KeyboardInterrupt:
                assert engine.pool.num_available == engine.pool.num_pages
            engine.pool.check_invariants()
            step += 1
        check_idle(engine)
        found = [generations[number] for number in range(len(wanted))]
    for order, generation in zip(wanted, found, strict=True):
        output = generation.output()
        with running(model(LlamaForCausalLM), max_model_len=75) as llm:
            if order.start is not None:
                (score,) = llm.score(list(order.prompt), order.start, top_logprobs=2)
                assert order.abort is not None or generation.failure() is None
                if generation.failure() is None:
                    assert numbers(generation.score().logprobs) == pytest.approx(numbers(score.logprobs), rel=1e-6)
                continue
            expected = llm.generate(order.prompt, order.params)[0]
        if "abort" in {sample.finish_reason for sample in output.outputs}:
            assert order.abort is not None
            for sample, whole in zip(output.outputs, expected.outputs, strict=False):
                assert sample.token_ids == whole.token_ids[: len(sample.token_ids)]
        else:
            check_same(output, expected)


def test_the_requests_alone_are_worth_comparing() -> None:
    """The tokens vary, or equality would show little."""
    with running(model(LlamaForCausalLM)) as llm:
        params = SamplingParams(temperature=4.0, seed=1, n=3, max_tokens=20, ignore_eos=True)
        outputs = llm.generate([story[:length] for story in STORIES for length in (1, 30, 50)], params)
    tokens = [sample.token_ids for output in outputs for sample in output.outputs]
    assert len(set(tokens)) == len({found[:4] for found in tokens}) == 6 * 3
    assert len(torch.tensor(tokens).unique()) > 40
