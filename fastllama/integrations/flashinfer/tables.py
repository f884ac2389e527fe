"""Converts FlashInfer's page tables, indices and bounds of each sequence (CSR), to the dense tables of the ops.

A dense row is as long as the longest sequence's: 4 bytes per page and sequence, which at one token per page is 100 MB
for 256 sequences of 100,000 tokens. `python -m benchmarks.plan_cost` measures the time to fill it.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.errors import check_dtype, check_shape
from fastllama.integrations.flashinfer.checks import check_integer, check_tensors
from fastllama.kernels.dispatch.checks import INTEGERS

_ROUND = 64  # tokens: a table's width, which the op's launch cache depends on, changes once in so many steps
_MEASURED = 2**17  # tokens of the sequence whose scratch memory is measured


def bounds_of(name: str, indptr: Tensor, rows: int | None = None, *, host: Tensor | None = None) -> list[int]:
    """Row bounds of sequences, copied to the host. ValueError unless they ascend, from 0 or more to at most `rows`.

    host: the same numbers already on the host, to save the copy.
    """
    check_shape(name, indptr, ("B + 1",))
    check_dtype(name, indptr, INTEGERS)
    if host is not None:
        check_tensors(global_override_indptr_cpu=host)
        check_shape("global_override_indptr_cpu", host, indptr.shape)
        check_dtype("global_override_indptr_cpu", host, INTEGERS)
    bounds: list[int] = (indptr if host is None else host).tolist()
    most = "" if rows is None else f" to at most {rows}"
    if (
        not bounds
        or bounds[0] < 0
        or any(a > b for a, b in pairwise(bounds))
        or not (rows is None or bounds[-1] <= rows)
    ):
        seen = f"[{', '.join(map(str, bounds[:6]))}{', ...' if len(bounds) > 6 else ''}]"
        raise ValueError(f"{name} is {seen}, ending at {bounds[-1] if bounds else None}; legal: ascending from 0{most}")
    return bounds


def check_from_zero(name: str, bounds: list[int]) -> None:
    """Raise ValueError unless the bounds begin at 0."""
    if bounds[0]:
        raise ValueError(f"{name} begins at {bounds[0]}; legal: 0")


def check_pages(bounds: list[int], last_page_len: Tensor, page_size: int, name: str) -> None:
    """Raise ValueError unless each sequence with pages has a legal length of its last page.

    With one token per page there is one legal length, and nothing is read.
    """
    check_integer("page_size", page_size, 1)
    check_shape(name, last_page_len, (len(bounds) - 1,))
    check_dtype(name, last_page_len, INTEGERS)
    if page_size == 1:
        return
    for b, (length, (start, end)) in enumerate(zip(last_page_len.tolist(), pairwise(bounds), strict=True)):
        if start < end and not 1 <= length <= page_size:
            raise ValueError(f"{name}[{b}] is {length}; legal: 1 to the page size, {page_size}")


def longest_of(bounds: list[int]) -> int:
    """Number of pages of the longest sequence."""
    return max((b - a for a, b in pairwise(bounds)), default=0)


def table_width(longest: int, page_size: int) -> int:
    """Columns of a page table: at least one, in steps of 64 tokens."""
    step = max(_ROUND // page_size, 1)
    return max(-(-longest // step), 1) * step


def fill_page_table(table: Tensor, bounds: list[int], indices: Tensor) -> None:
    """Copy each sequence's pages, indices[bounds[b] : bounds[b + 1]], into its row of `table` [B, longest or more].

    All rows in one call of views, which a GPU runs in a few launches: a gather would need the indices of all pages, and
    took seven times as long on a CPU. The rest of a row is neither written nor read.
    """
    counts = [b - a for a, b in pairwise(bounds)]
    if not any(counts):
        return
    width = table.shape[1]
    rows = table.view(-1).split([size for count in counts for size in (count, width - count)])[::2]
    torch._foreach_copy_(rows, indices[bounds[0] : bounds[-1]].split(counts))


def lengths_of(indptr: Tensor, last_page_len: Tensor, page_size: int) -> Tensor:
    """Length of each sequence; 0 without pages, whatever its last_page_len. No device-to-host copy."""
    pages = indptr[1:] - indptr[:-1]
    if page_size == 1:
        return pages
    return torch.where(pages > 0, (pages - 1) * page_size + last_page_len, torch.zeros_like(pages))


@lru_cache(maxsize=64)
def scratch_elements(
    num_seqs: int,
    queries: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    width: int,
    kv_dtype: torch.dtype,
    device: torch.device,
) -> int:
    """An upper bound of the fp32 elements of scratch memory that `attention_decode` needs for such a table.

    Measured by allocating the scratch memory of one sequence of at most 131,072 tokens, and multiplied.
    """
    pages = max(min(width, _MEASURED // page_size), 1)
    one = torch.zeros(1, dtype=torch.float32, device=device)
    q = one.expand(queries, num_q_heads, head_dim)
    k_pages = one.to(kv_dtype).expand(1, num_kv_heads, page_size, head_dim)
    table = one.to(torch.int32).expand(1, pages)
    return kernels.attention_workspace(q, k_pages, table).numel() * -(-width // pages) * num_seqs


def scratch_in(buffer: Tensor, elements: int) -> Tensor | None:
    """The start of a workspace, for the op; None where it is too small, not needed, or may not be written by `run`, as
    a tensor made in inference mode.
    """
    size = 4 * elements
    if not 0 < size <= buffer.numel() * buffer.element_size() or buffer.data_ptr() % 16 or buffer.is_inference():
        return None
    with torch.inference_mode(False):
        return buffer.view(-1).view(torch.uint8)[:size].view(torch.float32)
