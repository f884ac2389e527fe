"""FlashInfer's `decode`: attention of each sequence's newest tokens over keys and values in pages."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from fastllama import kernels
from fastllama.errors import check_dtype, check_shape
from fastllama.integrations.arguments import refuse_arguments
from fastllama.integrations.flashinfer import tables
from fastllama.integrations.flashinfer.checks import check_integer, check_optional, check_tensors
from fastllama.integrations.flashinfer.layouts import Cache, Dtype, as_pages, page_scales, softmax_scale
from fastllama.integrations.flashinfer.page import get_seq_lens
from fastllama.integrations.flashinfer.single import single_decode_with_kv_cache
from fastllama.integrations.flashinfer.wrappers import PagedWrapper, Planned, delivered, planned_of, refuse_positions
from fastllama.kernels.dispatch.checks import INTEGERS

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "fast_decode_plan",
    "get_seq_lens",
    "single_decode_with_kv_cache",
]


class BatchDecodeWithPagedKVCacheWrapper(PagedWrapper):
    """Attention of each sequence's last token or tokens over keys and values in pages.

    Call `plan` once per step, `run` once per layer. float_workspace_buffer: scratch memory for split-KV, used where it
    is large enough for the plan (see `workspace_size`), and not to be shared by overlapping runs; otherwise the op
    allocates its own. Apart from that, `run` allocates only results that are not given.

    use_cuda_graph: plans are copied into the three paged_kv_*_buffer tensors and a dense page table with as many
    entries as the indices buffer: one row per sequence, so that the longest may have len(indices) // batch size pages
    (make the buffer batch size times longest sequence). `run` reads only these, so a captured graph replays with the
    latest plan. A plan with another batch size, more pages, or a longer sequence raises ValueError.
    use_tensor_cores and backend have no effect.
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
                paged_kv_last_page_len_buffer=(paged_kv_last_page_len_buffer, 0),
                paged_kv_indptr_buffer=(paged_kv_indptr_buffer, 1),
                paged_kv_indices_buffer=(paged_kv_indices_buffer, -1),
            )
        self._paged_buffers(paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        self._q_len_per_req = 1
        self._scratch: Tensor | None = None

    @property
    def use_tensor_cores(self) -> bool:
        """The argument of the constructor."""
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
        """Set the pages of each sequence: indices[indptr[b] : indptr[b + 1]], the last of them partly filled.

        indptr: [B + 1], indices: [at least indptr[-1]], last_page_len: [B], each int32 or int64, on the host or the
        device; the bounds, and with pages of more than one token last_page_len, are read on the host. A sequence
        without pages is padding. q_len_per_req: queries per sequence in `run`, its newest tokens, causal among each
        other. sm_scale: defaults to 1 / sqrt(D). q_data_type, kv_data_type: dtypes of `run`'s tensors; `data_type`
        is the default of both. is_causal: None, or consistent with q_len_per_req. seq_lens and block_tables repeat
        the pages, and are not read.
        Raises ValueError or NotImplementedError, naming the argument; the previous plan stays valid then.
        """
        check_integer("q_len_per_req", q_len_per_req, 1)
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
        self._check_plan(indptr=indptr, indices=indices, last_page_len=last_page_len)
        bounds, planned, elements = self._checked(indptr, indices, sizes, dtypes, q_len_per_req, indptr_host, sm_scale)
        page_size = sizes[-1]
        tables.check_pages(bounds, last_page_len, page_size, "last_page_len")
        self._check_batch_size("indptr", len(bounds) - 1)
        self._check_room("indptr", bounds)
        if self._use_cuda_graph and self._planned is not None and q_len_per_req != self._q_len_per_req:
            raise ValueError(
                f"q_len_per_req is {q_len_per_req}; legal in CUDA-graph mode: {self._q_len_per_req}, as planned before"
            )
        scratch = tables.scratch_in(self._float_workspace_buffer, elements)
        self._place_pages(indptr, indices, last_page_len, page_size, bounds, non_blocking)
        self._keep(planned, sm_scale, refused[-1])
        self._q_len_per_req, self._scratch = q_len_per_req, scratch

    def _checked(
        self,
        indptr: Tensor,
        indices: Tensor,
        sizes: tuple[int, int, int, int],
        dtypes: tuple[Dtype, Dtype, Dtype, Dtype],
        q_len_per_req: int,
        indptr_host: Tensor | None = None,
        sm_scale: float | None = None,
    ) -> tuple[list[int], Planned, int]:
        """The bounds and sizes of a plan, and the fp32 elements of scratch memory that it needs. Changes nothing."""
        check_tensors(indptr=indptr, indices=indices)
        check_shape("indices", indices, ("pages",))
        check_dtype("indices", indices, INTEGERS)
        check_integer("q_len_per_req", q_len_per_req, 1)
        check_integer("page_size", sizes[-1], 1)
        bounds = tables.bounds_of("indptr", indptr, indices.shape[0], host=indptr_host)
        q_data_type, kv_data_type, o_data_type, data_type = dtypes
        q_data_type, kv_data_type = q_data_type or data_type or "float16", kv_data_type or data_type
        planned = planned_of("plan", "B * Q", *sizes[:3], q_data_type, kv_data_type, o_data_type, sm_scale)
        if self._use_cuda_graph and self._page_table is not None:
            width = self._page_table.shape[1]
        else:
            width = tables.table_width(tables.longest_of(bounds), sizes[-1])
        needed = (len(bounds) - 1, q_len_per_req, *sizes, width, planned.kv_dtype, self.device)
        return bounds, planned, tables.scratch_elements(*needed)

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
        """Attention of q [B * Q, Hq, D] over the planned pages of a cache; no device-to-host copy.

        Q, the queries per sequence, follows from q's rows. Where it is above the plan's q_len_per_req, the op allocates
        its own scratch memory. q_len_per_req: None, or Q.
        paged_kv_cache: (keys, values), each [P, page_size, Hkv, D] (NHD) or [P, Hkv, page_size, D] (HND), or one
        tensor [P, 2, ...]. out: like q, lse: [B * Q, Hq] fp32, any strides; both written where given.
        Returns out, and with return_lse the log-sum-exps, to base 2. q_scale, k_scale, v_scale: numbers.
        Raises RuntimeError before the first plan, ValueError and TypeError for tensors that do not match the plan.
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
        k_pages, v_pages = as_pages(paged_kv_cache, self._kv_layout)
        planned.check(q, k_pages)
        queries = self._queries_of(q, planned)
        if q_len_per_req not in (None, queries):
            raise ValueError(f"q_len_per_req is {q_len_per_req}; legal: {queries}, as q has, or None")
        table = self._table_of_run(planned, k_pages)
        assert self._seq_lens is not None
        check_optional(out=out, lse=lse)
        key_scale, value_scale = page_scales("run", k_scale, v_scale, k_pages)
        found = kernels.attention_decode(
            q,
            k_pages,
            v_pages,
            table,
            self._seq_lens,
            k_scale=key_scale,
            v_scale=value_scale,
            scale=softmax_scale("run", self._sm_scale, planned.head_dim, q_scale),
            out=out,
            lse_out=lse,
            return_lse=return_lse,
            base2=True,
            workspace=self._scratch if queries <= self._q_len_per_req else None,
        )
        return delivered(found, lse, return_lse)

    def _queries_of(self, q: Tensor, planned: Planned) -> int:
        """Queries per sequence in q, which may differ from the plan, as in FlashInfer."""
        assert self._seq_lens is not None
        batch_size = self._seq_lens.shape[0]
        queries = max(q.shape[0] // batch_size, 1) if batch_size else self._q_len_per_req
        if q.shape[0] != batch_size * queries:
            shape = f"[{batch_size} * Q, {planned.num_q_heads}, {planned.head_dim}]"
            raise ValueError(f"q has shape {list(q.shape)}; legal: {shape}, Q at least 1")
        return queries

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
        """`run` with another softmax scale, which later runs keep (FlashInfer's older name)."""
        refuse_positions("forward", pos_encoding_mode, window_left, logits_soft_cap)
        self._set_scale("forward", sm_scale)
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
        self._set_scale("forward_return_lse", sm_scale)
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
        """Bytes that such a plan uses of the two workspace buffers; 0 of the second."""
        sizes, dtypes = (num_qo_heads, num_kv_heads, head_dim, page_size), (q_data_type, kv_data_type, None, data_type)
        return 4 * self._checked(indptr, indices, sizes, dtypes, q_len_per_req)[-1], 0


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
    """`plan` of a wrapper with bounds already on the host: global_override_indptr_cpu, equal to indptr.

    With pages of one token, nothing is copied to the host then. SGLang replaces `wrapper.begin_forward` by
    `partial(fast_decode_plan, wrapper)`.
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
