"""Shared by FlashInfer's wrappers: buffers, plans, and checks before a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastllama.errors import brief, check_choice, check_dtype, check_rows, check_shape
from fastllama.integrations.arguments import refuse_arguments
from fastllama.integrations.flashinfer import tables
from fastllama.integrations.flashinfer.checks import check_indices, check_integer, check_tensors, number
from fastllama.integrations.flashinfer.layouts import check_layout, dtype_of
from fastllama.kernels.dispatch.checks import CODES, FLOATS, INTEGERS, as_int32
from fastllama.kernels.reference.numerics import wide_dtype


@dataclass(frozen=True)
class Planned:
    """The shapes, dtypes and scale of `run`'s tensors by the plan, as host values."""

    rows: int | str  # of q; a string where `run` determines them
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype

    def check(self, q: Tensor, k: Tensor) -> None:
        """Raise ValueError where q's shape differs from the plan, TypeError where q's or the keys' dtype does."""
        check_tensors(q=q)
        check_shape("q", q, (self.rows, self.num_q_heads, self.head_dim))
        for name, tensor, kind, dtype in (("q", q, "q", self.q_dtype), ("k", k, "kv", self.kv_dtype)):
            if tensor.dtype != dtype:
                raise TypeError(f"{name} has dtype {tensor.dtype}; legal: {dtype}, the plan's {kind}_data_type")


