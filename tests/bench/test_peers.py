"""transformers' continuous batching: a cache for the prompts, by each version's parameters, and reported failures."""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from fastllama.bench import peers
from fastllama.bench.workload import Prompts, prompts_of
from fastllama.io.hub import resolve_model

PROMPTS = [[1] * 8, [2] * 300, [3] * 40]


class Recorder:
    """Notes how it is called, and answers some prompts."""

    config = SimpleNamespace(vocab_size=50)

    def __init__(self, answers: int = 3) -> None:
        self.answers = answers

    def generate_batch(
        self, inputs: Prompts, generation_config: Any, continuous_batching_config: Any, progress_bar: bool
    ) -> dict[int, Any]:
        self.told = continuous_batching_config
        given = list(enumerate(inputs))[: self.answers]
        return {number: SimpleNamespace(prompt_ids=ids, generated_tokens=[ids[0]]) for number, ids in given}


class Older(Recorder):
    """The parameters before transformers 5.4."""

    def generate_batch(self, inputs: Prompts, generation_config: Any, progress_bar: bool) -> dict[int, Any]:  # type: ignore[override]
        return super().generate_batch(inputs, None, generation_config, progress_bar)


class Pages:
    """A configuration as of 5.17."""

    page_size = 256

    def __init__(self, max_batch_tokens: int) -> None:
        self.max_batch_tokens, self.num_blocks = max_batch_tokens, 0


class Blocks:
    """As before."""

    block_size = 64

    def __init__(self, max_batch_tokens: int) -> None:
        self.max_batch_tokens, self.num_blocks = max_batch_tokens, 0


def with_config(config: type[Any]) -> SimpleNamespace:
    """The part of transformers that the peer uses."""
    return SimpleNamespace(ContinuousBatchingConfig=config, GenerationConfig=transformers.GenerationConfig)


@pytest.mark.parametrize(
    ("model", "config", "num_blocks"),
    [  # five quarters of 4 blocks, of 1 + 6 + 2, and of 2 + 11 + 3
        (Recorder(), Pages, 5),
        (Recorder(), Blocks, 12),
        (Older(), Pages, 20),
    ],
)
def test_the_cache_holds_what_is_asked_for(
    model: Recorder, config: type[Any], num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", with_config(config))
    assert peers.generate_batch(model, PROMPTS, 30) == [[1], [2], [3]]
    assert model.told.num_blocks == num_blocks


def test_no_more_sequences_than_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SEQUENCES", 2)
    monkeypatch.setitem(sys.modules, "transformers", with_config(Blocks))
    model = Recorder()
    peers.generate_batch(model, PROMPTS, 30)
    assert model.told.num_blocks == 10  # five quarters of 6 + 2


@pytest.mark.parametrize("installed", [False, True])
def test_prompts_without_an_answer_are_a_failure(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names psutil where that is not installed: the likeliest reason on a CPU."""
    monkeypatch.setattr(peers, "why_unusable", lambda name: None if installed else "not installed")
    with pytest.raises(RuntimeError, match="2 of 3 prompts got no answer") as failure:
        peers.generate_batch(Older(1), PROMPTS, 30)
    assert ("psutil, by which it measures" in str(failure.value)) != installed


@pytest.mark.skipif(
    not hasattr(transformers, "ContinuousBatchingConfig"), reason="this transformers batches so on GPUs alone"
)
def test_both_peers_answer_alike() -> None:
    model = peers.load(resolve_model("tiny"), torch.float32, torch.device("cpu"))
    prompts = prompts_of(6, model.config.vocab_size, 100, random.Random(0))
    try:
        answers = peers.generate_batch(model, prompts, 8)
    except RuntimeError as failure:
        if peers.WITHOUT_PSUTIL in str(failure):
            pytest.skip(str(failure))
        raise
    assert answers == peers.generate(model, prompts, 8)
    assert [len(answer) for answer in answers] == [8] * 6
