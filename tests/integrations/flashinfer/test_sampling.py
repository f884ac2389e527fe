"""FlashInfer's sampling on our op: the tokens that filters keep, their frequencies, and the random numbers used."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.integrations import flashinfer
from tests.integrations.flashinfer.calls import NoHostRead
from tests.integrations.flashinfer.conftest import Library
from tests.integrations.flashinfer.weights import filtered

# Ties, and a token of weight 0. No filter below cuts within a hundredth of a sum.
WEIGHTS = [3, 9, 0, 9, 1, 5, 5, 8]
DRAWS = 20_000
CASES: list[tuple[str, dict[str, Any]]] = [
    ("sampling", {}),
    ("top_k_sampling", {"top_k": 1}),
    ("top_k_sampling", {"top_k": 4}),
    ("top_p_sampling", {"top_p": 0.5}),
    ("top_p_sampling", {"top_p": 0.1}),
    ("min_p_sampling", {"min_p": 0.5}),
    ("top_k_top_p_sampling", {"top_k": 3, "top_p": 0.67}),
    ("top_k_top_p_sampling", {"top_k": 3, "top_p": 0.67, "filter_apply_order": "joint"}),
    ("top_k_top_p_sampling", {"top_k": 3, "top_p": 0.4, "filter_apply_order": "joint"}),
]


def probs_of(weights: list[float], device: torch.device) -> Tensor:
    row = torch.tensor([weights], dtype=torch.float64)
    return (row / row.sum()).float().to(device)


def assert_sampled_from(tokens: Tensor, weights: Tensor) -> None:
    """Pearson's chi-square, ten standard deviations wide: a probability of 0.2 that is 0.02 off is found."""
    counts = torch.bincount(tokens.long().cpu(), minlength=len(weights)).double()
    expected = counts.sum() * weights / weights.sum()
    possible = weights > 0
    assert counts[~possible].sum() == 0
    freedom = int(possible.sum()) - 1
    statistic = float(((counts - expected).square() / expected)[possible].sum())
    assert statistic <= freedom + 10 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(("name", "filters"), CASES)
def test_tokens_are_sampled_by_the_filtered_probabilities(library: Library, name: str, filters: dict[str, Any]) -> None:
    """One row sampled many times with one seed: the places of a batch are independent."""
    probs = probs_of(WEIGHTS, library.device)
    rows = torch.zeros(DRAWS, dtype=torch.int64, device=library.device)
    exact = filtered(torch.tensor(WEIGHTS, dtype=torch.float64), **filters)
    draw = getattr(library.module.sampling, f"{name}_from_probs")
    assert_sampled_from(draw(probs, **filters, indices=rows, seed=11, offset=0), exact)
    if name in ("sampling", "top_k_top_p_sampling"):
        draw = getattr(library.module.sampling, f"{name}_from_logits")
        assert_sampled_from(draw(probs.log() + 3, **filters, indices=rows, seed=12, offset=0), exact)


@pytest.mark.parametrize("varied", ["seed", "offset", "both"])
def test_consecutive_seeds_and_offsets_are_independent(library: Library, varied: str) -> None:
    probs = probs_of(WEIGHTS, library.device).expand(DRAWS, -1).contiguous()
    steps = torch.arange(DRAWS, dtype=torch.int64, device=library.device)
    seed = steps if varied != "offset" else torch.full_like(steps, 7)
    offset = steps if varied != "seed" else torch.zeros_like(steps)
    tokens = library.module.sampling_from_probs(probs, seed=seed, offset=offset)
    assert_sampled_from(tokens, torch.tensor(WEIGHTS, dtype=torch.float64))


def test_equal_seeds_give_equal_tokens_however_they_are_given(library: Library) -> None:
    probs = probs_of(WEIGHTS, library.device).expand(64, -1).contiguous()
    tokens = library.module.sampling_from_probs(probs, seed=5, offset=8)
    for size in (1, 64):
        seed, offset = (torch.full((size,), each, dtype=torch.int64, device=library.device) for each in (5, 8))
        assert torch.equal(library.module.sampling_from_probs(probs, seed=seed, offset=offset), tokens)
    for other in ({"seed": 6, "offset": 8}, {"seed": 5, "offset": 12}, {"seed": 5, "offset": 8 + (1 << 33)}):
        assert not torch.equal(library.module.sampling_from_probs(probs, **other), tokens)


def test_a_seed_without_an_offset_is_ignored_as_there(library: Library) -> None:
    probs = probs_of(WEIGHTS, library.device).expand(64, -1).contiguous()
    torch.manual_seed(3)
    one, other = (library.module.sampling_from_probs(probs, seed=5) for _ in range(2))
    assert not torch.equal(one, other)


