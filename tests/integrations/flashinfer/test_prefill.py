"""FlashInfer's prefill wrappers and single_prefill_with_kv_cache: many tokens over pages or packed keys."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.integrations.flashinfer.prefill import (
    BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
    single_prefill_with_kv_cache,
    single_prefill_with_kv_cache_return_lse,
)
from tests.integrations.flashinfer.batches import Batch, attend, bounds, check, workspace
from tests.integrations.flashinfer.calls import CALLS, NoHostRead
from tests.integrations.flashinfer.conftest import Library

ROOM = 64 * 2**20
LAYOUTS = pytest.mark.parametrize("layout", ["NHD", "HND"])
MASKS = pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])


def csr(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.indptr, batch.indices, batch.last_page_len


def packed(tokens: list[Tensor], layout: str, like: Tensor) -> Tensor:
    x = torch.cat(tokens) if tokens else like
    return x if layout == "NHD" else x.transpose(0, 1).contiguous()


@LAYOUTS
@MASKS
@pytest.mark.parametrize("page_size", [1, 16])
def test_new_tokens_attend_to_their_sequence_in_pages(
    library: Library, layout: str, causal: bool, page_size: int
) -> None:
    half, device = torch.float16, library.device
    batch = Batch([3, 40, 17], head_dim=64, dtype=half, layout=layout, page_size=page_size, device=device)
    counts = [3, 5, 1]
    q = batch.queries(counts)
    prefill = library.module.BatchPrefillWithPagedKVCacheWrapper(workspace(device, ROOM), layout)
    given = (bounds(counts), *csr(batch))
    prefill.plan(*(x.to(device) for x in given), *batch.sizes, causal=causal, q_data_type=half, kv_data_type=half)
    check(prefill.run(q, batch.cache, return_lse=True), batch.expected(q, counts, causal=causal))
    out, lse = torch.empty_like(q), torch.empty(9, 4, dtype=torch.float32, device=device)
    found = prefill.run_return_lse(q, batch.cache, out=out, lse=lse)
    assert found[0] is out
    assert found[1] is lse
    check((out, lse), batch.expected(q, counts, causal=causal))


@MASKS
def test_packed_tokens_attend_to_their_sequence(library: Library, causal: bool) -> None:
    half, device = torch.float16, library.device
    batch = Batch([3, 40, 17], head_dim=64, dtype=half, device=device)
    counts = [3, 5, 1]
    q = batch.queries(counts)
    prefill = library.module.BatchPrefillWithRaggedKVCacheWrapper(workspace(device, ROOM))
    given = (bounds(counts).to(device), bounds(batch.lengths).to(device))
    prefill.plan(*given, *batch.sizes[:3], causal=causal, q_data_type=half)
    found = prefill.run(q, torch.cat(batch.k), torch.cat(batch.v), return_lse=True)
    check(found, batch.expected(q, counts, causal=causal))


@LAYOUTS
@MASKS
def test_one_sequence_needs_no_plan(library: Library, layout: str, causal: bool) -> None:
    q, k, v = (torch.randn(n, 2, 64, device=library.device).half() for n in (5, 9, 9))
    given = [x if layout == "NHD" else x.transpose(0, 1).contiguous() for x in (k, v)]
    single = library.module.single_prefill_with_kv_cache_return_lse
    check(single(q, *given, causal=causal, kv_layout=layout, sm_scale=0.3), attend(q, k, v, 0.3, causal))


def test_log_sum_exps_come_in_either_base_and_layout() -> None:
    batch, counts = Batch([6, 4]), [2, 3]
    q = batch.queries(counts)
    paged, ragged = BatchPrefillWithPagedKVCacheWrapper(workspace()), BatchPrefillWithRaggedKVCacheWrapper(workspace())
    paged.plan(bounds(counts), *csr(batch), *batch.sizes, causal=True, q_data_type="float64")
    ragged.plan(bounds(counts), bounds(batch.lengths), *batch.sizes[:3], causal=True, q_data_type="float64")
    expected = batch.expected(q, counts)
    for run, cache in ((paged.run, (batch.cache,)), (ragged.run, (torch.cat(batch.k), torch.cat(batch.v)))):
        for base, unit in (("log2", 1.0), ("ln", math.log(2))):
            check(run(q, *cache, return_lse=True, lse_base=base), (expected[0], expected[1] * unit))
            out, lse = run(q, *cache, return_lse=True, lse_base=base, lse_layout="HN")
            assert lse.shape == (4, 5)
            assert lse.is_contiguous()
            check((out, lse.t()), (expected[0], expected[1] * unit))
            given = torch.empty(4, 5, dtype=torch.float64)
            assert run(q, *cache, lse=given, return_lse=True, lse_base=base, lse_layout="HN")[1] is given
            assert torch.equal(given, lse)
        with pytest.raises(ValueError, match="lse_base is 'e'"):
            run(q, *cache, lse_base="e")
        with pytest.raises(ValueError, match="lse_layout is 'TN'"):
            run(q, *cache, lse_layout="TN")


def test_the_older_names_bring_a_mask_and_a_scale_of_their_own() -> None:
    batch, counts = Batch([6, 4]), [2, 3]
    q = batch.queries(counts)
    packed_cache = torch.cat(batch.k), torch.cat(batch.v)
    paged, ragged = BatchPrefillWithPagedKVCacheWrapper(workspace()), BatchPrefillWithRaggedKVCacheWrapper(workspace())
    paged.begin_forward(bounds(counts), *csr(batch), *batch.sizes, q_data_type="float64")
    ragged.begin_forward(bounds(counts), bounds(batch.lengths), *batch.sizes[:3], q_data_type="float64")
    for causal, scale in ((True, 0.5), (False, None)):
        expected = batch.expected(q, counts, scale, causal)
        check(paged.forward_return_lse(q, batch.cache, causal, sm_scale=scale), expected)
        check(ragged.forward_return_lse(q, *packed_cache, causal, sm_scale=scale), expected)
        out = paged.forward(q, batch.cache, causal, sm_scale=scale)
        assert torch.equal(out, paged.run(q, batch.cache))
        torch.testing.assert_close(ragged.forward(q, *packed_cache, causal, sm_scale=scale), out)


@CALLS
def test_any_legal_plan_and_run_over_pages_is_attention(calls: int) -> None:
    random = Random(5)
    kept = {layout: BatchPrefillWithPagedKVCacheWrapper(workspace(), layout) for layout in ("NHD", "HND")}
    for _ in range(calls):
        batch, counts, dtype = random_batch(random)
        causal, sm_scale, scales = random_options(random, "q_scale", "k_scale", "v_scale")
        q, prefill = batch.queries(counts), kept[batch.layout]
        prefill.plan(
            bounds(counts, random.choice([torch.int32, torch.int64])), *csr(batch), *batch.sizes, causal=causal,
            sm_scale=sm_scale, q_data_type=dtype,
        )  # fmt: skip
        expected = batch.expected(
            q, counts, scale_of(batch, sm_scale, scales), causal, v_scale=scales["v_scale"] or 1.0
        )
        check_run(random, q, expected, lambda **given: prefill.run(q, batch.cache, **given, **scales))  # noqa: B023


@CALLS
def test_any_legal_plan_and_run_over_packed_keys_is_attention(calls: int) -> None:
    random = Random(6)
    kept = {layout: BatchPrefillWithRaggedKVCacheWrapper(workspace(), layout) for layout in ("NHD", "HND")}
    for _ in range(calls):
        batch, counts, dtype = random_batch(random)
        causal, sm_scale, scales = random_options(random, "q_scale", "k_scale")
        q, prefill = batch.queries(counts), kept[batch.layout]
        index = random.choice([torch.int32, torch.int64])
        prefill.plan(
            bounds(counts, index), bounds(batch.lengths), *batch.sizes[:3], causal=causal, sm_scale=sm_scale,
            q_data_type=dtype,
        )  # fmt: skip
        like = batch.normal(0, batch.kv_heads, batch.head_dim)
        k, v = (packed(tokens, batch.layout, like) for tokens in (batch.k, batch.v))
        expected = batch.expected(q, counts, scale_of(batch, sm_scale, scales), causal)
        check_run(random, q, expected, lambda **given: prefill.run(q, k, v, **given, **scales))  # noqa: B023


@CALLS
def test_any_single_prefill_is_attention(calls: int) -> None:
    random = Random(7)
    for _ in range(calls):
        batch, _, _ = random_batch(random, sequences=1)
        causal, sm_scale, scales = random_options(random, "k_scale")
        q = batch.queries([random.randrange(6)])
        k, v = (packed(tokens, batch.layout, q) for tokens in (batch.k, batch.v))
        with NoHostRead():
            found = single_prefill_with_kv_cache_return_lse(
                q, k, v, causal=causal, kv_layout=batch.layout, sm_scale=sm_scale, **scales
            )
        check(found, batch.expected(q, [q.shape[0]], scale_of(batch, sm_scale, scales), causal))


def random_batch(random: Random, sequences: int | None = None) -> tuple[Batch, list[int], torch.dtype]:
    kv_heads, dtype = random.randrange(1, 3), random.choice([torch.float64, torch.float32])
    count = random.randrange(1, 5) if sequences is None else sequences
    batch = Batch(
        [random.choice([0, random.randrange(1, 20)]) for _ in range(count)],
        page_size=random.randrange(1, 6),
        q_heads=kv_heads * random.randrange(1, 4),
        kv_heads=kv_heads,
        head_dim=random.choice([1, 4, 8]),
        dtype=dtype,
        layout=random.choice(["NHD", "HND"]),
        fused=random.random() < 0.5,
        index_dtype=random.choice([torch.int32, torch.int64]),
        random=random,
    )
    return batch, [random.choice([0, 1, random.randrange(6)]) for _ in batch.lengths], dtype


def random_options(random: Random, *names: str) -> tuple[bool, float | None, dict[str, float | None]]:
    scales = {name: random.choice([None, 1, 0.5, random.random() + 0.1]) for name in names}
    return random.random() < 0.5, random.choice([None, 0.0, 0.7]), scales


def scale_of(batch: Batch, sm_scale: float | None, scales: dict[str, float | None]) -> float:
    scale = batch.head_dim**-0.5 if sm_scale is None else sm_scale
    return scale * (scales.get("q_scale") or 1) * (scales.get("k_scale") or 1)


def check_run(random: Random, q: Tensor, expected: tuple[Tensor, Tensor], run: Any) -> None:
    """With and without output tensors, in either base and layout."""
    heads_first, base = random.random() < 0.5, random.choice(["log2", "ln"])
    shape = q.shape[1::-1] if heads_first else q.shape[:2]
    out, lse = random.choice([None, torch.empty_like(q)]), random.choice([None, torch.empty(shape, dtype=q.dtype)])
    wanted = random.random() < 0.5
    with NoHostRead():
        found = run(out=out, lse=lse, return_lse=wanted, lse_base=base, lse_layout="HN" if heads_first else "NH")
    assert isinstance(found, tuple) == wanted
    result, sums = found if wanted else (found, lse)
    assert out is None or result is out
    assert not wanted or lse is None or sums is lse
    unit = math.log(2) if base == "ln" else 1.0
    if sums is None:
        sums = (expected[1] * unit).to(q.dtype)
    elif heads_first:
        sums = sums.t()
    check((result, sums), (expected[0], expected[1] * unit))


PLAN: list[tuple[Any, type[Exception], str]] = [
    ({"qo_indptr": bounds([1, 1]) + 1}, ValueError, "qo_indptr begins at 1; legal: 0"),
    ({"qo_indptr": bounds([1, -1])}, ValueError, "qo_indptr is .* ascending"),
    ({"head_dim_vo": 4}, NotImplementedError, "head_dim_vo is 4"),
    ({"custom_mask": torch.ones(3)}, NotImplementedError, "custom_mask is a tensor"),
    ({"packed_custom_mask": torch.ones(3)}, NotImplementedError, "packed_custom_mask is a tensor"),
    ({"prefix_len_ptr": torch.ones(3)}, NotImplementedError, "prefix_len_ptr is a tensor"),
    ({"token_pos_in_items_ptr": torch.ones(3)}, NotImplementedError, "token_pos_in_items_ptr is a tensor"),
    ({"token_pos_in_items_len": 3}, NotImplementedError, "token_pos_in_items_len is 3"),
    ({"max_item_len_ptr": torch.ones(3)}, NotImplementedError, "max_item_len_ptr is a tensor"),
    ({"window_left": 3}, NotImplementedError, "window_left is 3"),
    ({"logits_soft_cap": 3.0}, NotImplementedError, r"logits_soft_cap is 3\.0"),
    ({"pos_encoding_mode": "ROPE_LLAMA"}, NotImplementedError, "pos_encoding_mode is 'ROPE_LLAMA'"),
    ({"o_data_type": "float16"}, NotImplementedError, r"o_data_type is torch\.float16"),
]
PAGED: list[tuple[Any, type[Exception], str]] = [
    ({"paged_kv_indptr": bounds([2])}, ValueError, r"paged_kv_indptr has shape \[2\]; legal: \[3\]"),
    ({"paged_kv_indptr": bounds([2, 9])}, ValueError, "ending at 11; legal: .* at most 4"),
    ({"paged_kv_last_page_len": bounds([0])}, ValueError, r"paged_kv_last_page_len\[0\] is 0"),
    ({"paged_kv_indices": torch.zeros(4)}, TypeError, "paged_kv_indices has dtype"),
]
RAGGED: list[tuple[Any, type[Exception], str]] = [
    ({"kv_indptr": bounds([7])}, ValueError, r"kv_indptr has shape \[2\]; legal: \[3\]"),
    ({"kv_indptr": bounds([7, 5]) + 1}, ValueError, "kv_indptr begins at 1"),
    ({"v_indptr": bounds([7, 5])}, NotImplementedError, "v_indptr is a tensor"),
    ({"o_indptr": bounds([7, 5])}, NotImplementedError, "o_indptr is a tensor"),
]


@pytest.mark.parametrize(("changed", "error", "message"), PLAN + PAGED)
def test_after_an_illegal_plan_of_pages_the_one_before_stands(changed: Any, error: Any, message: str) -> None:
    batch, counts = Batch([7, 5]), [1, 2]
    q, prefill = batch.queries(counts), BatchPrefillWithPagedKVCacheWrapper(workspace())
    sizes = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim_qk": 8, "page_size": 4, "q_data_type": "float64"}
    names = ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
    given = dict(zip(names, (bounds(counts), *csr(batch)), strict=True))
    prefill.plan(**given, **sizes)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        prefill.plan(**{**given, **sizes, **changed})
    check(prefill.run_return_lse(q, batch.cache), batch.expected(q, counts, causal=False))


@pytest.mark.parametrize(("changed", "error", "message"), PLAN + RAGGED)
def test_after_an_illegal_plan_of_packed_keys_the_one_before_stands(changed: Any, error: Any, message: str) -> None:
    batch, counts = Batch([7, 5]), [1, 2]
    q, prefill = batch.queries(counts), BatchPrefillWithRaggedKVCacheWrapper(workspace())
    sizes = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim_qk": 8, "q_data_type": "float64"}
    given = {"qo_indptr": bounds(counts), "kv_indptr": bounds(batch.lengths)}
    prefill.plan(**given, **sizes)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        prefill.plan(**{**given, **sizes, **changed})
    found = prefill.run_return_lse(q, torch.cat(batch.k), torch.cat(batch.v))
    check(found, batch.expected(q, counts, causal=False))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"v_scale": 2.0}, NotImplementedError, "v_scale"),
        ({"o_scale": 2.0}, NotImplementedError, "o_scale"),
        ({"k_scale": torch.ones(1)}, NotImplementedError, "k_scale is a tensor"),
        ({"kv_cache_sf": torch.ones(1)}, NotImplementedError, "kv_cache_sf is a tensor"),
        ({"out": torch.zeros(3, 4, 7, dtype=torch.float64)}, ValueError, "out has shape"),
    ],
)
def test_an_illegal_run_writes_nothing(changed: Any, error: Any, message: str) -> None:
    batch, counts = Batch([7, 5]), [1, 2]
    q, k, v = batch.queries(counts), torch.cat(batch.k), torch.cat(batch.v)
    paged, ragged = BatchPrefillWithPagedKVCacheWrapper(workspace()), BatchPrefillWithRaggedKVCacheWrapper(workspace())
    for prefill in (paged, ragged):
        with pytest.raises(RuntimeError, match=r"run was called before plan$"):
            prefill.run(q, *[batch.cache, batch.cache][: 1 if prefill is paged else 2])
    paged.plan(bounds(counts), *csr(batch), *batch.sizes, q_data_type="float64")
    ragged.plan(bounds(counts), bounds(batch.lengths), *batch.sizes[:3], q_data_type="float64")
    out = torch.full_like(q, 7.0)
    with pytest.raises(error, match=message):
        ragged.run(q, k, v, **{"out": out, **changed})
    if "k_scale" in changed or "out" in changed or "kv_cache_sf" in changed:
        with pytest.raises(error, match=message):
            paged.run(q, batch.cache, **{"out": out, **changed})
    with pytest.raises(ValueError, match=r"k has shape \[11, 2, 8\]; legal: \[12, 2, 8\]"):
        ragged.run(q, k[1:], v[1:], out=out)
    with pytest.raises(NotImplementedError, match="uses_spcompress is True"):
        paged.run(q, batch.cache, out=out, uses_spcompress=True)
    assert (out == 7).all()


@pytest.mark.parametrize("kind", [BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper])
@pytest.mark.parametrize(
    "changed",
    [{"custom_mask_buf": torch.ones(3)}, {"mask_indptr_buf": torch.ones(3)}, {"jit_args": []}, {"jit_kwargs": {}},
     {"variant_owns_mask": True}],
)  # fmt: skip
def test_a_wrapper_is_not_made_for_masks_or_kernels_of_others(kind: Any, changed: Any) -> None:
    with pytest.raises(NotImplementedError, match=next(iter(changed))):
        kind(workspace(), **changed)


@pytest.mark.parametrize(
    "changed",
    [{"scale_q": torch.ones(1)}, {"custom_mask": torch.ones(1)}, {"o_dtype": "float16"}, {"window_left": 2},
     {"v_scale": 2.0}, {"kv_cache_sf": torch.ones(1)}],
)  # fmt: skip
def test_one_sequence_has_no_mask_window_or_scales_of_heads(changed: Any) -> None:
    q = torch.zeros(3, 2, 8)
    with pytest.raises(NotImplementedError, match=next(iter(changed))):
        single_prefill_with_kv_cache(q, q, q, **changed)
