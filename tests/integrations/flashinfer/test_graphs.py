"""FlashInfer's wrappers in CUDA-graph mode: a recorded run follows the latest plan.

A recording of our ops (kernels/dispatch/recording.py) stands for the graph: it holds the tensors of its calls, and
calls nothing of the wrapper again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllama.integrations.flashinfer.decode import (
    BatchDecodeWithPagedKVCacheWrapper,
    CUDAGraphBatchDecodeWithPagedKVCacheWrapper,
    fast_decode_plan,
)
from fastllama.integrations.flashinfer.prefill import (
    BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
)
from fastllama.kernels.dispatch.recording import Recording, record
from tests.integrations.flashinfer.batches import CPU, Batch, bounds, check, workspace
from tests.integrations.flashinfer.calls import NoHostRead

DTYPES = {"q_data_type": "float64", "kv_data_type": "float64"}


def buffer(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device="cpu")


def decode_wrapper(batch_size: int, pages: int) -> CUDAGraphBatchDecodeWithPagedKVCacheWrapper:
    return CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
        workspace(), buffer(batch_size + 1), buffer(pages), buffer(batch_size)
    )


def prefill_wrapper(batch_size: int, pages: int) -> BatchPrefillWithPagedKVCacheWrapper:
    buffers = (buffer(batch_size + 1), buffer(batch_size + 1), buffer(pages), buffer(batch_size))
    return BatchPrefillWithPagedKVCacheWrapper(workspace(), "NHD", True, *buffers)


def csr(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.indptr, batch.indices, batch.last_page_len


def into(batch: Batch, cache: tuple[Tensor, Tensor]) -> None:
    """Put a batch's cache where a recording reads."""
    for fixed, held in zip(cache, batch.cache, strict=True):
        fixed[: held.shape[0]] = held


def recorded(run: Any) -> tuple[tuple[Tensor, Tensor], Recording]:
    found, recording = record(run, CPU, [])
    assert recording.replayable  # nothing but ops of ours, views and allocations
    return found, recording


def test_a_recorded_decode_replays_with_a_new_plan() -> None:
    cache = tuple(torch.zeros(20, 4, 2, 8, dtype=torch.float64) for _ in range(2))
    decode, q = decode_wrapper(3, 18), torch.zeros(3, 4, 8, dtype=torch.float64)
    recording = None
    for lengths in ([3, 9, 1], [24, 1, 1], [0, 5, 24], [1, 1, 1]):
        batch = Batch(lengths, index_dtype=torch.int64)
        into(batch, cache)
        q.copy_(batch.queries([1, 1, 1]))
        decode.plan(*csr(batch), *batch.sizes, **DTYPES)
        if recording is None:
            found, recording = recorded(lambda: decode.run(q, cache, return_lse=True))
        else:
            recording.replay()
        check(found, batch.expected(q, [1, 1, 1]))


def test_a_recorded_prefill_replays_with_a_new_plan_of_fewer_rows() -> None:
    cache = tuple(torch.zeros(20, 4, 2, 8, dtype=torch.float64) for _ in range(2))
    prefill, q = prefill_wrapper(2, 16), torch.zeros(7, 4, 8, dtype=torch.float64)
    recording = None
    for lengths, counts in (([9, 5], [4, 3]), ([3, 29], [1, 6]), ([30, 2], [3, 1])):
        batch = Batch(lengths)
        into(batch, cache)
        q[: sum(counts)] = batch.queries(counts)
        prefill.plan(bounds(counts), *csr(batch), *batch.sizes, causal=True, **DTYPES)
        if recording is None:
            found, recording = recorded(lambda: prefill.run(q, cache, return_lse=True))
        else:
            recording.replay()
        rows = sum(counts)
        check((found[0][:rows], found[1][:rows]), batch.expected(q[:rows], counts))
        assert not found[0][rows:].any()  # of no sequence


