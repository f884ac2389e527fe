"""sample against plain Python: lists, sets and exact integers instead of tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.kernels.reference import sampling
from fastllama.kernels.reference.sampling import filter_probs, philox
from fastllama.verify.sampling import Draw, miss
from tests.kernels.honest import DTYPES, assert_equal, backends, error, on_cpu, public

on_every_backend = pytest.mark.parametrize("backend", backends("sample"))
on_the_cpu = pytest.mark.parametrize("backend", on_cpu("sample"))
WORD = 0xFFFFFFFF
# Random123's tests/kat_vectors for philox4x32-10: counter, key, result
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [0, 1, -1, 7, 1 << 31, 1 << 32, (1 << 63) - 1, -(1 << 63), 0x123456789ABCDEF]
OFFSETS = [0, 1, 1000, (1 << 31) - 1, 1 << 31, WORD]
# Counters of seed 0, found by trying: the words 0xFFFFF561, small when folded, and 0x80000025, which rounds up to 2^31.
FOLDED_SMALL, FOLDED_LARGE = 880909, 9297664
BELOW_2_31 = 2**-31 * (1 - 2**-24)  # the fp32 number before 2^-31, as one times 2^31 must not be 1


def philox_4x32_10(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (second >> 32) ^ b ^ k, second & WORD, (first >> 32) ^ d ^ m, first & WORD
        k, m = (k + 0x9E3779B9) & WORD, (m + 0xBB67AE85) & WORD
    return a, b, c, d


def uniform(seed: int, offset: int) -> float:
    """The first word folded to 31 bits, rounded to fp32 and scaled to [0, 1), rounded again."""
    word = philox_4x32_10((offset & WORD, 0, 0, 0), (seed & WORD, seed >> 32 & WORD))[0]
    return (torch.tensor(min(word, WORD - word)).float().double() * BELOW_2_31).float().item()


def survivors(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """The tokens that all filters keep, with their shares of the remaining mass."""
    top = max(logits)
    probs = {i: math.exp((logit - top) / temperature) for i, logit in enumerate(logits)}
    if 0 < top_k < len(probs):
        last = sorted(probs.values(), reverse=True)[top_k - 1]
        probs = {i: p for i, p in probs.items() if p >= last}
    if top_p < 1:
        total, mass = math.fsum(probs.values()), 0.0
        for last in sorted(probs.values(), reverse=True):
            mass += last
            if mass >= top_p * total:
                break
        probs = {i: p for i, p in probs.items() if p >= last}
    probs = {i: p for i, p in probs.items() if p >= min_p * max(probs.values())}
    total = math.fsum(probs.values())
    return {i: p / total for i, p in probs.items()}


def rows(count: int, **given: Any) -> list[Tensor]:
    """The six parameter tensors for `count` rows; a list gives each row its own value."""
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "offset": 0}
    dtypes = [torch.float32, torch.int32, torch.float32, torch.float32, torch.int64, torch.int64]
    values = (defaults | given).values()
    return [
        torch.tensor(value if isinstance(value, list) else [value] * count, dtype=dtype)
        for value, dtype in zip(values, dtypes, strict=True)
    ]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_the_integers_here_are_philox(counter: tuple[int, ...], key: tuple[int, ...], result: tuple[int, ...]) -> None:
    assert philox_4x32_10(counter, key) == result


@pytest.mark.parametrize("seed", SEEDS)
def test_philox(seed: int) -> None:
    offsets = [*OFFSETS, FOLDED_SMALL, FOLDED_LARGE]
    found = philox(torch.tensor([seed] * len(offsets)), torch.tensor(offsets))
    assert_equal(found, torch.tensor([uniform(seed, offset) for offset in offsets]))


def test_the_largest_random_number_is_below_one() -> None:
    assert philox(torch.tensor([0]), torch.tensor([FOLDED_LARGE])).item() == 1 - 2**-24


@pytest.mark.parametrize(("draw", "token"), [(0.0, 1), (0.24, 1), (0.25, 3), (0.74, 3), (0.75, 4), (1 - 2**-24, 4)])
def test_a_number_at_the_edge_of_a_token_samples_the_next_one(
    monkeypatch: pytest.MonkeyPatch, draw: float, token: int
) -> None:
    """Shares 0, 1/4, 0, 1/2, 1/4, 0: a token without a share is never sampled, not even by 0 or the largest number."""
    monkeypatch.setattr(sampling, "philox", lambda seed, offset: torch.full(seed.shape, draw))
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, math.log(2), 0.0, -math.inf]], dtype=torch.float64)
    tokens, _ = sampling.sample(logits, *rows(1))
    assert tokens.tolist() == [token]


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greedy_takes_the_first_largest(backend: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0], [-3.0, -9.0, -3.0, -3.0], [0.0, 0.0, 0.0, 1e-3]]).to(dtype)
    for others in ({}, {"top_k": 1, "top_p": 0.1, "min_p": 1.0, "seed": 5, "offset": 9}):
        tokens, _ = public("sample", backend)(logits, *rows(3, temperature=0.0, **others))
        assert tokens.dtype == torch.int64
        assert tokens.tolist() == [1, 0, 3]


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs_are_those_of_the_logits_as_given(backend: str, dtype: torch.dtype) -> None:
    """Before temperature and filters, in fp32, whichever token was sampled; against log_softmax in fp32."""
    logits = (5 * torch.randn(20, 300)).to(dtype)
    parameters = rows(20, temperature=[0.0, 0.5] * 10, top_k=7, top_p=0.8, min_p=0.01, offset=list(range(20)))
    tokens, logprobs = public("sample", backend)(logits, *parameters)
    assert logprobs.dtype == torch.float32
    plain, exact = (x.log_softmax(-1).gather(1, tokens[:, None])[:, 0] for x in (logits.float(), logits.double()))
    # Relative to the largest of all: each is a difference of logits, whose rounding does not shrink with it.
    bound = 2 * error(plain[None], exact[None]) + torch.finfo(torch.float32).eps
    assert error(logprobs[None], exact[None]) <= bound


# probabilities that are sums of powers of two: every comparison is exact, thresholds included
EXACT = [
    # probs, top_k, top_p, min_p, kept
    ([0.5, 0.25, 0.125, 0.125], 0, 1.0, 0.0, [0, 1, 2, 3]),
    ([0.125, 0.5, 0.25, 0.125], 1, 1.0, 0.0, [1]),
    ([0.125, 0.5, 0.25, 0.125], 2, 1.0, 0.0, [1, 2]),
    ([0.125, 0.5, 0.25, 0.125], 3, 1.0, 0.0, [0, 1, 2, 3]),  # a tie for the third place
    ([0.25, 0.25, 0.25, 0.25], 1, 1.0, 0.0, [0, 1, 2, 3]),
    ([0.5, 0.25, 0.125, 0.125], 9, 1.0, 0.0, [0, 1, 2, 3]),  # more than the vocabulary
    ([0.5, 0.25, 0.125, 0.125], 0, 0.5, 0.0, [0]),  # reached exactly
    ([0.5, 0.25, 0.125, 0.125], 0, 0.50001, 0.0, [0, 1]),
    ([0.5, 0.25, 0.125, 0.125], 0, 0.75, 0.0, [0, 1]),
    ([0.5, 0.25, 0.125, 0.125], 0, 0.76, 0.0, [0, 1, 2, 3]),  # one of a tie is needed
    ([0.5, 0.25, 0.125, 0.125], 0, 0.0, 0.0, [0]),
    ([0.25, 0.5, 0.25, 0.0], 0, 0.99999, 0.0, [0, 1, 2]),
    ([0.5, 0.25, 0.125, 0.125], 0, 1.0, 0.5, [0, 1]),
    ([0.5, 0.25, 0.125, 0.125], 0, 1.0, 0.25, [0, 1, 2, 3]),
    ([0.5, 0.25, 0.125, 0.125], 0, 1.0, 1.0, [0]),
    ([0.5, 0.25, 0.125, 0.125], 2, 0.66, 0.0, [0]),  # of what top-k leaves: 0.5 of 0.75 is 0.667
    ([0.5, 0.25, 0.125, 0.125], 2, 0.67, 0.0, [0, 1]),
    ([0.5, 0.25, 0.125, 0.125], 3, 0.99, 0.26, [0, 1]),
    ([1.0, 2.0**-40, 2.0**-60, 0.5], 0, 1.0, 0.0, [0, 1, 2, 3]),  # off: what rounds away in a sum stays
]


@pytest.mark.parametrize(("probs", "top_k", "top_p", "min_p", "kept"), EXACT)
def test_filters_at_their_thresholds(
    probs: list[float], top_k: int, top_p: float, min_p: float, kept: list[int]
) -> None:
    _, *filters, _, _ = rows(1, top_k=top_k, top_p=top_p, min_p=min_p)
    found = filter_probs(torch.tensor([probs]), *filters)[0]
    assert found.tolist() == [p if i in kept else 0.0 for i, p in enumerate(probs)]


@on_the_cpu
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_sampling_inverts_the_filtered_distribution(backend: str, temperature: float, ties: bool) -> None:
    """Every combination of filters: the first token in vocabulary order whose cumulative share exceeds the number."""
    vocab = 23
    combinations = [(k, p, m) for k in (0, 1, 5, 22, 23, 99) for p in (0.0, 0.3, 0.9, 1.0) for m in (0.0, 0.05, 0.4)]
    logits = 2 * torch.randn(len(combinations), vocab, dtype=torch.float64)
    logits = logits.round() if ties else logits
    top_k, top_p, min_p = (list(column) for column in zip(*combinations, strict=True))
    offsets = list(range(100, 100 + len(combinations)))
    parameters = rows(
        len(combinations), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=3, offset=offsets
    )
    tokens, _ = public("sample", backend)(logits, *parameters)
    heat, _, share, floor, _, _ = (parameter.double().tolist() for parameter in parameters)
    for b, token in enumerate(tokens.tolist()):
        kept = survivors(logits[b].tolist(), heat[b], top_k[b], share[b], floor[b])
        draw, mass = uniform(3, offsets[b]), 0.0
        for expected in sorted(kept):
            mass += kept[expected]
            if mass > draw:
                break
        assert token == expected, combinations[b]


@on_the_cpu
@pytest.mark.parametrize("varied", ["seed", "offset"])
@pytest.mark.parametrize(
    "filters", [{}, {"temperature": 0.8}, {"temperature": 3.0, "top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str
)
def test_samples_follow_the_distribution(backend: str, filters: dict[str, Any], varied: str) -> None:
    """Pearson's chi-square of 20000 samples, below its quantile of 0.9999 (Wilson and Hilferty, 1931)."""
    count, logits = 20000, torch.tensor([2.0, -1.0, 0.5, 0.5, 1.5, 0.0, -3.0, 1.0])
    parameters = rows(count, **filters, **{varied: list(range(count))})
    tokens, _ = public("sample", backend)(logits.expand(count, 8), *parameters)
    expected = survivors(logits.tolist(), *(parameter[0].item() for parameter in parameters[:4]))
    counts = torch.bincount(tokens, minlength=8).tolist()
    assert {i for i, seen in enumerate(counts) if seen} == set(expected)
    chi_square = sum((counts[i] - count * p) ** 2 / (count * p) for i, p in expected.items())
    freedom = len(expected) - 1
    normal_quantile, spread = 3.719, 2 / (9 * freedom)
    assert chi_square < freedom * (1 - spread + normal_quantile * math.sqrt(spread)) ** 3


