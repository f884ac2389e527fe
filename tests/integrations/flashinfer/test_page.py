"""FlashInfer's page helpers: lengths, positions of new tokens, and the slots that are written."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch

from fastllama.integrations.flashinfer.page import append_paged_kv_cache, get_batch_indices_positions, get_seq_lens
from tests.integrations.flashinfer.batches import Batch, bounds
from tests.integrations.flashinfer.calls import CALLS, NoHostRead
from tests.integrations.flashinfer.conftest import Library


def test_lengths_are_full_pages_and_what_the_last_one_holds(library: Library) -> None:
    indptr = torch.tensor([0, 3, 4, 4], dtype=torch.int32, device=library.device)
    last = torch.tensor([2, 16, 0], dtype=torch.int32, device=library.device)
    assert library.module.get_seq_lens(indptr, last, 16).tolist() == [34, 16, 0]


def test_new_tokens_stand_at_the_ends_of_their_sequences(library: Library) -> None:
    append, lengths = (torch.tensor(x, dtype=torch.int32, device=library.device) for x in ([0, 2, 2, 5], [2, 7, 9]))
    indices, positions = library.module.get_batch_indices_positions(append, lengths, 5)
    assert (indices.tolist(), positions.tolist()) == ([0, 0, 2, 2, 2], [0, 1, 6, 7, 8])
    assert indices.dtype == positions.dtype == torch.int32


def test_tokens_of_no_sequence_have_no_place() -> None:
    outputs = [torch.full((6,), 7, dtype=torch.int32, device="cpu") for _ in range(2)]
    append, lengths = torch.tensor([1, 3, 4], device="cpu"), torch.tensor([5, 5], device="cpu")
    found = get_batch_indices_positions(append, lengths, 6, *outputs)
    assert [x.tolist() for x in outputs] == [[-1, 0, 0, 1, -1, -1], [0, 3, 4, 4, 0, 0]]
    assert all(a is b for a, b in zip(found, outputs, strict=True))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("fused", [False, True], ids=["pair", "5-D"])
def test_keys_and_values_are_appended_to_their_pages(library: Library, layout: str, fused: bool) -> None:
    made = {"head_dim": 64, "dtype": torch.float16, "device": library.device, "layout": layout, "fused": fused}
    batch = Batch([5, 9, 4], **made)
    wanted = Batch([5, 9, 4], **made)
    wanted.k, wanted.v = batch.k, batch.v
    cache = batch.cache if fused else torch.stack(batch.cache, 1)
    expected = cache.clone()
    cache.fill_(100.0)
    device = library.device
    csr = [x.to(device) for x in (batch.indices, batch.indptr, batch.last_page_len)]
    indptr = bounds([5, 9, 4]).to(device)
    lengths = library.module.get_seq_lens(csr[1], csr[2], batch.page_size)
    of = library.module.get_batch_indices_positions(indptr, lengths, 18)
    given = cache if fused else (cache[:, 0], cache[:, 1])
    library.module.append_paged_kv_cache(torch.cat(batch.k), torch.cat(batch.v), *of, given, *csr, layout)
    assert torch.equal(cache, expected)


def test_tokens_without_a_page_are_not_written() -> None:
    """Tokens of no sequence, before the first position, and past the sequence's pages, where another's begin."""
    batch = Batch([4, 4])
    before = [x.clone() for x in batch.cache]
    k, v = batch.normal(4, 2, 8), batch.normal(4, 2, 8)
    of, positions = torch.tensor([-1, 2, 0, 0], device="cpu"), torch.tensor([0, 0, -1, 4], device="cpu")
    append_paged_kv_cache(k, v, of, positions, batch.cache, batch.indices, batch.indptr, batch.last_page_len)
    for indices in (batch.indices[:1], batch.indices[:0]):  # fewer than the bounds cover
        csr = indices, batch.indptr, batch.last_page_len
        append_paged_kv_cache(k, v, torch.ones_like(of), torch.arange(4, device="cpu"), batch.cache, *csr)
    assert all(torch.equal(a, b) for a, b in zip(batch.cache, before, strict=True))


@pytest.mark.parametrize(
    ("indices", "indptr", "position"),
    [
        ([5, 2, 4, 1], [-1, 1, 4], 0),  # the last page of all
        ([5, 2, 4, 1], [-1, 1, 4], 4),
        ([2**62, 1], [0, 1, 2], 0),  # times the page size 0 in 64 bits
        ([2**62 + 1, 1], [0, 1, 2], 0),
        ([6, 1], [0, 1, 2], 0),
        ([-1, 1], [0, 1, 2], 1),
        ([5, 2, 4, 1], [3, 2, 4], 0),
        ([5, 2, 4, 1], [0, 2, 4], 2**63 - 1),
        ([5, 2, 4, 1], [1, 2**62, 4], 2**63 - 1),
    ],
)
@pytest.mark.parametrize("page_size", [4, 1])
def test_a_wrong_bound_or_page_writes_nothing(
    indices: list[int], indptr: list[int], position: int, page_size: int
) -> None:
    """Least of all into a page of another sequence."""
    k, v = torch.zeros(2, 6, page_size, 2, 8, dtype=torch.float32, device="cpu")
    new = torch.ones(1, 2, 8, dtype=torch.float32, device="cpu")
    of, positions, *csr = (torch.tensor(x, dtype=torch.int64, device="cpu") for x in ([0], [position], indices, indptr))
    append_paged_kv_cache(new, new, of, positions, (k, v), *csr, torch.ones_like(of))
    assert not k.any()
    assert not v.any()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_keys_of_8_bits_are_appended_as_they_are(dtype: torch.dtype) -> None:
    bits = torch.arange(256, dtype=torch.int32, device="cpu").to(torch.uint8)
    bits[128 if dtype == torch.int8 else 255] = 127  # -128, and a second NaN, have no place of their own
    keys, values = bits.view(dtype).view(2, 2, 64), bits.flip(0).view(dtype).view(2, 2, 64)
    cache = tuple(torch.zeros(1, 4, 2, 64, dtype=torch.float32, device="cpu").to(dtype) for _ in range(2))
    of, positions = get_batch_indices_positions(bounds([2]), bounds([2])[1:], 2)
    append_paged_kv_cache(
        keys, values, of, positions, cache, *(torch.tensor(x, device="cpu") for x in ([0], [0, 1], [2]))
    )
    for held, given in zip(cache, (keys, values), strict=True):
        assert torch.equal(held[0, :2].view(torch.uint8), given.view(torch.uint8))


def test_an_fp8_cache_takes_rounded_keys() -> None:
    batch = Batch([3], dtype=torch.float32)
    cache = tuple(x.to(torch.float8_e4m3fn) for x in batch.cache)
    k, v = batch.normal(3, 2, 8), batch.normal(3, 2, 8)
    of, positions = get_batch_indices_positions(bounds([3]), bounds([3])[1:], 3)
    append_paged_kv_cache(k, v, of, positions, cache, batch.indices, batch.indptr, batch.last_page_len)
    slots = batch.slots(0)
    for held, tokens in zip(cache, (k, v), strict=True):
        assert torch.equal(held.flatten(0, 1).float()[slots], tokens.to(torch.float8_e4m3fn).float())


@CALLS
def test_any_legal_append_writes_its_slots_and_no_other(calls: int) -> None:
    random = Random(1)
    for _ in range(calls):
        lengths = [random.randrange(12) for _ in range(random.randrange(1, 5))]
        dtypes = [random.choice([torch.int32, torch.int64]) for _ in range(3)]
        batch = Batch(
            lengths,
            page_size=random.randrange(1, 6),
            dtype=random.choice([torch.float32, torch.bfloat16]),
            layout=random.choice(["NHD", "HND"]),
            fused=random.random() < 0.5,
            random=random,
            index_dtype=dtypes[0],
        )
        counts = [random.randrange(length + 1) for length in lengths]
        expected = [x.clone() for x in (batch.cache.unbind(1) if batch.fused else batch.cache)]
        k, v = (batch.normal(sum(counts), 2, 8) for _ in range(2))
        for pages, tokens in zip(expected, (k, v), strict=True):
            flat = pages if batch.layout == "NHD" else pages.transpose(1, 2)
            for b, new in enumerate(tokens.split(counts)):
                for slot, row in zip(batch.slots(b)[lengths[b] - counts[b] :].tolist(), new, strict=True):
                    flat[slot // batch.page_size, slot % batch.page_size] = row
        with NoHostRead():
            of, positions = get_batch_indices_positions(
                bounds(counts, dtypes[1]), torch.tensor(lengths, dtype=dtypes[2], device="cpu"), sum(counts)
            )
            csr = batch.indices, batch.indptr, batch.last_page_len
            append_paged_kv_cache(k, v, of, positions, batch.cache, *csr, batch.layout)
        found = batch.cache.unbind(1) if batch.fused else batch.cache
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"kv_layout": "HDN"}, ValueError, "kv_layout is 'HDN'"),
        ({"positions": torch.zeros(2, dtype=torch.int32)}, ValueError, r"positions has shape \[2\]; legal: \[3\]"),
        ({"append_value": torch.zeros(3, 2, 4, dtype=torch.float64)}, ValueError, "append_value has shape"),
        ({"append_key": torch.zeros(3, 2, 8, dtype=torch.int32)}, TypeError, "append_key has dtype"),
        ({"paged_kv_cache": torch.zeros(3, 4, 2, 8)}, ValueError, "paged_kv_cache has shape"),
        ({"paged_kv_cache": None}, TypeError, "paged_kv_cache is of type NoneType"),
        (
            {"paged_kv_cache": (torch.zeros(3, 4, 2, 8, dtype=torch.int8),) * 2},
            TypeError,
            "append_key has dtype torch.float64; legal: torch.int8",
        ),
        *[
            ({name: [0]}, TypeError, rf"{name} is \[0\]; legal: a tensor")
            for name in ("append_key", "append_value", "batch_indices", "positions", "kv_indices", "kv_indptr")
        ],
        *[
            (
                {name: torch.zeros(3, dtype=torch.float32)},
                TypeError,
                f"{name} has dtype torch.float32; legal: torch.int32",
            )
            for name in ("batch_indices", "positions", "kv_indices", "kv_indptr")
        ],
    ],
)
def test_an_illegal_append_writes_nothing(changed: dict[str, object], error: type[Exception], message: str) -> None:
    batch = Batch([3])
    before = [x.clone() for x in batch.cache]
    of, positions = get_batch_indices_positions(bounds([3]), bounds([3])[1:], 3)
    given = {
        "append_key": batch.normal(3, 2, 8),
        "append_value": batch.normal(3, 2, 8),
        "batch_indices": of,
        "positions": positions,
        "paged_kv_cache": batch.cache,
        "kv_indices": batch.indices,
        "kv_indptr": batch.indptr,
        "kv_last_page_len": batch.last_page_len,
    }
    with pytest.raises(error, match=message):
        append_paged_kv_cache(**{**given, **changed})  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(batch.cache, before, strict=True))


@pytest.mark.parametrize("name", ["batch_indices", "positions"])
def test_outputs_of_another_shape_or_dtype_are_refused(name: str) -> None:
    append = bounds([2, 3])
    with pytest.raises(ValueError, match=rf"{name} has shape \[4\]; legal: \[5\]"):
        get_batch_indices_positions(append, append[1:], 5, **{name: torch.zeros(4, dtype=torch.int32)})
    with pytest.raises(TypeError, match=f"{name} has dtype torch.int64; legal: torch.int32"):
        get_batch_indices_positions(append, append[1:], 5, **{name: torch.zeros(5, dtype=torch.int64)})


@pytest.mark.parametrize(("nnz", "error"), [(-1, ValueError), (3.0, TypeError), (None, TypeError)])
def test_a_count_of_new_tokens_is_an_integer(nnz: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"nnz is {nnz}; legal: "):
        get_batch_indices_positions(bounds([2, 3]), bounds([2, 3])[1:], nnz)


@pytest.mark.parametrize(("page_size", "error"), [(0, ValueError), (2.0, TypeError)])
def test_lengths_are_of_a_page_size_that_is_an_integer(page_size: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"page_size is {page_size}; legal: "):
        get_seq_lens(bounds([2, 3]), bounds([1])[:2], page_size)