def planned_of(
    function: str,
    rows: int | str,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_data_type: Any,
    kv_data_type: Any,
    o_data_type: Any = None,
    sm_scale: float | None = None,
    *,
    head_dim_vo: int | None = None,
    codes: Sequence[torch.dtype] = CODES,
) -> Planned:
    """A plan from checked arguments. The result's dtype is that of the queries: another o_data_type is refused.

    `codes`: dtypes that keys may have besides that of the queries.
    """
    for name, size in (("num_qo_heads", num_q_heads), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
        check_integer(name, size, 1)
    if num_q_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads is {num_kv_heads}; legal: a divisor of num_qo_heads, {num_q_heads}")
    if sm_scale is not None:
        number(function, "sm_scale", sm_scale)
    q_dtype = dtype_of("q_data_type", q_data_type, FLOATS)
    kv_dtype = q_dtype if kv_data_type is None else dtype_of("kv_data_type", kv_data_type, (q_dtype, *codes))
    o_dtype = q_dtype if o_data_type is None else dtype_of("o_data_type", o_data_type)
    refuse_arguments(function, o_data_type=(o_dtype, q_dtype), head_dim_vo=(head_dim_vo, None, head_dim))
    return Planned(rows, num_q_heads, num_kv_heads, head_dim, q_dtype, kv_dtype)


class Wrapper:
    """The buffers and the plan of a batch of sequences.

    float_workspace_buffer specifies the device, and provides the scratch memory of `attention_decode`. FlashInfer's
    attributes that callers read and assign exist: `_int_workspace_buffer` is empty and unused, `_backend` is a name
    without effect.
    """

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str, use_cuda_graph: bool, backend: str) -> None:
        check_tensors(float_workspace_buffer=float_workspace_buffer)
        check_layout(kv_layout)
        self.device = float_workspace_buffer.device
        self._float_workspace_buffer = float_workspace_buffer
        with torch.inference_mode(False):
            self._int_workspace_buffer = torch.empty(0, dtype=torch.uint8, device=self.device)
            self._pin_memory_int_workspace_buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._kv_layout, self._backend, self._use_cuda_graph = kv_layout, backend, use_cuda_graph
        self._fixed_batch_size = 0
        self._max_total_num_rows: int | None = None
        self._planned: Planned | None = None
        self._causal = False
        self._sm_scale: float | None = None
        self._window_left = -1
        self._logits_soft_cap: float | None = None

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether plans are copied into the constructor's buffers."""
        return self._use_cuda_graph

    @property
    def resolved_backend(self) -> str:
        """The backend that runs, whatever `backend` was given."""
        return "fastllama"

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        """Use another buffer for scratch memory, from the next plan on."""
        check_tensors(float_workspace_buffer=float_workspace_buffer, int_workspace_buffer=int_workspace_buffer)
        if float_workspace_buffer.device != self.device:
            raise ValueError(f"float_workspace_buffer is on {float_workspace_buffer.device}; legal: {self.device}")
        self._float_workspace_buffer, self._int_workspace_buffer = float_workspace_buffer, int_workspace_buffer

    def prewarm_paged_kv_stride_variant(self, variant: str = "independent") -> None:
        """Does nothing: the ops take caches of any strides."""

    def end_forward(self) -> None:
        """Does nothing, as in FlashInfer."""

    def _check_plan(self, **given: Any) -> None:
        """Check a plan's tensors: integers, on the host or on a device of the wrapper's type."""
        check_indices(**given)
        for name, tensor in given.items():
            if tensor.device.type not in ("cpu", self.device.type):
                raise ValueError(f"{name} is on {tensor.device}; legal: cpu, or the workspace's {self.device}")

    def _set_scale(self, function: str, sm_scale: float | None) -> None:
        """Store the softmax scale of `forward`; None for the default."""
        self._sm_scale = None if sm_scale is None else number(function, "sm_scale", sm_scale)

    def _check_rows(self, rows: int) -> None:
        """Raise ValueError where a plan in CUDA-graph mode has more queries than the first one."""
        most = self._max_total_num_rows
        if self._use_cuda_graph and most is not None and rows > most:
            raise ValueError(f"qo_indptr has {rows} rows; legal in CUDA-graph mode: the first plan's {most}, or fewer")

    def _placed(self, buffer: Tensor | None, given: Tensor, non_blocking: bool) -> Tensor:
        """Bounds on the device, in CUDA-graph mode copied into their buffer, which may be an inference tensor."""
        if self._use_cuda_graph:
            assert buffer is not None
            with torch.inference_mode():
                return buffer.copy_(given, non_blocking=non_blocking)
        with torch.inference_mode(False):
            return given.to(self.device, non_blocking=non_blocking).contiguous()

    def _keep(self, planned: Planned, sm_scale: float | None, logits_soft_cap: float | None) -> None:
        self._planned, self._sm_scale, self._logits_soft_cap = planned, sm_scale, logits_soft_cap

    def _plan_of_run(self) -> Planned:
        if self._planned is None:
            raise RuntimeError(f"{type(self).__name__}.run was called before plan")
        return self._planned

    def _fix_batch_size(self, **buffers: tuple[Tensor | None, int]) -> None:
        """Check the buffers of CUDA-graph mode: each with this many more elements than sequences; any number if < 0.

        The first one determines the number of sequences.
        """
        batch_size: int | None = None
        for name, (buffer, more) in buffers.items():
            if not isinstance(buffer, Tensor):
                raise ValueError(f"{name} is {brief(buffer)}; legal in CUDA-graph mode: a tensor")
            if batch_size is None:
                check_shape(name, buffer, ("B + 1" if more else "B",))
                batch_size = max(buffer.shape[0] - more, 0)
            check_shape(name, buffer, (batch_size + more if more >= 0 else "pages",))
            check_dtype(name, buffer, INTEGERS)
            if buffer.device != self.device:
                raise ValueError(f"{name} is on {buffer.device}; legal: {self.device}, as float_workspace_buffer")
            check_rows(name, buffer)
            self._fixed_batch_size = batch_size

    def _check_batch_size(self, name: str, batch_size: int) -> None:
        if self._use_cuda_graph and batch_size != self._fixed_batch_size:
            raise ValueError(
                f"{name} has {batch_size} sequences; legal in CUDA-graph mode: the {self._fixed_batch_size} of the "
                "constructor's buffers"
            )