def test_a_recorded_ragged_prefill_replays_with_a_new_plan() -> None:
    prefill = BatchPrefillWithRaggedKVCacheWrapper(workspace(), "NHD", True, buffer(3), buffer(3))
    q, k, v = (torch.zeros(n, heads, 8, dtype=torch.float64) for n, heads in ((7, 4), (14, 2), (14, 2)))
    recording = None
    for lengths, counts in (([9, 5], [4, 3]), ([1, 13], [1, 6])):
        batch = Batch(lengths)
        for fixed, new in ((q, batch.queries(counts)), (k, torch.cat(batch.k)), (v, torch.cat(batch.v))):
            fixed.copy_(new)
        prefill.plan(bounds(counts), bounds(lengths), *batch.sizes[:3], causal=True, q_data_type="float64")
        if recording is None:
            found, recording = recorded(lambda: prefill.run(q, k, v, return_lse=True))
        else:
            recording.replay()
        check(found, batch.expected(q, counts))


def test_indices_may_be_the_buffer_itself() -> None:
    """SGLang writes there, passes the whole buffer, and puts fast_decode_plan into begin_forward's place."""
    decode, batch = decode_wrapper(2, 12), Batch([3, 5], page_size=1)
    decode.begin_forward = partial(fast_decode_plan, decode)  # type: ignore[method-assign]
    indices = decode._paged_kv_indices_buf
    assert indices is not None
    indices[:8] = batch.indices
    decode._paged_kv_indptr_buf.copy_(batch.indptr)
    ones = decode._paged_kv_last_page_len_buf.fill_(1)
    decode.begin_forward(
        decode._paged_kv_indptr_buf, indices, ones, *batch.sizes, data_type=torch.float64, q_data_type=torch.float64,
        global_override_indptr_cpu=batch.indptr,
    )  # fmt: skip
    q = batch.queries([1, 1])
    check(decode.run_return_lse(q, batch.cache), batch.expected(q, [1, 1]))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([4, 4, 4], "indptr has 3 sequences; legal in CUDA-graph mode: the 2 of the constructor's buffers"),
        ([25, 1], "indptr has 8 pages; legal in CUDA-graph mode: the 7 of the buffer, or fewer"),
        ([16, 1], "indptr has a sequence of 4 pages; legal in CUDA-graph mode: at most 3"),
    ],
)
def test_a_plan_does_not_grow_fixed_buffers(lengths: list[int], message: str) -> None:
    """The plan before stays in force."""
    batch, longer = Batch([12, 5]), Batch(lengths)
    decode, prefill, q = decode_wrapper(2, 7), prefill_wrapper(2, 7), batch.queries([1, 1])
    decode.plan(*csr(batch), *batch.sizes, **DTYPES)
    prefill.plan(bounds([1, 1]), *csr(batch), *batch.sizes, **DTYPES)
    with pytest.raises(ValueError, match=f"^{message}"):
        decode.plan(*csr(longer), *longer.sizes, **DTYPES)
    message = message.replace("indptr", "qo_indptr" if len(lengths) > 2 else "paged_kv_indptr")
    with pytest.raises(ValueError, match=f"^{message}"):
        prefill.plan(bounds([1] * len(lengths)), *csr(longer), *longer.sizes, **DTYPES)
    for wrapper in (decode, prefill):
        check(wrapper.run_return_lse(q, batch.cache), batch.expected(q, [1, 1]))


def test_a_plan_has_no_more_rows_than_the_first() -> None:
    batch = Batch([12, 5])
    prefill = prefill_wrapper(2, 7)
    prefill.plan(bounds([2, 1]), *csr(batch), *batch.sizes, **DTYPES)
    with pytest.raises(ValueError, match="qo_indptr has 4 rows; legal in CUDA-graph mode: the first plan's 3"):
        prefill.plan(bounds([2, 2]), *csr(batch), *batch.sizes, **DTYPES)
    decode = decode_wrapper(2, 7)
    decode.plan(*csr(batch), *batch.sizes, **DTYPES)
    with pytest.raises(ValueError, match="q_len_per_req is 2; legal in CUDA-graph mode: 1, as planned before"):
        decode.plan(*csr(batch), *batch.sizes, **DTYPES, q_len_per_req=2)


