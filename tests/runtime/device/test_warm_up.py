"""Warming up on a GPU: every launch and every graph that a request can need, in few steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastllama.arithmetic import power_of_2
from fastllama.runtime.device import warm_up as module
from fastllama.runtime.device.adjustments import Adjustments
from fastllama.runtime.device.capture import GraphCapture, bucket
from fastllama.runtime.device.memory import Sizes
from fastllama.runtime.device.runner import Runner
from fastllama.runtime.device.warm_up import decodes, warm_up
from fastllama.runtime.planning.inputs import Inputs
from fastllama.runtime.planning.step import Step

GPU = torch.device("cuda")


class Recorder:
    """A runner on a GPU that only writes down what it is given."""

    page_size = 16

    class model:
        device = GPU

    def __init__(self, *, deterministic: bool = False) -> None:
        self._deterministic = deterministic
        self._capture = GraphCapture(GPU, 16)
        self.adjustments = Adjustments(256, 7, (), torch.device("cpu"))
        self.steps: list[Step] = []

    shape = Runner.shape

    def run(self, step: Step) -> None:
        self.steps.append(step)

    def inputs(self) -> list[Inputs]:
        return [Inputs.of(step, 16, apart=self._deterministic) for step in self.steps]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recorder]:
    """Warms a Recorder up."""
    monkeypatch.setattr(module.sampler, "sample", lambda logits: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def run(sizes: Sizes, num_queries: tuple[int, ...] = (1,), **options: Any) -> Recorder:
        recorder = Recorder(**options)
        warm_up(recorder, sizes, num_queries)  # type: ignore[arg-type]
        return recorder

    return run


SIZES = [
    Sizes(1024, 1 << 18, 0, 256, 8192),
    Sizes(4096, 1 << 17, 0, 140, 2048),
    Sizes(100, 128, 0, 3, 8192),
    Sizes(5000, 300, 0, 2, 40),
    Sizes(1, 16, 0, 1, 1),
]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_launch_that_a_request_can_need_is_met(
    sizes: Sizes, deterministic: bool, run: Callable[..., Recorder]
) -> None:
    inputs = run(sizes, deterministic=deterministic).inputs()
    longest = min(sizes.max_model_len, sizes.kv_cache_tokens)
    most = min(sizes.max_num_batched_tokens, longest * sizes.max_num_seqs)
    rows = {power_of_2(len(each.ids)) for each in inputs}
    assert rows >= {power_of_2(count) for count in range(1, most + 1)}, "rows of matmuls"
    assert max(len(each.ids) for each in inputs) <= max(most, power_of_2(sizes.max_num_seqs))
    logits = {power_of_2(len(each.logits_rows)) for each in inputs}
    assert logits >= {power_of_2(count) for count in range(1, min(most, sizes.max_num_seqs) + 1)}, "rows of logits"
    both = [each for each in inputs if 0 < each.num_decodes < len(each.seq_lens)]
    assert len(both) == (most > 1 < longest and not deterministic), "decodes beside a prompt"
    assert any(sample.seq.request.params.penalizes for each in inputs for sample in each.samples), "logits in fp32"
    assert all(length <= longest for each in inputs for length in each.seq_lens)


def all_decode(step: Step) -> bool:
    return step.num_decodes == len(step.chunks)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("num_queries", [(1,), (1, 4), (1, 2)])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_graph_is_captured_once(
    sizes: Sizes, num_queries: tuple[int, ...], deterministic: bool, run: Callable[..., Recorder]
) -> None:
    recorder = run(sizes, num_queries, deterministic=deterministic)
    pure = [each for each, step in zip(recorder.inputs(), recorder.steps, strict=True) if all_decode(step)]
    captured = {(bucket(each.num_decodes), each.num_queries, _penalizes(each)) for each in pure}
    most = min(sizes.max_num_batched_tokens, sizes.max_num_seqs * min(sizes.max_model_len, sizes.kv_cache_tokens))
    wanted = {
        (bucket(num_seqs * length), 1) if deterministic else (bucket(num_seqs), length)
        for length in num_queries
        for num_seqs in range(1, sizes.max_num_seqs + 1)
        if num_seqs * length <= most
    }
    assert captured == {(*shape, penalizes) for shape in wanted for penalizes in (False, True)}


def _penalizes(inputs: Inputs) -> bool:
    return any(sample.seq.request.params.adjusts for sample in inputs.samples)


def test_no_smaller_graph_is_captured_before_a_larger_one(run: Callable[..., Recorder]) -> None:
    """All steps count: the prompt of one token is a graph too, of one row."""
    recorder = run(SIZES[0], (1, 4))
    rows = [
        bucket(step.num_decodes) * inputs.num_queries
        for step, inputs in zip(recorder.steps, recorder.inputs(), strict=True)
        if all_decode(step)
    ]
    assert rows == sorted(rows, reverse=True)
    assert (rows[0], rows[-1]) == (1024, 1)


def test_it_takes_few_steps(run: Callable[..., Recorder]) -> None:
    """A 7B's on an H100: 14 of prompts, 10 of decodes with and without penalties, the mixture, a penalized prompt."""
    assert len(run(SIZES[0]).steps) == 14 + 2 * 10 + 2


@given(st.integers(1, 300), st.integers(1, 600), st.sampled_from([(1,), (1, 4)]), st.booleans())
def test_decodes_are_of_every_shape_and_fit(most_seqs: int, most: int, queries: tuple[int, ...], apart: bool) -> None:
    recorder = Recorder(deterministic=apart)
    found = decodes(recorder, most_seqs, most, queries)  # type: ignore[arg-type]
    shapes = [recorder.shape(*each) for each in found]
    rows = [math.prod(shape) for shape in shapes]
    assert rows == sorted(rows, reverse=True), "a smaller graph fits into a larger one's memory"
    assert len(set(shapes)) == len(shapes)
    assert all(num_seqs <= most_seqs and num_seqs * length <= most for num_seqs, length in found)
    assert set(shapes) == {
        recorder.shape(count, length)
        for length in queries
        for count in range(1, most_seqs + 1)
        if count * length <= most
    }
