"""A step that fails is split in halves: the request at fault is found, and all others go on as if it were not there."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastllama import LlamaForCausalLM, SamplingParams
from fastllama.layers.batch import BatchMeta, KVCache
from fastllama.runtime.device.sampler import SampledToken
from fastllama.runtime.engine import Engine
from fastllama.runtime.generation import Generation
from fastllama.runtime.live_requests import LiveRequests
from fastllama.runtime.planning.isolation import run_parts
from fastllama.runtime.planning.step import Step
from tests.runtime.models import VOCAB, ours, prompt_of, running
from tests.runtime.planning.test_scheduler import add, make, turn
from tests.runtime.test_engine import HOT, PROMPTS, alone, tokens_of

CURSED = min(set(range(1, VOCAB)).difference(*PROMPTS))  # 0 is what the warm-up feeds


def scheduled(*lengths: int) -> Step:
    """A step of prompts, the n-th of the tokens n, n, n..."""
    scheduler = make(seqs=8, budget=100)
    for number, length in enumerate(lengths):
        add(scheduler, [number] * length)
    step = scheduler.schedule()
    assert step is not None
    return step


def spans(step: Step) -> list[tuple[int, int, int, int]]:
    return [(chunk.seq.seq_id, chunk.start, chunk.length, len(chunk.samples)) for chunk in step.chunks]


def test_a_step_that_runs_runs_once() -> None:
    step = scheduled(3, 3)
    assert run_parts(step, lambda part: part) == ([step], {})


def test_a_fault_is_followed_to_its_request() -> None:
    step, runs, error = scheduled(3, 3, 3, 3), [], RuntimeError("cursed")

    def run(part: Step) -> Step:
        runs.append(spans(part))
        if any(chunk.seq.seq_id == 2 for chunk in part.chunks):
            raise error
        return part

    results, failures = run_parts(step, run)
    assert [spans(part) for part in results] == [[(0, 0, 3, 1), (1, 0, 3, 1)], [(3, 0, 3, 1)]]
    assert failures == {step.chunks[2].seq.request: error}
    # of what fails, the first half; of a prompt whose first token fails, no more
    assert [len(found) for found in runs] == [4, 2, 2, 1, 1, 1]
    assert runs[-2:] == [[(2, 0, 1, 0)], [(3, 0, 3, 1)]]


def test_what_is_too_large_is_tried_smaller_and_in_order() -> None:
    step = scheduled(9, 5)

    def run(part: Step) -> Step:
        if sum(chunk.length for chunk in part.chunks) > 4:
            raise MemoryError
        return part

    results, failures = run_parts(step, run)
    assert failures == {}
    assert [spans(part) for part in results] == [
        [(0, 0, 4, 0)],
        [(0, 4, 2, 0)],
        [(0, 6, 3, 1)],
        [(1, 0, 2, 0)],
        [(1, 2, 3, 1)],
    ]
    assert [part.num_decodes for part in results] == [0] * 5


@pytest.mark.parametrize(("lengths", "most"), [((1,) * 8, 15), ((64,), 7), ((64, 1, 1), 12)])
def test_a_fault_that_follows_everybody_ends(lengths: tuple[int, ...], most: int) -> None:
    runs = 0

    def run(part: Step) -> None:
        nonlocal runs
        runs += 1
        raise RuntimeError

    results, failures = run_parts(scheduled(*lengths), run)
    assert (len(results), len(failures)) == (0, len(lengths))
    assert runs <= most


def test_each_part_takes_its_own_copies() -> None:
    scheduler = make(10, 2, budget=8)
    add(scheduler, range(3), n=3)
    turn(scheduler)
    step = scheduler.schedule()
    assert step is not None
    assert len(step.copies) == 2
    parts: list[Step] = []

    def run(part: Step) -> None:
        parts.append(part)
        if len(part.chunks) > 1:
            raise RuntimeError

    run_parts(step, run)
    assert [part.copies for part in parts if len(part.chunks) == 1] == [step.copies[:1], step.copies[1:], ()]


def test_what_a_failed_run_held_is_gone_before_the_next() -> None:
    @dataclass
    class Activation:
        part: Step

    held: list[weakref.ref[Activation]] = []

    def run(part: Step) -> None:
        assert all(reference() is None for reference in held)
        activation = Activation(part)
        held.append(weakref.ref(activation))
        if len(held) < 3:
            raise MemoryError

    run_parts(scheduled(3, 3), run)
    assert len(held) == 5


def test_an_interrupt_is_no_fault_of_a_request() -> None:
    def run(part: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_parts(scheduled(3, 3), run)


class Cursed(LlamaForCausalLM):
    """Raises where a batch holds a token or more rows than it bears, once everything is written, or always."""

    token = CURSED
    most = 1000
    always = False
    num_failures = 0

    def forward(self, ids: Tensor, batch: BatchMeta, kv: KVCache) -> Tensor:
        logits = super().forward(ids, batch, kv)
        if self.always or len(ids) > self.most or bool((ids == self.token).any()):
            self.num_failures += 1
            for layer in kv.layers:  # a step that failed may have left anything in its slots
                layer.k_pages[batch.slots // 16, :, batch.slots % 16] = torch.nan
            raise RuntimeError("cursed")
        return logits


def cursed(**attributes: int) -> Cursed:
    model = ours(kind=Cursed)
    assert isinstance(model, Cursed)
    vars(model).update(attributes)
    return model


def finish(engine: Engine, generations: list[Generation]) -> None:
    for _ in range(1000):
        if all(generation.finished for generation in generations):
            return
        engine.step()
    raise AssertionError("some never end")


@pytest.mark.parametrize("budget", [6, 1000])
def test_the_engine_ends_whom_a_fault_follows_alone(budget: int) -> None:
    prompt = prompt_of(25, seed=9)
    params = [HOT, SamplingParams(temperature=3.0, seed=5, n=3, max_tokens=10), HOT, HOT]
    prompts = [PROMPTS[0], PROMPTS[1], [*prompt[:20], CURSED, *prompt[21:]], PROMPTS[2]]
    # in one prompt alone, and never sampled
    own = [
        SamplingParams(temperature=p.temperature, seed=p.seed, n=p.n, max_tokens=10, logit_bias={CURSED: -1000})
        for p in params
    ]
    with running(cursed(), max_num_seqs=6, max_num_batched_tokens=budget) as llm:
        generations = [llm.engine.add_request(*given) for given in zip(prompts, own, strict=True)]
        finish(llm.engine, generations)
        outputs = [generation.output() for generation in generations]
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "length", "error", "length"]
    assert outputs[2].outputs[0].stop_reason == "RuntimeError('cursed')"
    assert str(generations[2].error) == "cursed"
    assert outputs[2].metrics.finish_time is not None
    for number in (0, 1, 3):
        assert tokens_of(outputs[number]) == alone(prompts[number], own[number])


@pytest.mark.parametrize("most", [1, 2, 5])
def test_a_memory_for_few_rows_serves_all_the_same(most: int) -> None:
    params = SamplingParams(temperature=3.0, seed=5, n=3, max_tokens=10)
    model = cursed(token=-1)
    with running(model) as llm:
        model.most = most
        generations = [llm.engine.add_request(prompt, params) for prompt in PROMPTS]
        finish(llm.engine, generations)
        found = [tokens_of(generation.output()) for generation in generations]
    assert found == [alone(prompt, params) for prompt in PROMPTS]
    assert model.num_failures > 10


def test_what_breaks_after_the_logits_ends_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    three = SamplingParams(temperature=3.0, seed=5, n=3, max_tokens=10)
    with running(ours()) as llm:
        generations = [llm.engine.add_request(*given) for given in zip(PROMPTS, (HOT, three, HOT), strict=True)]
        accept = LiveRequests._accept

        def breaking(requests: LiveRequests, generation: Generation, sampled: SampledToken, now: float) -> None:
            if generation is generations[1] and sampled.seq.index == 1:
                raise UnicodeError("no text")
            accept(requests, generation, sampled, now)

        monkeypatch.setattr(LiveRequests, "_accept", breaking)
        finish(llm.engine, generations)
        outputs = [generation.output() for generation in generations]
    assert isinstance(generations[1].error, UnicodeError)
    assert [len(sample.token_ids) for output in outputs for sample in output.outputs] == [10, 1, 0, 0, 10]
    assert [tokens_of(outputs[number]) for number in (0, 2)] == [alone(PROMPTS[number]) for number in (0, 2)]