def test_a_run_reads_no_more_of_the_table_than_the_cache_has_pages(bind: Any) -> None:
    """A wrapper for one sequence, over a buffer for many: its kernel's grid would be as wide as the buffer."""
    batch = Batch([9, 5])  # 5 pages, and 2 that are spare
    decode, q = decode_wrapper(2, 100), batch.queries([1, 1])
    decode.plan(*csr(batch), *batch.sizes, **DTYPES)
    assert decode._page_table.shape == (2, 50)
    check(decode.run_return_lse(q, batch.cache), batch.expected(q, [1, 1]))
    longer = Batch([29, 5])  # of the next plan, which another cache is for
    decode.plan(*csr(longer), *longer.sizes, **DTYPES)
    check(decode.run_return_lse(q, longer.cache), longer.expected(q, [1, 1]))
    with pytest.raises(ValueError, match="a sequence has 8 pages; legal: the cache's 7, or fewer"):
        decode.run(q, batch.cache)
    seen: list[Any] = []
    bind("attention_decode", lambda *args: seen.append(args[3].shape))
    decode.plan(*csr(batch), *batch.sizes, **DTYPES)
    decode.run(q, batch.cache)
    assert seen == [(2, 7)]


def test_indices_may_be_more_than_the_pages_that_the_bounds_name() -> None:
    batch = Batch([12, 5])
    decode, q = decode_wrapper(2, 12), batch.queries([1, 1])
    for spare in (1, 3, 40):
        indices = torch.cat((batch.indices, batch.indices.new_full((spare,), 99)))
        decode._paged_kv_indices_buf.fill_(99)  # type: ignore[union-attr]
        decode.plan(batch.indptr, indices, batch.last_page_len, *batch.sizes, **DTYPES)
        assert decode._paged_kv_indices_buf.tolist() == batch.indices.tolist() + [99] * 7  # type: ignore[union-attr]
        check(decode.run_return_lse(q, batch.cache), batch.expected(q, [1, 1]))


def test_later_plans_have_fewer_rows_than_the_first_and_as_many_again() -> None:
    batch = Batch([12, 5])
    prefill = prefill_wrapper(2, 7)
    for counts in ([2, 2], [1, 1], [3, 1]):
        prefill.plan(bounds(counts), *csr(batch), *batch.sizes, causal=True, **DTYPES)
        q = batch.queries(counts)
        check(prefill.run_return_lse(q, batch.cache), batch.expected(q, counts))


def test_a_ragged_plan_of_fewer_keys_is_run_with_as_many() -> None:
    prefill = BatchPrefillWithRaggedKVCacheWrapper(workspace(), "NHD", True, buffer(3), buffer(3))
    for lengths in ([9, 5], [2, 3], [5, 8]):
        batch = Batch(lengths)
        q = batch.queries([1, 2])
        prefill.plan(bounds([1, 2]), bounds(lengths), *batch.sizes[:3], causal=True, q_data_type="float64")
        check(prefill.run_return_lse(q, torch.cat(batch.k), torch.cat(batch.v)), batch.expected(q, [1, 2]))


