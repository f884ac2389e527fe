"""The sampling oracle: known random numbers, and samples that follow the distribution."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from fastllama.kernels.reference.sampling import philox
from fastllama.verify.sampling import Draw, candidates, miss, take, uniform

PLAIN = Draw(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1, offset=0)
# probabilities 0.4, 0.3, 0.2, 0.1 in the order 2, 0, 3, 1
LOGITS = torch.tensor([0.3, 0.1, 0.4, 0.2], dtype=torch.float64).log()


def test_the_published_vector_of_philox() -> None:
    """Random123's known answer for philox4x32-10: counter 0 and key 0 give 6627e8d5 first."""
    assert uniform(0, 0) == float(torch.tensor(0x6627E8D5).float() * torch.tensor(4.6566127342e-10))


def test_the_numbers_are_those_of_the_op() -> None:
    seeds, offsets = [0, 1, 2**63 - 1, 12345678901234567], [0, 1, 2**32 - 1, 77]
    expected = philox(torch.tensor(seeds), torch.tensor(offsets)).tolist()
    assert [uniform(*pair) for pair in zip(seeds, offsets, strict=True)] == expected


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {0, 2}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_p": 0.69}, {0, 2}),
        ({"top_p": 0.71}, {0, 2, 3}),
        ({"top_p": 1e-9}, {2}),
        ({"min_p": 0.51}, {0, 2}),
        ({"min_p": 1.0}, {2}),
        # of 0.4 and 0.3, renormalised, 0.4 is 57 %
        ({"top_k": 2, "top_p": 0.56}, {2}),
        ({"temperature": 0.01, "min_p": 0.01}, {2}),
    ],
    ids=str,
)
def test_what_may_be_sampled(change: dict[str, float], kept: set[int]) -> None:
    found = candidates(LOGITS, replace(PLAIN, **change))
    assert {token for token, probability in enumerate(found.tolist()) if probability > 0} == kept


def test_samples_follow_the_distribution() -> None:
    """Of 2000 samples, each token's share is within four standard deviations."""
    count = Counter(take(LOGITS, replace(PLAIN, offset=offset)) for offset in range(2000))
    for token, probability in enumerate(LOGITS.exp().tolist()):
        spread = (probability * (1 - probability) / 2000) ** 0.5
        assert abs(count[token] / 2000 - probability) < 4 * spread


@pytest.mark.parametrize("seed", range(20))
def test_only_the_sampled_token_misses_by_nothing(seed: int) -> None:
    draw = replace(PLAIN, seed=seed, top_k=3)
    right = take(LOGITS, draw)
    misses = [miss(token, LOGITS, draw) for token in range(4)]
    assert [token for token, distance in enumerate(misses) if distance == 0] == [right]
    assert misses[1] == 1.0  # filtered away
    number = uniform(seed, 0)
    shares = {0: (0.0, 1 / 3), 2: (1 / 3, 7 / 9), 3: (7 / 9, 1.0)}
    for token, (low, high) in shares.items():
        assert misses[token] == pytest.approx(max(low - number, number - high, 0.0))


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    draw, logits = replace(PLAIN, temperature=0.0), torch.tensor([0.0, 2.0, 2.0])
    assert take(logits, draw) == 1
    assert [miss(token, logits, draw) for token in range(3)] == [1.0, 0.0, 1.0]


def test_a_token_outside_the_vocabulary_misses() -> None:
    assert [miss(token, LOGITS, PLAIN) for token in (-1, 4)] == [1.0, 1.0]