def test_a_generator_gives_the_same_tokens_from_the_same_state_and_advances(library: Library) -> None:
    probs = probs_of(WEIGHTS, library.device).expand(64, -1).contiguous()
    generator = torch.Generator(library.device)
    drawn = []
    for _ in range(2):
        generator.manual_seed(9)
        drawn.append([library.module.top_p_sampling_from_probs(probs, 0.9, generator=generator) for _ in range(2)])
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_without_one_torchs_own_generator_is_used(library: Library) -> None:
    logits = torch.zeros(64, 100, device=library.device)
    torch.manual_seed(4)
    tokens = library.module.sampling_from_logits(logits)
    assert not torch.equal(library.module.sampling_from_logits(logits), tokens)
    torch.manual_seed(4)
    assert torch.equal(library.module.sampling_from_logits(logits), tokens)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_indices_name_the_rows_and_their_parameters(library: Library, dtype: torch.dtype) -> None:
    probs = torch.eye(3, device=library.device)[:, [2, 0, 1]].contiguous()
    indices = torch.tensor([2, 2, 0, 1], dtype=dtype, device=library.device)
    tokens = library.module.sampling_from_probs(probs, indices)
    assert tokens.tolist() == [0, 0, 1, 2]
    assert tokens.dtype == dtype
    assert library.module.sampling_from_probs(probs).dtype == torch.int32

    # Of row 0 only its likeliest token is kept, of row 1 all.
    probs = probs_of(WEIGHTS[4:], library.device).expand(2, -1).contiguous()
    top_k = torch.tensor([1, 4], dtype=torch.int32, device=library.device)
    rows = torch.tensor([1, 0], dtype=torch.int32, device=library.device).repeat_interleave(200)
    tokens = library.module.top_k_sampling_from_probs(probs, top_k, rows, seed=1, offset=0)
    assert set(tokens[200:].tolist()) == {3}
    assert set(tokens[:200].tolist()) == {0, 1, 2, 3}


def test_a_row_without_a_token_to_sample_gives_0_and_is_not_valid(library: Library) -> None:
    probs = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]], device=library.device)
    samplers: list[tuple[str, tuple[Any, ...]]] = [
        ("sampling", ()),
        ("top_p_sampling", (0.5,)),
        ("top_k_sampling", (2,)),
        ("min_p_sampling", (0.1,)),
        ("top_k_top_p_sampling", (2, 0.5)),
        ("top_k_top_p_sampling", (2, 0.5, None, "joint")),
    ]
    for name, filters in samplers:
        sampler = getattr(library.module.sampling, f"{name}_from_probs")
        tokens, valid = sampler(probs, *filters, return_valid=True)
        assert tokens.tolist() == [0, 2], name
        assert valid.tolist() == [False, True], name
        assert valid.dtype == torch.bool


def test_a_row_with_a_nan_is_not_valid_and_negative_ones_are_never_sampled() -> None:
    probs = torch.tensor([[0.5, math.nan, 0.5], [-3.0, 1.0, -math.inf], [math.inf, 1.0, 0.0]])
    tokens, valid = flashinfer.sampling_from_probs(probs, return_valid=True)
    assert tokens.tolist() == [0, 1, 0]
    assert valid.tolist() == [False, True, False]


@pytest.mark.parametrize("total", [1e-6, 0.2, 37.0, 1e6])
def test_a_row_counts_as_normalised_whatever_its_sum(total: float) -> None:
    weights = torch.tensor([WEIGHTS], dtype=torch.float32)
    rows = torch.zeros(500, dtype=torch.int64)
    for name, filters in CASES:
        draw = getattr(flashinfer.sampling, f"{name}_from_probs")
        drawn = [draw(each, **filters, indices=rows, seed=2, offset=0) for each in (weights, weights / 40 * total)]
        assert float((drawn[0] == drawn[1]).double().mean()) > 0.99, name  # but where a number falls between two tokens


def test_joint_filters_look_at_the_probabilities_as_they_are(library: Library) -> None:
    probs = probs_of([50, 30, 15, 5], library.device)
    rows = torch.zeros(500, dtype=torch.int32, device=library.device)
    seen = {}
    for order in ("top_k_first", "joint"):
        call = {"indices": rows, "filter_apply_order": order, "seed": 1, "offset": 0}
        tokens = library.module.top_k_top_p_sampling_from_probs(probs, 2, 0.6, **call)
        seen[order] = set(tokens.tolist())
        assert set(library.module.top_k_top_p_sampling_from_logits(probs.log(), 2, 0.6, **call).tolist()) == seen[order]
    assert seen == {"top_k_first": {0}, "joint": {0, 1}}  # 50 of 80 are above 0.6, and 50 of 100 are not


