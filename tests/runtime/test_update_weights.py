"""Weights that change under a running LLM: cached keys and values are forgotten, and answers are the new weights'."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from fastllama import LLM, AsyncEngine, SamplingParams
from fastllama.layers.quantization import KINDS
from tests.layers.test_update import loaded, weights
from tests.runtime.models import prompt_of, running

PROMPT = prompt_of(60, seed=8)
GREEDY = SamplingParams(temperature=0, max_tokens=12)
OLD, NEW = weights(3), weights(5)
FEW_PAGES = {"host_cache_tokens": 400, "kv_cache_tokens": 128, "max_model_len": 100}


def answer(llm: LLM, prompt: list[int] = PROMPT) -> tuple[tuple[int, ...], int]:
    """Tokens, and how many of the prompt's were found in the cache."""
    (output,) = llm.generate([prompt], GREEDY)
    return output.outputs[0].token_ids, output.metrics.num_cached_tokens


def fresh(kind: str | None = None) -> tuple[int, ...]:
    with running(loaded(NEW, kind), quantization=None, deterministic=True) as llm:
        return answer(llm)[0]


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize(
    "options", [{}, {"host_cache_tokens": 400, "kv_cache_tokens": 128, "max_model_len": 100}], ids=str
)
def test_a_prompt_seen_before_is_answered_with_the_new_weights(kind: str | None, options: dict[str, Any]) -> None:
    with running(loaded(OLD, kind), quantization=None, deterministic=True, **options) as llm:
        before, _ = answer(llm)
        assert answer(llm) == (before, 48), "a page of 16 that is full is found"
        llm.generate([prompt_of(70, seed=k) for k in range(3)], GREEDY)  # of which the host gets some
        llm.update_weights(NEW)
        assert answer(llm) == (fresh(kind), 0)
        assert answer(llm) == (fresh(kind), 48)
        assert before != fresh(kind)


def test_weights_changed_in_place_want_a_reset() -> None:
    model = loaded(OLD)
    with running(model, deterministic=True) as llm:
        answer(llm)
        with torch.no_grad():
            for parameter, other in zip(model.parameters(), loaded(NEW).parameters(), strict=True):
                parameter.copy_(other)
        assert answer(llm)[1] == 48
        llm.reset_prefix_cache()
        assert answer(llm) == (fresh(), 0)


def test_unfinished_requests_compute_their_keys_anew_and_go_on() -> None:
    with running(loaded(OLD), deterministic=True) as llm:
        generation = llm.engine.add_request(PROMPT, GREEDY)
        while len(generation.request.sequences[0].token_ids) < len(PROMPT) + 5:
            llm.engine.step()
        llm.update_weights(iter(NEW.items()))
        begun = generation.request.sequences[0].token_ids[len(PROMPT) :]
        while not generation.finished:
            llm.engine.step()
        found = generation.output().outputs[0].token_ids
    with running(loaded(NEW), deterministic=True) as llm:
        rest = llm.generate([[*PROMPT, *begun]], SamplingParams(temperature=0, max_tokens=12 - len(begun)))[0]
    assert found == (*begun, *rest.outputs[0].token_ids)


def test_what_is_refused_changes_no_answer() -> None:
    with running(loaded(OLD), deterministic=True) as llm:
        before, _ = answer(llm)
        with pytest.raises(ValueError, match=r"no_such"):
            llm.update_weights({**NEW, "model.no_such.weight": torch.zeros(2)})
        assert answer(llm)[0] == before


def test_an_engine_takes_new_weights_between_two_steps() -> None:
    async def test(llm: LLM) -> None:
        async with AsyncEngine(llm) as engine:
            await engine.generate(PROMPT, GREEDY)
            await engine.update_weights(NEW)
            output = await engine.generate(PROMPT, GREEDY)
            assert (output.outputs[0].token_ids, output.metrics.num_cached_tokens) == (fresh(), 0)
            await engine.reset_prefix_cache()
            assert (await engine.generate(PROMPT, GREEDY)).metrics.num_cached_tokens == 0
            with pytest.raises(ValueError, match="no_such"):
                await engine.update_weights({"model.no_such.weight": torch.zeros(2)})

    with running(loaded(OLD), deterministic=True) as llm:
        asyncio.run(test(llm))
