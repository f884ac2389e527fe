"""The benchmark of sampling options: a step decodes all sequences, the first of which use the option."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import sampling_options as subject
from benchmarks.sampling_options import NONE, OPTIONS, PENALTY
from fastllama import LlamaForCausalLM

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return subject.build("toy")


@pytest.mark.parametrize("option", ["none", *OPTIONS])
def test_the_first_sequences_use_the_option_and_all_decode(model: LlamaForCausalLM, option: str) -> None:
    with subject.decoding(model, batch=3, context=20, contender=(option, 2)) as llm:
        generations = list(llm.engine._requests.generations.values())
        asked = [OPTIONS[option]] * 2 + [{}] if option in OPTIONS else [{}] * 3
        for generation, options in zip(generations, asked, strict=True):
            params = generation.request.params
            plain = type(params)(max_tokens=subject.ROOM, temperature=0, ignore_eos=True, **options, seed=params.seed)
            assert params == plain
        before = [len(each.request.sequences[0].token_ids) for each in generations]
        assert min(before) > 20, "a prompt is not read"
        assert llm.engine.step() == generations
        assert [len(each.request.sequences[0].token_ids) for each in generations] == [count + 1 for count in before]
        assert [generation.request.finished for generation in generations] == [False] * 3


def test_the_model_computes_again_once_prompts_are_there(model: LlamaForCausalLM) -> None:
    with subject.decoding(model, batch=1, context=20, contender=NONE) as llm:
        (generation,) = llm.engine._requests.generations.values()
        for _ in range(5):
            llm.engine.step()
        (seq,) = generation.request.sequences
        assert seq.token_ids[20] == 0, "of logits that are all equal"
        assert any(seq.token_ids[21:])


def test_none_one_and_all_take_turns(model: LlamaForCausalLM) -> None:
    seconds = subject.measure(model, 2, 20, [PENALTY], rounds=3)
    assert [*seconds] == [("none", 0), ("none", 1), (PENALTY, 1), (PENALTY, 2)]
    assert [len(each) for each in seconds.values()] == [3] * 4


def test_time_in_which_another_has_the_core_does_not_count() -> None:
    assert subject.core_seconds(lambda: time.sleep(0.05))() < 0.02
    assert subject.core_seconds(lambda: sum(range(10_000_000)))() > 0.02


def test_a_ratio_is_the_median_of_those_within_the_rounds() -> None:
    seconds = {NONE: [0.001, 0.002, 0.004], (PENALTY, 1): [0.002, 0.003, 0.005]}
    assert subject.cells(seconds, (PENALTY, 1)) == ("3.00", "1.500")


def test_the_table_has_all_options_at_the_shortest_context_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found.json"
    given = ["--model", "toy", "--batch", "2", "--contexts", "10", "20", "--rounds", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["sampling_options", *given])
    subject.main()
    samples = json.loads(output.read_text(encoding="utf-8"))["samples"]
    found = [(each["context"], each["option"], each["asked"]) for each in samples]
    both = [("none", 0), ("none", 1)]
    assert found == [
        *((10, *each) for each in [*both, *((option, asked) for option in OPTIONS for asked in (1, 2))]),
        *((20, *each) for each in [*both, (PENALTY, 1), (PENALTY, 2)]),
    ]
    assert capsys.readouterr().out.count("toy, ") == len(found)