def test_seeds_of_64_bits_may_be_signed_or_not() -> None:
    probs = probs_of(WEIGHTS, torch.device("cpu")).expand(64, -1).contiguous()
    tokens = flashinfer.sampling_from_probs(probs, seed=-1, offset=0)
    assert torch.equal(flashinfer.sampling_from_probs(probs, seed=(1 << 64) - 1, offset=0), tokens)
    word, none = torch.tensor([(1 << 64) - 1], dtype=torch.uint64), torch.tensor([0], dtype=torch.uint64)
    assert torch.equal(flashinfer.sampling_from_probs(probs, seed=word, offset=none), tokens)


def test_top_k_of_minus_1_or_of_many_keeps_all() -> None:
    probs = probs_of(WEIGHTS, torch.device("cpu"))
    for top_k in (-1, 8, 1 << 31, torch.tensor([0]), torch.tensor([-1], dtype=torch.int32)):
        torch.testing.assert_close(flashinfer.top_k_renorm_probs(probs, top_k), probs)


def test_renormalised_rows_hold_what_is_kept_ties_included(library: Library) -> None:
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    probs = probs_of(WEIGHTS, library.device)
    for name, value in (("top_p", 0.5), ("top_p", 0.1), ("top_p", 1.0), ("top_k", 1), ("top_k", 4), ("top_k", 8)):
        exact = filtered(weights, **{name: value})
        renorm = getattr(library.module.sampling, f"{name}_renorm_probs")
        for given in (value, torch.tensor([value], device=library.device)):
            found = renorm(probs, given)
            torch.testing.assert_close(found.cpu().double(), (exact / exact.sum())[None], rtol=1e-5, atol=0)
            assert found.dtype == torch.float32
        assert getattr(library.module.sampling, f"{name}_renorm_prob") is renorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_top_k_alone_keeps_the_dtype(library: Library, dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, 3, 3, -2, 2], [5, 5, 5, 5, -math.inf]], dtype=dtype, device=library.device)
    found = library.module.top_k_mask_logits(logits, torch.tensor([1, 2], device=library.device))
    low = -math.inf
    assert found.tolist() == [[low, 3, 3, low, low], [5, 5, 5, 5, low]]
    assert found.dtype == dtype
    renormed = library.module.top_k_renorm_probs(logits.exp() / 256, 2)
    assert renormed.dtype == dtype
    torch.testing.assert_close(renormed.float().sum(-1).cpu(), torch.ones(2), rtol=0, atol=2e-2)


def test_a_row_of_zeros_stays_one() -> None:
    assert flashinfer.top_p_renorm_probs(torch.zeros(1, 3), 0.5).tolist() == [[0, 0, 0]]
    assert flashinfer.top_k_renorm_probs(torch.zeros(1, 3), 2).tolist() == [[0, 0, 0]]


def test_softmax_divides_by_the_temperature_of_each_row(library: Library) -> None:
    logits = torch.randn(3, 50, dtype=torch.float16, device=library.device) * 4
    heats = torch.tensor([0.5, 1.0, 3.0], device=library.device)
    for given, divisor in ((None, 1.0), (0.7, 0.7), (heats, heats.double()[:, None])):
        found = library.module.softmax(logits, given)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), (logits.double() / divisor).softmax(-1), rtol=1e-4, atol=1e-8)
    for none in (0, torch.zeros(3, device=library.device)):
        torch.testing.assert_close(library.module.softmax(logits, none), torch.full_like(found, 0.02))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_an_index_of_no_row_gives_token_0_that_is_not_valid(dtype: torch.dtype) -> None:
    probs = torch.eye(4, dtype=torch.float32, device="cpu")[1:]
    indices = torch.tensor([2, 3, -1, 0, torch.iinfo(dtype).max], dtype=dtype, device="cpu")
    for sample, filters in (
        (flashinfer.sampling_from_probs, ()),
        (flashinfer.top_k_sampling_from_probs, (torch.full((3,), 2, dtype=torch.int32, device="cpu"),)),
    ):
        with NoHostRead():
            tokens, valid = sample(probs, *filters, indices, return_valid=True)
        assert (tokens.tolist(), tokens.dtype) == ([3, 0, 0, 1, 0], dtype)
        assert valid.tolist() == [True, False, False, True, False]
    assert flashinfer.sampling_from_logits(probs, indices).tolist()[1:3] == [0, 0]
    with pytest.raises(ValueError, match=r"indices has shape \[5\]; legal for no rows: \[0\]"):
        flashinfer.sampling_from_probs(probs[:0], indices)
