"""FlashInfer's decode wrappers and single_decode_with_kv_cache: attention of the newest tokens over paged keys."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama import kernels
from fastllama.integrations import flashinfer
from fastllama.integrations.flashinfer import tables
from fastllama.integrations.flashinfer.decode import (
    BatchDecodeWithPagedKVCacheWrapper,
    fast_decode_plan,
    single_decode_with_kv_cache,
)
from tests.integrations.flashinfer.batches import Batch, attend, check, workspace
from tests.integrations.flashinfer.calls import CALLS, NoHostRead
from tests.integrations.flashinfer.conftest import Library

ROOM = 32 * 2**20


def wrapper(**options: Any) -> BatchDecodeWithPagedKVCacheWrapper:
    return BatchDecodeWithPagedKVCacheWrapper(workspace(), **options)


def csr(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.indptr, batch.indices, batch.last_page_len


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("fused", [False, True], ids=["pair", "5-D"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_each_sequence_attends_to_its_own_pages(library: Library, layout: str, fused: bool, page_size: int) -> None:
    half, device = torch.float16, library.device
    made = {"head_dim": 64, "dtype": half, "layout": layout, "fused": fused, "page_size": page_size, "device": device}
    batch = Batch([3, 40, 17], **made)
    q = batch.queries([1, 1, 1])
    decode = library.module.BatchDecodeWithPagedKVCacheWrapper(workspace(device, ROOM), layout)
    decode.plan(*(x.to(device) for x in csr(batch)), *batch.sizes, q_data_type=half, kv_data_type=half)
    check(decode.run(q, batch.cache, return_lse=True), batch.expected(q, [1, 1, 1]))
    out, lse = torch.empty_like(q), torch.empty(3, 4, dtype=torch.float32, device=device)
    found = decode.run_return_lse(q, batch.cache, out=out, lse=lse)
    assert found[0] is out
    assert found[1] is lse
    check((out, lse), batch.expected(q, [1, 1, 1]))


def test_several_tokens_of_a_sequence_are_causal(library: Library) -> None:
    batch = Batch([5, 9], head_dim=64, dtype=torch.float16, device=library.device)
    q = batch.queries([3, 3])
    decode = library.module.BatchDecodeWithPagedKVCacheWrapper(
        workspace(library.device, ROOM), use_tensor_cores=True, backend="fa2"
    )
    decode.plan(*(x.to(library.device) for x in csr(batch)), *batch.sizes, q_len_per_req=3)
    check(decode.run(q, batch.cache, return_lse=True), batch.expected(q, [3, 3]))


def test_one_sequence_needs_no_plan(library: Library) -> None:
    q, k, v = (torch.randn(n, 64, device=library.device).half() for n in (4, 18, 18))
    k, v = k.view(9, 2, 64), v.view(9, 2, 64)
    expected = attend(q[None], k, v, 0.3, False)
    single = library.module.single_decode_with_kv_cache
    out, lse = single(q, k, v, sm_scale=0.3, return_lse=True)
    check((out, lse), (expected[0][0], expected[1][0]))
    k, v = (x.transpose(0, 1).contiguous() for x in (k, v))
    assert torch.equal(single(q, k, v, "HND", sm_scale=0.3), out)


def test_optional_arguments_of_plan_are_positional_too() -> None:
    """FlashInfer's older interface: data_type sets the dtypes that are None."""
    batch = Batch([4])
    q, decode = batch.queries([1]), wrapper()
    decode.plan(*csr(batch), *batch.sizes, "NONE", -1, 0.0, None, None, None, "float64", 0.5)
    check(decode.run_return_lse(q, batch.cache), batch.expected(q, [1], 0.5))
    decode.begin_forward(*csr(batch), *batch.sizes, data_type=torch.float64, q_data_type=torch.float64)
    check(decode.forward_return_lse(q, batch.cache, sm_scale=0.25), batch.expected(q, [1], 0.25))
    assert torch.equal(decode.forward(q, batch.cache, sm_scale=0.25), decode.run(q, batch.cache))
    decode.end_forward()