@pytest.mark.in_turn("spread", "dtype")
# Rows of a vocabulary that takes three programs, as many of tokens that matter as the spread of the logits leaves:
# at 0.01 all weights lie in one octave, at 40 most of them below 2^-31.
@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [3, 0.01, 40])
def test_every_filter_on_a_large_vocabulary(backend: str, spread: float, dtype: torch.dtype) -> None:
    """The number falls into the share of the sampled token, but for the rounding of weights in fp32."""
    filters = [(1, 1.0, 0.0), (50, 1.0, 0.0), (8000, 1.0, 0.0), (0, 0.1, 0.0), (0, 0.9, 0.0), (0, 0.9999, 0.0)]
    filters += [(50, 0.7, 0.0), (8000, 0.95, 0.0), (8000, 0.2, 0.1), (0, 1.0, 0.3), (0, 1.0, 1.0), (0, 1.0, 0.0)]
    logits = (spread * torch.randn(len(filters), 9001)).to(dtype)
    top_k, top_p, min_p = (list(column) for column in zip(*filters, strict=True))
    heat = [0.7, 1.0, 1.6] * 4
    parameters = rows(12, temperature=heat, top_k=top_k, top_p=top_p, min_p=min_p, offset=list(range(12)))
    tokens, _ = public("sample", backend)(logits, *parameters)
    for row, token in enumerate(tokens.tolist()):
        draw = Draw(*(parameter[row].item() for parameter in parameters))
        assert miss(token, logits[row].double(), draw) <= 2 * torch.finfo(torch.float32).eps, filters[row]


