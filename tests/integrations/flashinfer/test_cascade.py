"""FlashInfer's merges: attention over parts of the keys, merged, is attention over all of them."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from torch import Tensor

from fastllama.integrations.flashinfer.cascade import merge_state, merge_state_in_place, merge_states
from tests.integrations.flashinfer.batches import attend, check
from tests.integrations.flashinfer.calls import CALLS, NoHostRead, half_unit
from tests.integrations.flashinfer.conftest import Library


def parts(
    count: int, tokens: int = 3, heads: int = 4, dim: int = 64, device: str | torch.device = "cpu"
) -> tuple[Tensor, list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Queries, their attention over each of some parts of the keys, in fp64, and over all keys."""
    q, k, v = (torch.randn(n, heads, dim, dtype=torch.float64, device=device) for n in (tokens, 5 * count, 5 * count))
    found = [attend(q, k[i : i + 5], v[i : i + 5], 0.2, False) for i in range(0, 5 * count, 5)]
    return q, found, attend(q, k, v, 0.2, False)


def test_two_parts_are_all_keys(library: Library) -> None:
    _, given, whole = parts(2, device=library.device)
    (a, s_a), (b, s_b) = ((v.half(), s.float()) for v, s in given)
    check(library.module.merge_state(a, s_a, b, s_b), whole, 4.0)


def test_in_place_both_are_written_and_a_mask_leaves_rows_as_they_are(library: Library) -> None:
    _, given, whole = parts(2, device=library.device)
    (a, s_a), (b, s_b) = ((v.half(), s.float()) for v, s in given)
    v, s = a.clone(), s_a.clone()
    library.module.merge_state_in_place(v, s, b, s_b)
    check((v, s), whole, 4.0)
    v, s = a.clone(), s_a.clone()
    library.module.merge_state_in_place(v, s, b, s_b, torch.tensor([True, False, True], device=library.device))
    check((v[::2], s[::2]), (whole[0][::2], whole[1][::2]), 4.0)
    assert torch.equal(v[1], a[1])
    assert torch.equal(s[1], s_a[1])


def test_many_parts_are_all_keys(library: Library) -> None:
    _, given, whole = parts(7, device=library.device)
    v, s = torch.stack([v.half() for v, _ in given], 1), torch.stack([s.float() for _, s in given], 1)
    check(library.module.merge_states(v, s), whole, 4.0)


@pytest.mark.parametrize("mark", [-math.inf, math.inf], ids=["-inf", "+inf"])
def test_a_part_that_saw_no_key_is_not_looked_at(mark: float) -> None:
    _, ((a, s_a), _, (c, s_c)), _ = parts(3)
    nothing, s_nothing = torch.full_like(a, math.nan), torch.full_like(s_a, mark)
    out, lse = merge_state(a, s_a, nothing, s_nothing)
    assert torch.equal(out, a)
    assert torch.equal(lse, s_a)
    found = merge_states(torch.stack((a, nothing, c), 1), torch.stack((s_a, s_nothing, s_c), 1))
    check(found, merge_state(a, s_a, c, s_c), 4.0)
    for out, lse in (
        merge_state(nothing, s_nothing, nothing, s_nothing),
        merge_states(torch.stack((nothing, nothing), 1), torch.stack((s_nothing, s_nothing), 1)),
    ):
        assert not out.any()
        assert (lse == -math.inf).all()


def test_a_masked_row_stays_whatever_it_holds() -> None:
    v, s = torch.full((1, 2, 4), math.nan, dtype=torch.float32), torch.full((1, 2), math.inf, dtype=torch.float32)
    merge_state_in_place(v, s, torch.ones_like(v), torch.ones_like(s), torch.tensor([False]))
    assert v.isnan().all()
    assert (s == math.inf).all()


@CALLS
def test_any_legal_merge_is_attention_over_all_keys(calls: int) -> None:
    random = Random(2)
    for _ in range(calls):
        count = random.randrange(1, 5)
        dtype = random.choice([torch.float64, torch.float32, torch.float16])
        _, given, whole = parts(count, random.randrange(1, 4), random.randrange(1, 4), random.choice([1, 3, 8]))
        wide = torch.promote_types(dtype, torch.float32)
        given = [(v.to(dtype), s.to(wide)) for v, s in given]
        with NoHostRead():
            states = torch.stack([v for v, _ in given], 1), torch.stack([s for _, s in given], 1)
            found = [merge_states(*states)]
            v, s = (x.clone() for x in given[0])
            mask = random.choice([None, torch.ones(v.shape[0], dtype=torch.bool)])
            pair = given[0]
            for each in given[1:]:
                merge_state_in_place(v, s, *each, mask)
                pair = merge_state(*pair, *each)
        largest = count * max(float(each.abs().max()) for each, _ in given)  # in turn, each merge rounds again
        for each in (*found, (v, s), pair):
            check(each, whole, largest)


def test_illegal_merges_write_nothing() -> None:
    _, ((v, s), (b, s_b)), _ = parts(2)
    before = v.clone(), s.clone()
    with pytest.raises(TypeError, match=r"s has dtype torch\.float32; legal: torch\.float64"):
        merge_state_in_place(v, s.float(), b, s_b)
    with pytest.raises(ValueError, match=r"mask has shape \[2\]; legal: \[3\]"):
        merge_state_in_place(v, s, b, s_b, torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask has dtype torch\.int64; legal: torch\.bool"):
        merge_state_in_place(v, s, b, s_b, torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="b has shape"):
        merge_state_in_place(v, s, b[:2], s_b)
    assert torch.equal(v, before[0])
    assert torch.equal(s, before[1])
    with pytest.raises(ValueError, match="N at least 1"):
        merge_states(v[:, None][:, :0], s[:, None][:, :0])
    with pytest.raises(ValueError, match="s has shape"):
        merge_states(v[:, None], s)


def test_many_merges_round_once() -> None:
    """One by one, each of 40 merges would round: an error of several units of the last place."""
    _, given, _ = parts(40)
    states = torch.stack([v.bfloat16() for v, _ in given], 1), torch.stack([s.float() for _, s in given], 1)
    exact, _ = merge_states(states[0].double(), states[1].double())
    error = (merge_states(*states)[0].double() - exact).abs()
    assert (error <= exact.abs() * half_unit(torch.bfloat16) * 1.01 + 1e-6).all()


def test_many_are_merged_in_fp32_under_autocast_too() -> None:
    _, given, _ = parts(3)
    states = torch.stack([v.float() for v, _ in given], 1), torch.stack([s.float() for _, s in given], 1)
    expected = merge_states(*states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = merge_states(*states)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