def test_bounds_that_are_on_the_host_already_are_not_copied() -> None:
    batch = Batch([4, 2, 0], page_size=1)
    decode = wrapper()
    decode.plan(*csr(batch), *batch.sizes, q_data_type="float64")
    device_bounds = batch.indptr.clone()
    q = batch.queries([1, 1, 1])
    fast_decode_plan(
        decode,
        device_bounds,
        *csr(batch)[1:],
        *batch.sizes,
        q_data_type="float64",
        global_override_indptr_cpu=batch.indptr,
    )
    check(decode.run_return_lse(q, batch.cache), batch.expected(q, [1, 1, 1]))
    with pytest.raises(ValueError, match=r"global_override_indptr_cpu has shape \[3\]; legal: \[4\]"):
        fast_decode_plan(
            decode, device_bounds, *csr(batch)[1:], *batch.sizes, global_override_indptr_cpu=batch.indptr[:3]
        )


def test_forward_without_a_scale_takes_the_default_and_not_the_plans() -> None:
    batch = Batch([4, 9])
    q, decode = batch.queries([1, 1]), wrapper()
    for forward in (decode.forward_return_lse, lambda *given: (decode.forward(*given), None)):
        decode.plan(*csr(batch), *batch.sizes, q_data_type="float64", sm_scale=0.7)
        out, lse = forward(q, batch.cache)  # type: ignore[operator]
        expected = batch.expected(q, [1, 1])
        check((out, expected[1] if lse is None else lse), expected)
    with pytest.raises(TypeError, match="sm_scale is 'x'; legal: a finite number"):
        decode.forward(q, batch.cache, sm_scale="x")  # type: ignore[arg-type]
    check(decode.run_return_lse(q, batch.cache), batch.expected(q, [1, 1]))


@pytest.mark.parametrize("planned", [1, 3])
def test_a_run_may_have_another_number_of_queries_than_planned(planned: int) -> None:
    batch, decode = Batch([4, 9]), wrapper()
    decode.plan(*csr(batch), *batch.sizes, q_data_type="float64", q_len_per_req=planned)
    for counts in ([1, 1], [2, 2], [4, 4]):
        q = batch.queries(counts)
        check(decode.run_return_lse(q, batch.cache, q_len_per_req=counts[0]), batch.expected(q, counts))
    for rows in (0, 3):
        with pytest.raises(ValueError, match=r"q has shape .*; legal: \[2 \* Q, 4, 8\], Q at least 1"):
            decode.run(batch.queries([rows]), batch.cache)