@on_every_backend
@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 0.0}, {"min_p": 1.0}], ids=str)
def test_ties_of_the_largest_are_kept_together(backend: str, filters: dict[str, Any]) -> None:
    """Whatever filter leaves the least: every token of a flat row, every largest one of another, at equal shares."""
    vocab, offsets = 300, list(range(10))
    flat = torch.full((10, vocab), -5.5)
    parameters = rows(10, temperature=1.3, seed=2, offset=offsets, **filters)
    tokens, logprobs = public("sample", backend)(flat, *parameters)
    assert tokens.tolist() == [int(uniform(2, offset) * vocab) for offset in offsets]
    torch.testing.assert_close(logprobs, torch.full((10,), -math.log(vocab)))
    largest = torch.tensor([17, 18, 100, 299])
    some = flat.index_fill(1, largest, -5.25)
    tokens, _ = public("sample", backend)(some, *parameters)
    assert tokens.tolist() == [largest[int(uniform(2, offset) * 4)] for offset in offsets]


@on_every_backend
def test_a_number_is_that_of_the_rows_seed_and_offset(backend: str) -> None:
    """It depends on all 64 bits of the seed, and the low 32 of the offset."""
    vocab, offsets = 300, [*OFFSETS, 1 << 32, (1 << 32) + 7, -1]
    parameters = rows(len(SEEDS), seed=SEEDS, offset=offsets)
    tokens, _ = public("sample", backend)(torch.zeros(len(SEEDS), vocab), *parameters)
    assert tokens.tolist() == [int(uniform(*pair) * vocab) for pair in zip(SEEDS, offsets, strict=True)]