class PagedWrapper(Wrapper):
    """A wrapper for paged keys and values.

    In CUDA-graph mode there is a dense page table with as many entries as the indices buffer: each sequence may have
    len(indices) // batch size pages, so make that buffer batch size times longest sequence.
    """

    def _paged_buffers(self, indptr: Tensor | None, indices: Tensor | None, last_page_len: Tensor | None) -> None:
        self._paged_kv_indptr_buf, self._paged_kv_indices_buf = indptr, indices
        self._paged_kv_last_page_len_buf = last_page_len
        self._page_size, self._longest = 1, 0
        self._page_table: Tensor | None = None
        self._seq_lens: Tensor | None = None
        if self._use_cuda_graph:
            assert indices is not None
            batch_size = self._fixed_batch_size
            with torch.inference_mode(False):
                self._page_table = _zeros((batch_size, indices.shape[0] // max(batch_size, 1)), self.device)
                self._seq_lens = _zeros((batch_size,), self.device)

    def _check_room(self, name: str, bounds: list[int]) -> None:
        """Raise ValueError where a plan does not fit into the fixed buffers."""
        if not self._use_cuda_graph:
            return
        assert self._page_table is not None
        assert self._paged_kv_indices_buf is not None
        pages, longest = bounds[-1], tables.longest_of(bounds)
        if pages > (room := self._paged_kv_indices_buf.shape[0]):
            raise ValueError(f"{name} has {pages} pages; legal in CUDA-graph mode: the {room} of the buffer, or fewer")
        if longest > (width := self._page_table.shape[1]):
            raise ValueError(
                f"{name} has a sequence of {longest} pages; legal in CUDA-graph mode: at most {width}, as many as the "
                f"buffer has for each of {self._fixed_batch_size} sequences"
            )

    def _place_pages(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        page_size: int,
        bounds: list[int],
        non_blocking: bool,
    ) -> None:
        """Copy a checked plan to the device, into fixed buffers in CUDA-graph mode, and fill the page table.

        New tensors are made outside inference mode, so that a later plan may write to them; writes happen inside it,
        since the fixed buffers may be inference tensors.
        """
        with torch.inference_mode(False):
            at, last = (x.to(self.device, non_blocking=non_blocking) for x in (indptr, last_page_len))
            lengths = tables.lengths_of(at, last, page_size).to(torch.int32)
            pages = as_int32(indices[: bounds[-1]])
            longest = tables.longest_of(bounds)
            if not self._use_cuda_graph:
                pages = pages.to(self.device, non_blocking=non_blocking)
                shape = (at.shape[0] - 1, tables.table_width(longest, page_size))
                if self._page_table is None or self._page_table.shape != shape:
                    self._page_table = torch.empty(shape, dtype=torch.int32, device=self.device)
                self._paged_kv_indptr_buf, self._paged_kv_indices_buf, self._paged_kv_last_page_len_buf = (
                    at,
                    pages,
                    last,
                )
                self._seq_lens = lengths
        assert self._page_table is not None
        with torch.inference_mode():
            if self._use_cuda_graph:
                for buffer, source in zip(self._buffers(), (at, pages, last), strict=True):
                    buffer[: source.shape[0]].copy_(source, non_blocking=non_blocking)
                assert self._seq_lens is not None
                self._seq_lens.copy_(lengths)
            tables.fill_page_table(self._page_table, bounds, self._buffers()[1])
        self._page_size, self._longest = page_size, longest

    def _buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        indptr, indices = self._paged_kv_indptr_buf, self._paged_kv_indices_buf
        last_page_len = self._paged_kv_last_page_len_buf
        assert indptr is not None
        assert indices is not None
        assert last_page_len is not None
        return indptr, indices, last_page_len

    def _table_of_run(self, planned: Planned, k_pages: Tensor) -> Tensor:
        """The page table. ValueError where the cache does not match the plan.

        In CUDA-graph mode a table wider than the cache's number of pages is cut to it: no sequence has more, and the
        kernel's grid depends on the table's width.
        """
        check_shape("k_pages", k_pages, ("P", planned.num_kv_heads, self._page_size, planned.head_dim))
        assert self._page_table is not None
        if not self._use_cuda_graph or k_pages.shape[0] >= self._page_table.shape[1]:
            return self._page_table
        if self._longest > k_pages.shape[0]:
            raise ValueError(f"a sequence has {self._longest} pages; legal: the cache's {k_pages.shape[0]}, or fewer")
        return self._page_table[:, : k_pages.shape[0]]


def refuse_positions(function: str, pos_encoding_mode: str, window_left: int, logits_soft_cap: float | None) -> None:
    """Raise NotImplementedError for position encodings, windows and soft caps of the scores."""
    refuse_arguments(
        function,
        pos_encoding_mode=(pos_encoding_mode, "NONE"),
        window_left=(window_left, -1),
        logits_soft_cap=(logits_soft_cap, None, 0),
    )


def lse_views(
    q: Tensor, lse: Tensor | None, return_lse: bool, lse_base: str, lse_layout: str
) -> tuple[Tensor | None, Tensor | None]:
    """The log-sum-exps as the op writes them, [T, Hq], and as `run` returns them: the same, or [Hq, T] for HN."""
    check_choice("lse_base", lse_base, ("log2", "ln"))
    check_choice("lse_layout", lse_layout, ("NH", "HN"))
    if lse_layout == "NH":
        return lse, lse
    if lse is None and return_lse:
        lse = torch.empty((q.shape[1], q.shape[0]), dtype=wide_dtype(q), device=q.device)
    return None if lse is None else lse.t(), lse


def delivered(
    found: Tensor | tuple[Tensor, Tensor], lse: Tensor | None, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """The op's result, with the log-sum-exps in the requested form, or without them."""
    if isinstance(found, Tensor):
        return found
    out, written = found
    return (out, written if lse is None else lse) if return_lse else out


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32, device=device)
