"""FlashInfer's `page`: sequence lengths, positions of new tokens, and appending their keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.errors import check_dtype, check_shape
from fastllama.integrations.flashinfer.checks import check_indices, check_integer, check_optional, check_tensors
from fastllama.integrations.flashinfer.layouts import Cache, as_pages, check_layout
from fastllama.kernels.dispatch.checks import CODES, FLOATS


def get_seq_lens(kv_indptr: Tensor, kv_last_page_len: Tensor, page_size: int) -> Tensor:
    """Length of each sequence, [B]: its full pages, plus the tokens in the last page."""
    check_tensors(kv_indptr=kv_indptr, kv_last_page_len=kv_last_page_len)
    check_shape("kv_indptr", kv_indptr, ("B + 1",))
    check_shape("kv_last_page_len", kv_last_page_len, (max(kv_indptr.shape[0] - 1, 0),))
    check_integer("page_size", page_size, 1)
    return (kv_indptr[1:] - kv_indptr[:-1] - 1).clamp(min=0) * page_size + kv_last_page_len


def get_batch_indices_positions(
    append_indptr: Tensor,
    seq_lens: Tensor,
    nnz: int,
    batch_indices: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sequence and position of each of `nnz` new tokens, which are the last ones of their sequences.

    append_indptr: [B + 1], bounds of each sequence's new tokens. seq_lens: [B], tokens of each, new ones included.
    batch_indices, positions: [nnz] int32, written where they are given. Returns both; a token of no sequence has the
    index -1 and the position 0. Computed on append_indptr's device, without a copy to the host.
    """
    check_indices(append_indptr=append_indptr, seq_lens=seq_lens)
    check_shape("append_indptr", append_indptr, ("B + 1",))
    check_shape("seq_lens", seq_lens, (append_indptr.shape[0] - 1,))
    check_integer("nnz", nnz, 0)
    check_optional(batch_indices=batch_indices, positions=positions)
    for name, given in (("batch_indices", batch_indices), ("positions", positions)):
        if given is not None:
            check_shape(name, given, (nnz,))
            check_dtype(name, given, (torch.int32,))
    device = append_indptr.device
    ends, rows = append_indptr[1:], torch.arange(nnz, dtype=append_indptr.dtype, device=device)
    owner = torch.searchsorted(ends, rows, right=True)  # the first sequence that ends after the row
    if not seq_lens.shape[0]:
        found, places = torch.full_like(owner, -1), torch.zeros_like(owner)
    else:
        inside = (owner < seq_lens.shape[0]) & (rows >= append_indptr[0])
        of = owner.clamp(max=seq_lens.shape[0] - 1)
        found = torch.where(inside, owner, -1)
        places = torch.where(inside, rows - ends[of] + seq_lens.to(device, non_blocking=True)[of], 0)
    return _into(batch_indices, found), _into(positions, places)


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    return result.to(torch.int32) if out is None else out.copy_(result)


def append_paged_kv_cache(
    append_key: Tensor,
    append_value: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    paged_kv_cache: Cache,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Write new keys and values [T, Hkv, D] at the positions of `get_batch_indices_positions`.

    The pages of each sequence, kv_indices[kv_indptr[b] : kv_indptr[b + 1]], must already include room for them. A token
    of no sequence (index -1), or beyond its sequence's pages, is not written. kv_last_page_len is not read: positions
    imply it. Keys have the cache's dtype; for a cache of float8_e4m3fn any floating dtype, rounded with scale 1; for an
    int8 cache int8 only, as the scale is unknown (-128 becomes -127).
    Slots are computed on the cache's device, without a copy to the host.
    """
    check_tensors(append_key=append_key, append_value=append_value)
    check_indices(batch_indices=batch_indices, positions=positions, kv_indices=kv_indices, kv_indptr=kv_indptr)
    check_layout(kv_layout)
    k_pages, v_pages = as_pages(paged_kv_cache, kv_layout)
    dtype = k_pages.dtype
    check_dtype("append_key", append_key, (dtype, *FLOATS) if dtype == torch.float8_e4m3fn else (dtype,))
    check_dtype("append_value", append_value, (append_key.dtype,))
    check_shape("append_key", append_key, ("T", k_pages.shape[1], k_pages.shape[3]))
    check_shape("append_value", append_value, append_key.shape)
    check_shape("batch_indices", batch_indices, append_key.shape[:1])
    check_shape("positions", positions, append_key.shape[:1])
    check_shape("kv_indptr", kv_indptr, ("B + 1",))
    check_shape("kv_indices", kv_indices, ("pages",))
    slots = _slots(batch_indices, positions, kv_indices, kv_indptr, k_pages)
    scale = 1.0 if dtype in CODES else None
    if append_key.dtype in CODES:  # rounded from bfloat16
        append_key, append_value = append_key.bfloat16(), append_value.bfloat16()
    kernels.write_kv(append_key, append_value, slots, k_pages, v_pages, k_scale=scale, v_scale=scale)


def _slots(batch_indices: Tensor, positions: Tensor, indices: Tensor, indptr: Tensor, k_pages: Tensor) -> Tensor:
    """page * page_size + offset of each token, [T] int64; -1 for a token without a slot.

    Values are compared before they are added or multiplied, since a huge one would overflow into another page.
    """
    (num_pages, _, page_size, _), device = k_pages.shape, k_pages.device
    batch_indices, positions, indices, indptr = (
        x.to(device, non_blocking=True).long() for x in (batch_indices, positions, indices, indptr)
    )
    if not indices.shape[0] or indptr.shape[0] < 2:
        return torch.full(batch_indices.shape, -1, dtype=torch.int64, device=device)
    known = (batch_indices >= 0) & (batch_indices < indptr.shape[0] - 1) & (positions >= 0)
    of = torch.where(known, batch_indices, 0)
    start, end = indptr[of], indptr[of + 1]
    place = start + torch.div(positions, page_size, rounding_mode="floor")
    known &= (start >= 0) & (place >= start) & (place < end) & (place < indices.shape[0])
    pages = indices[torch.where(known, place, 0)]
    known &= (pages >= 0) & (pages < num_pages)
    return torch.where(known, torch.where(known, pages, 0) * page_size + positions % page_size, -1)
