"""FlashInfer's `decode`: attention of each sequence's newest tokens over keys and values in pages."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastllama import kernels
from fastllama.errors import check_dtype, check_range, check_shape
from fastllama.integrations.arguments import refuse_arguments
from fastllama.integrations.flashinfer import tables
from fastllama.integrations.flashinfer.layouts import (
    Cache,
    Dtype,
    as_pages,
    dtype_of,
    page_scales,
    softmax_scale,
)
from fastllama.integrations.flashinfer.single import single_decode_with_kv_cache
from fastllama.integrations.flashinfer.wrappers import PagedWrapper, delivered, planned_of, refuse_positions

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "fast_decode_plan",
    "single_decode_with_kv_cache",
]


class BatchDecodeWithPagedKVCacheWrapper(PagedWrapper):
    """Attention of each sequence's last token, or last few, over keys and values in pages.

    `plan` once for a step, `run` once for each layer. float_workspace_buffer: memory for the parts of long sequences,
    used where it is large enough for the plan (`workspace_size` says), and not to be shared by runs that overlap;
    where it is not, the op allocates its own. Nothing else is allocated by `run` but the results that it is not given.

    use_cuda_graph: plans are copied into the three paged_kv_*_buffer tensors and a dense page table beside them,
    which has as many entries as the buffer of indices: one row for each sequence, so that the longest may have
    len(indices) // batch size pages (batch size times longest sequence is how the buffer is to be made). `run` reads
    only these, and a captured graph replays the plan that was made last. A plan of another batch size, with more
    pages, or with a longer sequence, raises ValueError.
    use_tensor_cores and backend are hints, and decide nothing.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
    ) -> None:
        refuse_arguments(type(self).__name__, jit_args=(jit_args, None))
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend)
        self._use_tensor_cores = use_tensor_cores
        if use_cuda_graph:
            self._fix_batch_size(
                0 if paged_kv_last_page_len_buffer is None else paged_kv_last_page_len_buffer.shape[0],
                paged_kv_last_page_len_buffer=(paged_kv_last_page_len_buffer, 0),
                paged_kv_indptr_buffer=(paged_kv_indptr_buffer, 1),
                paged_kv_indices_buffer=(paged_kv_indices_buffer, -1),
            )
        self._paged_buffers(paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        self._q_len_per_req = 1
        self._scratch: Tensor | None = None

    @property
    def use_tensor_cores(self) -> bool:
        """The constructor's argument."""
        return self._use_tensor_cores

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: Dtype = "float16",
        kv_data_type: Dtype = None,
        o_data_type: Dtype = None,
        data_type: Dtype = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: Tensor | None = None,
        seq_lens: Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        *,
        window_right: int = 0,
        is_causal: bool | None = None,
    ) -> None:
        """Say which pages each sequence has: indices[indptr[b] : indptr[b + 1]], the last of them partly filled.

        indptr: [B + 1], indices: [at least indptr[-1]], last_page_len: [B], each int32 or int64, on the host or the
        device; the bounds, and with pages of more than one token last_page_len, are read on the host. A sequence
        without pages is padding. q_len_per_req: the newest tokens of each sequence that `run` is given, causal among
        each other. sm_scale: defaults to 1 / sqrt(D). q_data_type, kv_data_type: what `run` will get; `data_type`
        stands for those that are None. is_causal: None, or what q_len_per_req says. seq_lens and block_tables say
        again what the pages say, and are not read.
        Raises ValueError or NotImplementedError, naming the argument; the plan before stands then.
        """
        refuse_arguments("plan", window_right=(window_right, 0), is_causal=(is_causal, None, q_len_per_req > 1))
        self._plan_pages(
            indptr,
            indices,
            last_page_len,
            (num_qo_heads, num_kv_heads, head_dim, page_size),
            (pos_encoding_mode, window_left, logits_soft_cap),
            (q_data_type, kv_data_type, o_data_type, data_type),
            sm_scale,
            q_len_per_req,
            non_blocking,
        )

    begin_forward = plan

    def _plan_pages(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        sizes: tuple[int, int, int, int],
        refused: tuple[str, int, float | None],
        dtypes: tuple[Dtype, Dtype, Dtype, Dtype],
        sm_scale: float | None,
        q_len_per_req: int,
        non_blocking: bool,
        indptr_host: Tensor | None = None,
    ) -> None:
        refuse_positions("plan", *refused)
        check_shape("indices", indices, ("pages",))
        check_dtype("indices", indices, (torch.int32, torch.int64))
        check_range("q_len_per_req", q_len_per_req, 1)
        bounds = tables.bounds_of("indptr", indptr, indices.shape[0], host=indptr_host)
        num_q_heads, num_kv_heads, head_dim, page_size = sizes
        tables.check_pages(bounds, last_page_len, page_size, "last_page_len")
        batch_size = len(bounds) - 1
        self._check_batch_size("indptr", batch_size)
        self._check_room("indptr", bounds)
        if self._use_cuda_graph and self._planned is not None and q_len_per_req != self._q_len_per_req:
            raise ValueError(
                f"q_len_per_req is {q_len_per_req}; legal in CUDA-graph mode: {self._q_len_per_req}, as planned before"
            )
        q_data_type, kv_data_type, o_data_type, data_type = dtypes
        q_data_type = q_data_type or data_type or "float16"
        planned = planned_of(
            "plan",
            batch_size * q_len_per_req,
            num_q_heads,
            num_kv_heads,
            head_dim,
            q_data_type,
            kv_data_type or data_type,
            o_data_type,
        )
        self._place_pages(indptr, indices, last_page_len, page_size, bounds, non_blocking)
        self._planned, self._sm_scale, self._q_len_per_req = planned, sm_scale, q_len_per_req
        self._scratch = self._scratch_memory()

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of q [B * q_len_per_req, Hq, D] over the planned pages of a cache; reads nothing on the host.

        paged_kv_cache: (keys, values), each [P, page_size, Hkv, D] (NHD) or [P, Hkv, page_size, D] (HND), or one
        tensor [P, 2, ...]. out: like q, lse: [B * q_len_per_req, Hq] fp32, any strides; both written where given.
        Returns out, and with return_lse the log-sum-exps, to base 2. q_scale, k_scale, v_scale: numbers.
        Raises RuntimeError before the first plan, ValueError and TypeError for what is not as planned.
        """
        planned = self._plan_of_run()
        refuse_arguments(
            "run",
            args=(args, ()),
            window_left=(window_left, None, -1),
            sinks=(sinks, None),
            skip_softmax_threshold_scale_factor=(skip_softmax_threshold_scale_factor, None),
            kv_cache_sf=(kv_cache_sf, None),
        )
        if q_len_per_req not in (None, self._q_len_per_req):
            raise ValueError(f"q_len_per_req is {q_len_per_req}; legal: {self._q_len_per_req}, as planned, or None")
        k_pages, v_pages = as_pages(paged_kv_cache, self._kv_layout)
        planned.check(q, k_pages)
        self._check_cache(planned, k_pages)
        assert self._page_table is not None
        assert self._seq_lens is not None
        key_scale, value_scale = page_scales("run", k_scale, v_scale, k_pages)
        found = kernels.attention_decode(
            q,
            k_pages,
            v_pages,
            self._page_table,
            self._seq_lens,
            k_scale=key_scale,
            v_scale=value_scale,
            scale=softmax_scale("run", self._sm_scale, planned.head_dim, q_scale),
            out=out,
            lse_out=lse,
            return_lse=return_lse,
            base2=True,
            workspace=self._scratch,
        )
        return delivered(found, lse, return_lse)

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        pos_encoding_mode: str = "NONE",
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`run` with a softmax scale of its own, which stays (FlashInfer's older name)."""
        refuse_positions("forward", pos_encoding_mode, window_left, logits_soft_cap)
        self._sm_scale = sm_scale
        return self.run(q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)

    def forward_return_lse(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        pos_encoding_mode: str = "NONE",
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`forward`, with the log-sum-exps."""
        refuse_positions("forward_return_lse", pos_encoding_mode, window_left, logits_soft_cap)
        self._sm_scale = sm_scale
        return self.run(q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=True)

    def workspace_size(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: Dtype = "float16",
        kv_data_type: Dtype = None,
        o_data_type: Dtype = None,
        data_type: Dtype = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        block_tables: Tensor | None = None,
        seq_lens: Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
    ) -> tuple[int, int]:
        """Bytes of the two workspace buffers that such a plan can use: of the second, none."""
        bounds = tables.bounds_of("indptr", indptr, indices.shape[0])
        sizes = (num_qo_heads, num_kv_heads, head_dim, page_size)
        kv_dtype = dtype_of("kv_data_type", kv_data_type or data_type or q_data_type)
        if self._page_table is not None and self._use_cuda_graph:
            width = self._page_table.shape[1]
        else:
            width = tables.table_width(tables.longest_of(bounds), page_size)
        return 4 * tables.scratch_elements(len(bounds) - 1, q_len_per_req, *sizes, width, kv_dtype, self.device), 0

    def _cut_table(self, pages: int) -> None:
        super()._cut_table(pages)
        self._scratch = self._scratch_memory()

    def _scratch_memory(self) -> Tensor | None:
        """The start of float_workspace_buffer, as the op takes it; None where it is too small, or none is needed."""
        assert self._planned is not None
        assert self._page_table is not None
        (batch_size, width), planned = self._page_table.shape, self._planned
        sizes = (planned.num_q_heads, planned.num_kv_heads, planned.head_dim, self._page_size, width)
        size = 4 * tables.scratch_elements(batch_size, self._q_len_per_req, *sizes, planned.kv_dtype, self.device)
        buffer = self._float_workspace_buffer
        if not 0 < size <= buffer.numel() * buffer.element_size() or buffer.data_ptr() % 16:
            return None
        return buffer.view(-1).view(torch.uint8)[:size].view(torch.float32)


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """`BatchDecodeWithPagedKVCacheWrapper` in CUDA-graph mode, with the buffers first."""

    def __init__(
        self,
        workspace_buffer: Tensor,
        indptr_buffer: Tensor,
        indices_buffer: Tensor,
        last_page_len_buffer: Tensor,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
    ) -> None:
        super().__init__(
            workspace_buffer,
            kv_layout,
            use_cuda_graph=True,
            use_tensor_cores=use_tensor_cores,
            paged_kv_indptr_buffer=indptr_buffer,
            paged_kv_indices_buffer=indices_buffer,
            paged_kv_last_page_len_buffer=last_page_len_buffer,
        )


def fast_decode_plan(
    self: BatchDecodeWithPagedKVCacheWrapper,
    indptr: Tensor,
    indices: Tensor,
    last_page_len: Tensor,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    pos_encoding_mode: str = "NONE",
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    q_data_type: Dtype = None,
    kv_data_type: Dtype = None,
    data_type: Dtype = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    non_blocking: bool = True,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    q_len_per_req: int = 1,
    global_override_indptr_cpu: Tensor | None = None,
) -> None:
    """`plan` of a wrapper, of bounds that are on the host already: global_override_indptr_cpu, equal to indptr.

    With pages of one token nothing is copied to the host then. SGLang puts `partial(fast_decode_plan, wrapper)` in
    place of `wrapper.begin_forward`.
    """
    self._plan_pages(
        indptr,
        indices,
        last_page_len,
        (num_qo_heads, num_kv_heads, head_dim, page_size),
        (pos_encoding_mode, window_left, logits_soft_cap),
        (q_data_type, kv_data_type, None, data_type),
        sm_scale,
        q_len_per_req,
        non_blocking,
        global_override_indptr_cpu,
    )
