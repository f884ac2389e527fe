"""Illegal indices and lengths give defined results and touch no other memory, on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.catalogue.arguments import inputs
from fastllama.catalogue.table import small_call
from fastllama.kernels.dispatch.op import OPS
from tests.kernels.garbage import INDEXED, INT32, WRONG, garbage_calls
from tests.kernels.honest import assert_equal, backends, public

PAGE, PAGES, HEADS, KV_HEADS, DIM = 4, 6, 4, 2, 16
SEEN_BY = {"attention_prefill": 3, "attention_decode": 1}  # queries of each sequence


def everywhere(*ops: str) -> pytest.MarkDecorator:
    """Each op on each of its backends."""
    cases = [
        pytest.param(op, *(each.values if hasattr(each, "values") else (each,)), marks=getattr(each, "marks", ()))
        for op in ops
        for each in backends(op)
    ]
    return pytest.mark.parametrize(("op", "backend"), cases)


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@everywhere("embedding")
@pytest.mark.parametrize("wrong", [*WRONG, 11, 1 << 40])
def test_an_id_outside_of_the_table_gives_nan(op: str, backend: str, wrong: int) -> None:
    weight = torch.randn(11, 8)
    found = public(op, backend)(torch.tensor([3, wrong, 10]), weight)
    assert found[1].isnan().all()
    assert_equal(found[[0, 2]], weight[[3, 10]])
    assert public(op, backend)(torch.tensor([0]), weight[:0]).isnan().all()


@everywhere("rope")
@pytest.mark.parametrize("wrong", [*WRONG, 16, 1 << 40])
def test_a_position_outside_of_the_cache_turns_by_nan(op: str, backend: str, wrong: int) -> None:
    """Dimensions that are not rotated pass."""
    q, k, cache = torch.randn(3, 4, 12), torch.randn(3, 2, 12), torch.randn(16, 8)
    run = public(op, backend)
    found = run(q, k, cache, torch.tensor([5, wrong, 15]))
    expected = run(q, k, cache, torch.tensor([5, 0, 15]))
    for ours, right, given in zip(found, expected, (q, k), strict=True):
        assert_equal(ours[[0, 2]], right[[0, 2]])
        assert ours[1, :, :8].isnan().all()
        assert_equal(ours[1, :, 8:], given[1, :, 8:])
    assert run(q, k, cache[:0], torch.tensor([5, 0, 15]))[0][..., :8].isnan().all()


@everywhere("rope_and_write_kv")
@pytest.mark.parametrize("pages_dtype", [None, torch.int8])
@pytest.mark.parametrize("wrong", [*WRONG, PAGES * PAGE, 1 << 40])
def test_wrong_positions_and_slots_reach_no_other_token(
    op: str, backend: str, wrong: int, pages_dtype: torch.dtype | None
) -> None:
    """A key turned by NaN is written as NaN, a slot that the pages do not have is written nowhere."""
    qkv, cache = torch.randn(3, (HEADS + 2 * KV_HEADS) * DIM), torch.randn(16, DIM)
    pool = [torch.zeros(PAGES + 2, KV_HEADS, PAGE, DIM, dtype=pages_dtype or torch.float32) for _ in "kv"]
    scales = [torch.zeros(PAGES + 2, KV_HEADS, PAGE) for _ in "kv"] if pages_dtype else []
    within = [each[1:-1] for each in (*pool, *scales)]
    run = public(op, backend)
    q = run(qkv, cache, torch.tensor([5, wrong, 15]), torch.tensor([0, 6, wrong]), *within)
    expected = run(qkv, cache, torch.tensor([5, 0, 15]), torch.tensor([0, -1, -1]), *(each.clone() for each in within))
    assert_equal(q[[0, 2]], expected[[0, 2]])
    assert q[1].isnan().all()
    keys = within[2 if scales else 0]
    assert keys[1, :, 2].isnan().all(), "the key of the wrong position"
    written = within[0].any(-1) | (within[2] != 0 if scales else within[0].isnan().any(-1))
    assert written.any(1).nonzero().tolist() == [[0, 0], [1, 2]]
    for each in (*pool, *scales):
        assert not each[0].any()
        assert not each[-1].any()


def paged(op: str, pages_dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Two sequences of 9 and 5 tokens; the table's entries after their pages are ids that do not exist."""
    torch.manual_seed(0)
    queries = SEEN_BY[op]
    pages = [torch.randn(PAGES, KV_HEADS, PAGE, DIM) for _ in "kv"]
    call: dict[str, Any] = {"q": torch.randn(2 * queries, HEADS, DIM)}
    call |= dict(zip(("k_pages", "v_pages"), pages, strict=True))
    if pages_dtype == torch.int8:
        for side in "kv":
            call[f"{side}_pages"] = (call[f"{side}_pages"] * 30).to(torch.int8)
            call[f"{side}_scales"] = torch.rand(PAGES, KV_HEADS, PAGE)
    for name, value in call.items():
        if name != "q":
            value[0] = math.nan if value.is_floating_point() else 99  # of another sequence
    table = int32([3, 1, 4, PAGES], [5, 2, INT32.max, -1])
    call |= {"page_table": table, "seq_lens": int32(9, 5)}
    if op == "attention_prefill":
        call["cu_seqlens_q"] = int32(0, queries, 2 * queries)
    return call