@on_every_backend
@pytest.mark.parametrize("filters", [{"temperature": 0.0}, {}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}], ids=str)
def test_a_row_that_is_no_distribution_gives_token_0_and_nan(backend: str, filters: dict[str, Any]) -> None:
    logits = torch.randn(5, 9)
    logits[0, 4] = math.nan
    logits[1] = math.nan
    logits[2, 8] = math.inf
    logits[3] = -math.inf
    tokens, logprobs = public("sample", backend)(logits, *rows(5, **filters))
    assert tokens[:4].tolist() == [0, 0, 0, 0]
    assert logprobs[:4].isnan().all()
    alone = public("sample", backend)(logits[4:], *rows(1, **filters))
    assert_equal(tokens[4:], alone[0])
    assert_equal(logprobs[4:], alone[1])


@on_every_backend
def test_a_sample_does_not_depend_on_the_batch(backend: str) -> None:
    """Alone, reversed or among others of every kind, a row gives the same token and the same logprob, bit for bit."""
    logits = torch.randn(12, 500).to(torch.bfloat16)
    parameters = rows(
        12,
        temperature=[0.0, 1.0, 0.7] * 4,
        top_k=[0, 40, 3] * 4,
        top_p=[1.0, 0.9, 0.5, 0.1] * 3,
        min_p=[0.0, 0.02] * 6,
        seed=list(range(-6, 6)),
        offset=list(range(12)),
    )
    run = public("sample", backend)
    together = run(logits, *parameters)
    backwards = run(logits.flip(0), *(parameter.flip(0) for parameter in parameters))
    for found, expected in zip(backwards, together, strict=True):
        assert_equal(found.flip(0), expected)
    for b in range(12):
        alone = run(logits[b : b + 1], *(parameter[b : b + 1] for parameter in parameters))
        for found, expected in zip(alone, together, strict=True):
            assert_equal(found, expected[b : b + 1])


@on_every_backend
@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-30, 0.7, 1e30])
def test_extreme_logits(backend: str, temperature: float) -> None:
    """Logits far apart leave one token; tokens at -inf are never sampled, at any temperature."""
    far = torch.tensor([[-1e30, 1e30, 0.0, -1e30]])
    masked = torch.tensor([[-math.inf, -math.inf, 3.0, -math.inf], [-math.inf, 0.0, 0.0, -math.inf]])
    for offset in range(8):
        parameters = rows(1, temperature=temperature, top_p=0.99, offset=offset)
        if temperature < 1e30:
            tokens, logprobs = public("sample", backend)(far, *parameters)
            assert (tokens.tolist(), logprobs.tolist()) == ([1], [0.0])
        tokens, logprobs = public("sample", backend)(masked, *(p.expand(2).contiguous() for p in parameters))
        assert tokens[0] == 2
        assert tokens[1] in (1, 2)
        torch.testing.assert_close(logprobs, torch.tensor([0.0, -math.log(2)]))