@pytest.mark.parametrize("graph", [None, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("wrong", [2**32, -(2**32), 2**62])
def test_a_page_past_int32_gives_nan(wrong: int, graph: torch.dtype | None) -> None:
    """An index is not truncated to its low 32 bits."""
    batch = Batch([4, 9], index_dtype=torch.int64)
    buffers = [torch.zeros(size, dtype=graph) for size in (3, 9, 2)] if graph else []
    decode = BatchDecodeWithPagedKVCacheWrapper(workspace(), "NHD", bool(buffers), False, *buffers)
    batch.indices[0] += wrong
    decode.plan(*csr(batch), *batch.sizes, q_data_type="float64")
    q = batch.queries([1, 1])
    out, lse = decode.run_return_lse(q, batch.cache)
    assert out[0].isnan().all()
    expected = batch.expected(q, [1, 1])
    check((out[1:], lse[1:]), (expected[0][1:], expected[1][1:]))


def test_bounds_may_begin_after_the_first_page() -> None:
    batch = Batch([4, 9, 2])
    q, decode = batch.queries([1, 1]), wrapper()
    decode.plan(batch.indptr[1:], batch.indices, batch.last_page_len[1:], *batch.sizes, q_data_type="float64")
    batch.k, batch.v = batch.k[1:], batch.v[1:]
    check(decode.run_return_lse(q, batch.cache), batch.expected(q, [1, 1]))


def test_an_8_bit_cache_is_multiplied_by_its_scales() -> None:
    batch = Batch([7, 3], dtype=torch.float32)
    q = batch.queries([1, 1])
    cache = tuple((x.clamp(-8, 8) / 0.25).to(torch.float8_e4m3fn) for x in batch.cache)
    for tokens, held in ((batch.k, cache[0]), (batch.v, cache[1])):
        for b in range(2):
            tokens[b] = held.flatten(0, 1).float()[batch.slots(b)] * 0.25
    decode = wrapper()
    decode.plan(*csr(batch), *batch.sizes, q_data_type="float32", kv_data_type="float8_e4m3fn")
    check(decode.run_return_lse(q, cache, k_scale=0.25, v_scale=0.25), batch.expected(q, [1, 1]), 32.0)
    expected = batch.expected(q, [1, 1], 4 * 8**-0.5, v_scale=4.0)
    check(decode.run_return_lse(q, cache), expected, 128.0)


@CALLS
def test_any_legal_plan_and_run_is_attention(calls: int) -> None:
    """Sizes, layouts, lengths, integer types, scales and outputs at random; the wrapper is planned anew each time."""
    random = Random(3)
    kept = {layout: wrapper(kv_layout=layout) for layout in ("NHD", "HND")}
    for _ in range(calls):
        queries, dtype = random.randrange(1, 4), random.choice([torch.float64, torch.float32])
        kv_heads = random.randrange(1, 3)
        batch = Batch(
            [random.choice([0, random.randrange(1, 20)]) for _ in range(random.randrange(5))],
            page_size=random.randrange(1, 6),
            q_heads=kv_heads * random.randrange(1, 4),
            kv_heads=kv_heads,
            head_dim=random.choice([1, 4, 8]),
            dtype=dtype,
            layout=random.choice(["NHD", "HND"]),
            fused=random.random() < 0.5,
            index_dtype=random.choice([torch.int32, torch.int64]),
            random=random,
            spare=random.randrange(1, 4),
        )
        counts = [queries] * len(batch.lengths)
        sm_scale = random.choice([None, 0.0, 0.7])
        scales = {
            name: random.choice([None, 1, 0.5, random.random() + 0.1]) for name in ("q_scale", "k_scale", "v_scale")
        }
        q, decode = batch.queries(counts), kept[batch.layout]
        indices = torch.cat((batch.indices, batch.indices.new_full((random.randrange(3),), -1)))
        decode.plan(
            batch.indptr, indices, batch.last_page_len, *batch.sizes, q_data_type=dtype, sm_scale=sm_scale,
            q_len_per_req=queries,
        )  # fmt: skip
        wide = torch.empty(*q.shape[:2], 2 * q.shape[2], dtype=dtype)
        out = random.choice([None, torch.empty_like(q), wide[..., : q.shape[2]]])
        lse = random.choice([None, torch.empty(q.shape[:2], dtype=dtype), torch.empty(q.shape[1::-1], dtype=dtype).t()])
        wanted = random.random() < 0.5
        with NoHostRead():
            found = decode.run(q, batch.cache, out=out, lse=lse, return_lse=wanted, **scales)
        scale = batch.head_dim**-0.5 if sm_scale is None else sm_scale
        k_scale, v_scale = scales["k_scale"] or 1, scales["v_scale"] or 1
        expected = batch.expected(q, counts, scale * (scales["q_scale"] or 1) * k_scale, v_scale=v_scale)
        assert isinstance(found, tuple) == wanted
        result, sums = found if isinstance(found, tuple) else (found, lse)
        assert out is None or result is out
        assert not wanted or lse is None or sums is lse
        check((result, expected[1].to(dtype) if sums is None else sums), expected)


@CALLS
def test_any_single_decode_is_attention(calls: int) -> None:
    random = Random(4)
    for _ in range(calls):
        heads, dim, dtype = (
            random.randrange(1, 3),
            random.choice([1, 4, 8]),
            random.choice([torch.float64, torch.float32]),
        )
        q = torch.randn(heads * random.randrange(1, 4), dim, dtype=dtype)
        k, v = (torch.randn(2, random.randrange(20), heads, dim, dtype=dtype)).unbind()
        layout = random.choice(["NHD", "HND"])
        given = [x if layout == "NHD" else x.transpose(0, 1).contiguous() for x in (k, v)]
        sm_scale, q_scale, k_scale, v_scale = (random.choice([None, 0.5, random.random() + 0.1]) for _ in range(4))
        with NoHostRead():
            found = single_decode_with_kv_cache(
                q, *given, layout, sm_scale=sm_scale, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=True
            )
        scale = (dim**-0.5 if sm_scale is None else sm_scale) * (q_scale or 1) * (k_scale or 1)
        out, lse = attend(q[None], k, v, scale, False)
        check(found, (out[0] * (v_scale or 1), lse[0]))  # type: ignore[arg-type]


def test_a_table_holds_each_sequences_pages_and_nothing_else_is_written() -> None:
    batch = Batch([7, 0, 12, 1], page_size=1)
    for indices in (batch.indices, batch.indices.long()):
        table = torch.full((4, 16), -1, dtype=torch.int32)
        tables.fill_page_table(table, batch.indptr.tolist(), indices)
        for b, row in enumerate(table.tolist()):
            assert row == batch.pages(b) + [-1] * (16 - batch.lengths[b])


@pytest.mark.parametrize(("room", "taken"), [(2 * 64 * 4 + 1000, True), (2 * 64 * 4 - 4, False)])
def test_scratch_memory_comes_out_of_the_workspace_where_that_is_large_enough(
    monkeypatch: pytest.MonkeyPatch, bind: Any, room: int, taken: bool
) -> None:
    """Fixed-size workspace as a Triton kernel needs it: 64 numbers for each sequence."""
    batch, seen = Batch([7, 3]), []
    q = batch.queries([1, 1])
    monkeypatch.setattr(kernels, "attention_workspace", lambda q, k, table: torch.empty(64, dtype=torch.float32))
    monkeypatch.setattr(tables, "scratch_elements", tables.scratch_elements.__wrapped__)
    bind("attention_decode", lambda *args: seen.append(args[-1]))
    buffer = workspace(size=room)
    decode = BatchDecodeWithPagedKVCacheWrapper(buffer)
    given = (*csr(batch), *batch.sizes)
    assert decode.workspace_size(*given, q_data_type="float64") == (512, 0)
    decode.plan(*given, q_data_type="float64")
    decode.run(q, batch.cache)
    (scratch,) = seen
    if taken:
        assert (scratch.dtype, scratch.numel(), scratch.data_ptr()) == (torch.float32, 128, buffer.data_ptr())
    else:
        assert scratch is None


def test_long_sequences_scratch_memory_is_that_of_a_part_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def allocate(q: Tensor, k: Tensor, table: Tensor) -> Tensor:
        measured.append(table.shape[1])
        return torch.empty(q.shape[0] * table.shape[1] // 1024, dtype=torch.float32)

    monkeypatch.setattr(kernels, "attention_workspace", allocate)
    sizes = (4, 2, 8, 16)
    found = tables.scratch_elements.__wrapped__(3, 2, *sizes, 20000, torch.float32, torch.device("cpu"))
    assert measured == [8192]  # pages of 16: 131072 tokens
    assert found == 3 * 3 * 2 * 8  # sequences, parts of such a length, queries, thousands


def test_more_queries_than_planned_get_scratch_memory_of_the_op(monkeypatch: pytest.MonkeyPatch, bind: Any) -> None:
    batch, seen = Batch([7, 3]), []
    monkeypatch.setattr(kernels, "attention_workspace", lambda q, k, table: torch.empty(64, dtype=torch.float32))
    monkeypatch.setattr(tables, "scratch_elements", tables.scratch_elements.__wrapped__)
    bind("attention_decode", lambda *args: seen.append(args[-1] is None))
    decode = wrapper()
    decode.plan(*csr(batch), *batch.sizes, q_data_type="float64", q_len_per_req=2)
    for queries in (1, 2, 3):
        decode.run(batch.queries([queries, queries]), batch.cache)
    assert seen == [False, False, True]


def test_what_stacks_read_of_a_wrapper_is_there() -> None:
    decode, batch = wrapper(), Batch([3])
    decode.plan(*csr(batch), *batch.sizes, logits_soft_cap=0.0, sm_scale=0.5)
    assert (decode._window_left, decode._logits_soft_cap, decode._sm_scale) == (-1, 0.0, 0.5)
    assert flashinfer.__version__ == "0.7.2"
    assert flashinfer.decode.get_seq_lens is flashinfer.get_seq_lens


def test_a_workspace_may_be_replaced() -> None:
    decode, other = wrapper(), workspace(size=64)
    decode.reset_workspace_buffer(other, other)
    assert decode._float_workspace_buffer is other
    assert decode._int_workspace_buffer is other
    assert decode.resolved_backend == "fastllama"
    assert not decode.use_tensor_cores
    assert not decode.is_cuda_graph_enabled
    for given in ((None, other), (other, None)):
        with pytest.raises(TypeError, match="_workspace_buffer is None; legal: a tensor"):
            decode.reset_workspace_buffer(*given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float_workspace_buffer is on meta; legal: cpu"):
        decode.reset_workspace_buffer(other.to("meta"), other)
    assert decode._float_workspace_buffer is other
