"""The workload's prompts have all lengths, and are the same for the same seed."""

from __future__ import annotations

import random

from fastllama.bench.workload import prompts_of


def test_prompts_are_of_all_lengths() -> None:
    prompts = prompts_of(500, 97, 400, random.Random(0))
    lengths = sorted(map(len, prompts))
    assert (lengths[0], lengths[-1]) == (8, 399)
    assert 50 < lengths[250] < 65  # the middle of their logarithms: 57
    assert {token for prompt in prompts for token in prompt} == set(range(3, 97))
    assert prompts == prompts_of(500, 97, 400, random.Random(0))


def test_no_prompt_is_longer_than_it_may_be() -> None:
    lengths = {len(prompt) for prompt in prompts_of(200, 97, 10, random.Random(0))}
    assert lengths == {8, 9, 10}