@on_every_backend
def test_a_large_vocabulary_of_which_most_is_masked(backend: str) -> None:
    """Four programs in Triton: nothing, a little, and the largest twice; the first of the two is the greedy one."""
    logits = torch.full((5, 13000), -math.inf)
    logits[:, 5000], logits[:, [9000, 12500]] = -2.0, 1.0
    parameters = rows(5, temperature=[0.0, 1.0, 1.0, 1.0, 1.0], offset=list(range(5)))
    tokens, logprobs = public("sample", backend)(logits, *parameters)
    probs = logits[0].double().softmax(-1)
    shares = probs[[5000, 9000, 12500]].cumsum(0).tolist()
    drawn = [next(i for i, share in enumerate(shares) if share > uniform(0, offset)) for offset in range(1, 5)]
    assert tokens.tolist() == [9000, *([5000, 9000, 12500][i] for i in drawn)]
    torch.testing.assert_close(logprobs, probs[tokens].log().float())


@on_every_backend
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_vocabulary_of_one_and_a_batch_of_none(backend: str, temperature: float) -> None:
    run = public("sample", backend)
    tokens, logprobs = run(torch.tensor([[-7.0], [1e30]]), *rows(2, temperature=temperature, top_k=1, top_p=0.5))
    assert (tokens.tolist(), logprobs.tolist()) == ([0, 0], [0.0, 0.0])
    tokens, logprobs = run(torch.empty(0, 9), *rows(0, temperature=temperature))
    assert tokens.shape == logprobs.shape == (0,)


@on_every_backend
def test_strided_logits_and_given_outputs(backend: str) -> None:
    logits = torch.randn(5, 33)
    wide = torch.full((5, 40), math.nan)
    wide[:, 3:36] = logits
    parameters = rows(5, temperature=[0.0, 1.0, 2.0, 0.5, 0.0], offset=list(range(5)))
    run = public("sample", backend)
    tokens, logprobs = torch.empty(5, dtype=torch.int64), torch.empty(5)
    found = run(wide[:, 3:36], *parameters, tokens=tokens, logprobs=logprobs)
    assert found[0] is tokens
    assert found[1] is logprobs
    for result, expected in zip(found, run(logits, *parameters), strict=True):
        assert_equal(result, expected)


@on_every_backend
@pytest.mark.parametrize("filters", [{}, {"top_k": 1}, {"top_p": 0.5}], ids=str)
def test_an_infinite_temperature_leaves_out_what_is_masked(backend: str, filters: dict[str, Any]) -> None:
    """All other tokens are equal, so each filter keeps them: 200 samples find each of the three."""
    logits = torch.tensor([0.0, -math.inf, 5.0, -math.inf, -5.0, -math.inf]).expand(200, 6).contiguous()
    tokens, _ = public("sample", backend)(logits, *rows(200, temperature=math.inf, offset=list(range(200)), **filters))
    assert set(tokens.tolist()) == {0, 2, 4}


@on_every_backend
@pytest.mark.parametrize("temperature", [math.nan, -1.0, -0.0, -math.inf])
def test_what_is_no_temperature_above_0_is_greedy(backend: str, temperature: float) -> None:
    tokens, _ = public("sample", backend)(torch.tensor([[0.0, 3.0, 3.0, 1.0]] * 8), *rows(8, temperature=temperature))
    assert tokens.tolist() == [1] * 8


@on_every_backend
@pytest.mark.parametrize("filters", [{"min_p": 1.5}, {"min_p": math.inf}, {"top_p": -math.inf}, {"top_k": 1}], ids=str)
def test_filters_past_their_end_keep_the_largest(backend: str, filters: dict[str, Any]) -> None:
    parameters = rows(50, offset=list(range(50)), **filters)
    tokens, _ = public("sample", backend)(torch.tensor([[0.0, 3.0, -1.0, 2.9]] * 50), *parameters)
    assert tokens.tolist() == [1] * 50


@on_every_backend
@pytest.mark.parametrize(
    "filters", [{"min_p": math.nan}, {"min_p": -1.0}, {"top_p": math.nan}, {"top_p": math.inf}, {"top_k": -1}], ids=str
)
def test_filters_that_are_none_are_off(backend: str, filters: dict[str, Any]) -> None:
    logits = torch.randn(50, 40)
    given, off = (rows(50, offset=list(range(50)), **each) for each in (filters, {}))
    assert_equal(public("sample", backend)(logits, *given)[0], public("sample", backend)(logits, *off)[0])