@pytest.mark.parametrize("kind", ["decode", "paged", "ragged"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_plan_made_in_inference_mode_is_followed_by_one_outside_of_it(kind: str, graph: bool) -> None:
    """Under inference mode the wrapper and its buffers may be made, too."""
    batch, counts = Batch([7, 5]), [1, 1]
    other, q = Batch([6, 8]), batch.queries([1, 1])
    held = [(torch.cat(x.k), torch.cat(x.v)) if kind == "ragged" else x.cache for x in (batch, other)]

    def plan(of: Batch) -> None:
        if kind == "decode":
            wrapper.plan(*csr(of), *of.sizes, **DTYPES)
        elif kind == "paged":
            wrapper.plan(bounds(counts), *csr(of), *of.sizes, causal=True, **DTYPES)
        else:
            wrapper.plan(bounds(counts), bounds(of.lengths), *of.sizes[:3], causal=True, **DTYPES)

    with torch.inference_mode():
        sizes = {"decode": (3, 8, 2), "paged": (3, 3, 8, 2), "ragged": (3, 3)}[kind]
        made: Any = {
            "decode": BatchDecodeWithPagedKVCacheWrapper,
            "paged": BatchPrefillWithPagedKVCacheWrapper,
            "ragged": BatchPrefillWithRaggedKVCacheWrapper,
        }[kind]
        buffers = [buffer(size) for size in sizes] if graph else []
        wrapper = made(workspace(), "NHD", graph, *([False] if kind == "decode" else []), *buffers)
        plan(batch)
        cache = held[0] if kind == "ragged" else (held[0],)
        check(wrapper.run(q, *cache, return_lse=True), batch.expected(q, counts))
    own = ("_page_table", "_seq_lens", "_int_workspace_buffer", "_pin_memory_int_workspace_buffer")
    assert not any(getattr(wrapper, name).is_inference() for name in own if hasattr(wrapper, name))
    plan(other)
    cache = held[1] if kind == "ragged" else (held[1],)
    check(wrapper.run(q, *cache, return_lse=True), other.expected(q, counts))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.zeros(3), TypeError, "has dtype torch.float32; legal: torch.int32, torch.int64"),
        (torch.zeros((), dtype=torch.int32), ValueError, "has shape"),
        ([0, 0, 0], ValueError, r"is \[0, 0, 0\]; legal in CUDA-graph mode: a tensor"),
        (torch.zeros(3, dtype=torch.int32, device="meta"), ValueError, "is on meta; legal: cpu"),
    ],
)
@pytest.mark.parametrize("name", ["indptr", "indices", "last_page_len"])
def test_fixed_buffers_are_integers_where_the_workspace_is(
    name: str, given: Any, error: type[Exception], message: str
) -> None:
    buffers: dict[str, Any] = {"indptr": buffer(4), "indices": buffer(9), "last_page_len": buffer(3)}
    if name == "indptr" and isinstance(given, Tensor) and given.dim():
        given = torch.cat((given, given[:1]))
    buffers = {f"paged_kv_{each}_buffer": value for each, value in (buffers | {name: given}).items()}
    with pytest.raises(error, match=f"^paged_kv_{name}_buffer {message}"):
        BatchDecodeWithPagedKVCacheWrapper(workspace(), use_cuda_graph=True, **buffers)


@pytest.mark.parametrize("missing", ["indptr", "indices", "last_page_len"])
def test_fixed_buffers_are_all_given_and_of_one_batch(missing: str) -> None:
    given = {
        f"paged_kv_{name}_buffer": buffer(size) for name, size in (("indptr", 3), ("indices", 9), ("last_page_len", 2))
    }
    name = f"paged_kv_{missing}_buffer"
    with pytest.raises(ValueError, match=f"{name} is None; legal in CUDA-graph mode: a tensor"):
        BatchDecodeWithPagedKVCacheWrapper(workspace(), use_cuda_graph=True, **{**given, name: None})
    if missing == "indptr":
        with pytest.raises(ValueError, match=rf"{name} has shape \[5\]; legal: \[3\]"):
            BatchDecodeWithPagedKVCacheWrapper(workspace(), use_cuda_graph=True, **{**given, name: buffer(5)})


@pytest.mark.parametrize("kind", ["decode", "paged", "ragged"])
def test_a_compiled_run_is_one_graph_and_reads_nothing(kind: str) -> None:
    batch, counts = Batch([7, 5]), [1, 1]
    q = batch.queries(counts)
    cache: tuple[Any, ...] = (batch.cache,)
    wrapper: Any
    if kind == "decode":
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace())
        wrapper.plan(*csr(batch), *batch.sizes, **DTYPES)
    elif kind == "paged":
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace())
        wrapper.plan(bounds(counts), *csr(batch), *batch.sizes, causal=True, **DTYPES)
    else:
        wrapper, cache = BatchPrefillWithRaggedKVCacheWrapper(workspace()), (torch.cat(batch.k), torch.cat(batch.v))
        wrapper.plan(bounds(counts), bounds(batch.lengths), *batch.sizes[:3], causal=True, **DTYPES)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(q: Tensor, *cache: Any) -> tuple[Tensor, Tensor]:
        out, lse = wrapper.run(q, *cache, return_lse=True)
        return out * 2, lse

    out, lse = run(q, *cache)
    check((out / 2, lse), batch.expected(q, counts))
    with NoHostRead():
        found = wrapper.run(q, *cache, return_lse=True)
    check(found, batch.expected(q, counts))
    _, recording = recorded(lambda: wrapper.run(q, *cache, return_lse=True))
    assert len(recording._calls) == 1