@everywhere(*SEEN_BY)
@pytest.mark.parametrize("pages_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("length", [*WRONG, 17, 1 << 20])
def test_a_length_that_the_table_has_no_room_for_gives_nan(
    op: str, backend: str, length: int, pages_dtype: torch.dtype
) -> None:
    """And does not read the next sequence's row of the page table."""
    call = paged(op, pages_dtype)
    right, sums = public(op, backend)(**call, return_lse=True)
    call["seq_lens"][0] = length
    found, lse = public(op, backend)(**call, return_lse=True)
    queries = SEEN_BY[op]
    assert found[:queries].isnan().all()
    assert lse[:queries].isnan().all()
    assert_equal(found[queries:], right[queries:])
    assert_equal(lse[queries:], sums[queries:])


@everywhere(*SEEN_BY)
@pytest.mark.parametrize("pages_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("page", [*WRONG, PAGES])
def test_a_page_that_does_not_exist_gives_nan_to_the_queries_that_see_it(
    op: str, backend: str, page: int, pages_dtype: torch.dtype
) -> None:
    call = paged(op, pages_dtype)
    right, sums = public(op, backend)(**call, return_lse=True)
    call["page_table"][0, 2] = page  # of token 8 alone, which the last query sees
    found, lse = public(op, backend)(**call, return_lse=True)
    last = SEEN_BY[op] - 1
    assert found[last].isnan().all()
    assert lse[last].isnan().all()
    others = [row for row in range(2 * SEEN_BY[op]) if row != last]
    torch.testing.assert_close(found[others], right[others])
    torch.testing.assert_close(lse[others], sums[others])


@everywhere(*SEEN_BY)
def test_a_pool_without_pages_has_no_keys(op: str, backend: str) -> None:
    """Nor does a tile of them that no mask is put on."""
    call = paged(op)
    call |= {name: call[name][:0] for name in ("k_pages", "v_pages")}
    call |= {"page_table": torch.zeros(2, 80, dtype=torch.int32), "seq_lens": int32(300, 0)}
    found = public(op, backend)(**call)
    assert found[: SEEN_BY[op]].isnan().all()
    assert not found[SEEN_BY[op] :].any()


BOUNDS = [
    (0, 4, 2),
    (1, 2, 6),
    (-1, 2, 6),
    (0, 2, 7),
    (0, INT32.min, 6),
    (0, INT32.max, 6),
    (0, 3, INT32.max),
    (9, 9, 9),
]


@everywhere("attention_varlen", "attention_prefill")
@pytest.mark.parametrize("bounds", BOUNDS)
def test_bounds_that_do_not_ascend_within_the_rows_give_nan(op: str, backend: str, bounds: tuple[int, ...]) -> None:
    call = paged("attention_prefill")
    if op == "attention_varlen":
        keys = {name: torch.randn(6, KV_HEADS, DIM) for name in "kv"}
        call = {"q": call["q"], **keys, "cu_seqlens_q": int32(0, 3, 6), "cu_seqlens_k": int32(0, 3, 6)}
    for name in {"cu_seqlens_q", "cu_seqlens_k"} & set(call):
        found, lse = public(op, backend)(**(call | {name: int32(*bounds)}), return_lse=True)
        assert found.isnan().all()
        assert lse.isnan().all()


@everywhere("attention_varlen")
def test_more_bounds_than_are_read_at_once(op: str, backend: str) -> None:
    """Some sequences have no rows, and the wrong bound comes late."""
    num_seqs = 150
    rows = torch.arange(num_seqs) % 3 % 2  # 0, 1, 0, 0, 1, 0, ...
    bounds = torch.cat((torch.zeros(1), rows.cumsum(0))).int()
    q, k, v = (torch.randn(int(bounds[-1]) + 2, 1, DIM) for _ in "qkv")
    run = public(op, backend)
    found = run(q, k, v, bounds, bounds)
    torch.testing.assert_close(found[:-2], v[:-2], msg="each query sees one key")
    assert not found[-2:].any()
    bounds[140] -= 2
    assert run(q, k, v, bounds, bounds.sort().values).isnan().all()


@everywhere(*INDEXED)
def test_every_backend_makes_the_same_of_garbage(op: str, backend: str) -> None:
    """In the interpreter, every access is checked as well."""
    for theirs in garbage_calls(op):
        ours = {name: value.clone() if isinstance(value, Tensor) else value for name, value in theirs.items()}
        expected, found = public(op, "reference")(**theirs), public(op, backend)(**ours)
        written = [(value, ours[name]) for name, value in theirs.items() if isinstance(value, Tensor)]
        for right, result in (*pairs(expected, found), *written):
            torch.testing.assert_close(result, right, rtol=1e-4, atol=1e-5, equal_nan=True)


def pairs(expected: Any, found: Any) -> list[tuple[Tensor, Tensor]]:
    if expected is None:
        return []
    if isinstance(expected, Tensor):
        return [(expected, found)]
    return [*zip(expected, found, strict=True)]


@pytest.mark.parametrize(
    ("op", "name", "wrong", "message"),
    [
        ("embedding", "ids", [0, 9, 1], r"^ids\[1\] is 9; legal: from 0 to 5$"),
        ("rope", "positions", [0, 1, -1], r"^positions\[2\] is -1; legal: from 0 to 15$"),
        ("rope_and_write_kv", "positions", [0, 16, 1], r"^positions\[1\] is 16; legal: from 0 to 15$"),
        ("rope_and_write_kv", "slots", [-7, 35, 1], r"^slots\[1\] is 35; legal: from 0 to 34$"),
        ("write_kv", "slots", [-7, 35, 1], r"^slots\[1\] is 35; legal: from 0 to 34$"),
        ("adjust_logits", "slots", [-7, 4, 1], r"^slots\[1\] is 4; legal: from 0 to 3$"),
        ("adjust_logits", "starts", [0, -1, 1], r"^starts\[1\] is -1; legal: from 0 to 6$"),
        ("adjust_logits", "ends", [0, 6, 7], r"^ends\[2\] is 7; legal: from 0 to 6$"),
        ("attention_decode", "seq_lens", [3, 15, 0], r"^seq_lens\[1\] is 15; legal: from 0 to 14$"),
        ("attention_prefill", "seq_lens", [3, 2, -1], r"^seq_lens\[2\] is -1; legal: from 0 to 14$"),
        (
            "attention_prefill",
            "cu_seqlens_q",
            [0, 2, 1, 3],
            r"^cu_seqlens_q is \[0, 2, 1, 3\]; legal: ascending from 0",
        ),
        ("attention_varlen", "cu_seqlens_k", [1, 2, 3, 3], r"^cu_seqlens_k is \[1, 2, 3, 3\]; legal: ascending from 0"),
    ],
)
def test_on_the_host_they_are_errors_where_that_is_asked_for(
    op: str,
    name: str,
    wrong: list[int],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    force: Callable[[str], None],
) -> None:
    call = inputs(op, small_call(op))
    monkeypatch.setenv("FASTLLAMA_CHECK", "1")
    force("auto")
    getattr(kernels, op)(**call)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            getattr(kernels, op)(**(call | {name: torch.tensor(wrong, dtype=call[name].dtype)}))


def test_a_page_that_does_not_exist_is_an_error_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, force: Callable[[str], None]
) -> None:
    """Among the pages that a length reaches: entries after them may be anything."""
    monkeypatch.setenv("FASTLLAMA_CHECK", "1")
    force("auto")
    call = paged("attention_decode")
    kernels.attention_decode(**call)
    call["page_table"][1, 1] = PAGES
    with pytest.raises(ValueError, match=rf"^page_table\[1, 1\] is {PAGES}; legal: from 0 to {PAGES - 1}$"):
        kernels.attention_decode(**call)


def test_every_op_with_indices_has_a_check_of_them() -> None:
    assert set(INDEXED) == {op for op in OPS if OPS[op]._values}
