"""FlashInfer's `prefill`: attention of many tokens of one sequence or a batch, with paged or packed keys."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from fastllama import kernels
from fastllama.errors import check_shape
from fastllama.integrations.arguments import refuse_arguments
from fastllama.integrations.flashinfer import tables
from fastllama.integrations.flashinfer.checks import check_optional
from fastllama.integrations.flashinfer.layouts import Cache, Dtype, as_pages, page_scales, softmax_scale
from fastllama.integrations.flashinfer.ragged import BatchPrefillWithRaggedKVCacheWrapper
from fastllama.integrations.flashinfer.single import (
    single_prefill_with_kv_cache,
    single_prefill_with_kv_cache_return_lse,
)
from fastllama.integrations.flashinfer.wrappers import (
    PagedWrapper,
    Planned,
    delivered,
    lse_views,
    planned_of,
    refuse_positions,
)

__all__ = [
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
]


class BatchPrefillWithPagedKVCacheWrapper(PagedWrapper):
    """Attention of each sequence's newest tokens, any number per sequence, over keys and values in pages.

    Call `plan` once per step, `run` once per layer. use_cuda_graph: as `BatchDecodeWithPagedKVCacheWrapper`, with
    qo_indptr_buf for the queries' bounds; a later plan may have fewer rows than the first, not more.
    float_workspace_buffer specifies the device; its memory is not used. backend has no effect.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
        variant_owns_mask: bool = False,
    ) -> None:
        refuse_arguments(
            type(self).__name__,
            custom_mask_buf=(custom_mask_buf, None),
            mask_indptr_buf=(mask_indptr_buf, None),
            jit_args=(jit_args, None),
            jit_kwargs=(jit_kwargs, None),
            variant_owns_mask=(variant_owns_mask, False),
        )
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend)
        if use_cuda_graph:
            self._fix_batch_size(
                paged_kv_last_page_len_buf=(paged_kv_last_page_len_buf, 0),
                qo_indptr_buf=(qo_indptr_buf, 1),
                paged_kv_indptr_buf=(paged_kv_indptr_buf, 1),
                paged_kv_indices_buf=(paged_kv_indices_buf, -1),
            )
        self._qo_indptr_buf = qo_indptr_buf
        self._paged_buffers(paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf)

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Dtype = "float16",
        kv_data_type: Dtype = None,
        o_data_type: Dtype = None,
        non_blocking: bool = True,
        prefix_len_ptr: Tensor | None = None,
        token_pos_in_items_ptr: Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Tensor | None = None,
        seq_lens: Tensor | None = None,
        seq_lens_q: Tensor | None = None,
        block_tables: Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        uniform_q_len: int | None = None,
    ) -> None:
        """Set the rows of q and the pages of each sequence: see `BatchDecodeWithPagedKVCacheWrapper.plan`.

        qo_indptr: [B + 1], int32 or int64, on the host or the device, read on the host: row bounds of each sequence's
        queries, which are its last tokens. causal: a query sees the keys up to its own; if False, all keys.
        Raises ValueError or NotImplementedError, naming the argument; the previous plan stays valid then.
        """
        rows, bounds, planned = self._checked(
            "plan",
            (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len),
            (num_qo_heads, num_kv_heads, head_dim_qk, page_size, head_dim_vo),
            (pos_encoding_mode, window_left, logits_soft_cap),
            (q_data_type, kv_data_type, o_data_type),
            sm_scale,
            custom_mask=(custom_mask, None),
            packed_custom_mask=(packed_custom_mask, None),
            prefix_len_ptr=(prefix_len_ptr, None),
            token_pos_in_items_ptr=(token_pos_in_items_ptr, None),
            token_pos_in_items_len=(token_pos_in_items_len, 0),
            max_item_len_ptr=(max_item_len_ptr, None),
        )
        self._check_batch_size("qo_indptr", len(rows) - 1)
        self._check_rows(rows[-1])
        self._check_room("paged_kv_indptr", bounds)
        given = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._place_pages(*given, page_size, bounds, non_blocking)
        self._qo_indptr_buf = self._placed(self._qo_indptr_buf, qo_indptr, non_blocking)
        self._keep(planned, sm_scale, logits_soft_cap)
        self._causal = causal
        if self._max_total_num_rows is None:
            self._max_total_num_rows = rows[-1]
        self._qo_indptr_last = rows[-1]

    def _checked(
        self,
        function: str,
        given: tuple[Tensor, Tensor, Tensor, Tensor],
        sizes: tuple[int, int, int, int, int | None],
        positions: tuple[str, int, float | None],
        dtypes: tuple[Dtype, Dtype, Dtype],
        sm_scale: float | None,
        **refused: tuple[Any, ...],
    ) -> tuple[list[int], list[int], Planned]:
        """Bounds of the rows and of the pages, and the sizes of a plan. Changes nothing."""
        refuse_positions(function, *positions)
        refuse_arguments(function, **refused)
        qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len = given
        names = ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
        self._check_plan(**dict(zip(names, given, strict=True)))
        check_shape("paged_kv_indices", paged_kv_indices, ("pages",))
        rows = tables.bounds_of("qo_indptr", qo_indptr)
        tables.check_from_zero("qo_indptr", rows)
        check_shape("paged_kv_indptr", paged_kv_indptr, (len(rows),))
        bounds = tables.bounds_of("paged_kv_indptr", paged_kv_indptr, paged_kv_indices.shape[0])
        num_qo_heads, num_kv_heads, head_dim, page_size, head_dim_vo = sizes
        tables.check_pages(bounds, paged_kv_last_page_len, page_size, "paged_kv_last_page_len")
        heads = (num_qo_heads, num_kv_heads, head_dim)
        planned = planned_of(function, rows[-1], *heads, *dtypes, sm_scale, head_dim_vo=head_dim_vo)
        return rows, bounds, planned

    begin_forward = plan

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
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        kv_cache_sf: Any = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of q [qo_indptr[-1], Hq, D] over the planned pages of a cache; no device-to-host copy.

        lse_base: "log2" or "ln". lse_layout: "NH", log-sum-exps as [T, Hq], or "HN", as [Hq, T]; a given `lse` has
        that shape, and any strides. Everything else: as `BatchDecodeWithPagedKVCacheWrapper.run`.
        """
        planned = self._plan_of_run()
        refuse_arguments(
            "run",
            args=(args, ()),
            window_left=(window_left, None, -1),
            sinks=(sinks, None),
            kv_cache_sf=(kv_cache_sf, None),
            skip_softmax_threshold_scale_factor=(skip_softmax_threshold_scale_factor, None),
            uses_spcompress=(uses_spcompress, None, False),
        )
        k_pages, v_pages = as_pages(paged_kv_cache, self._kv_layout)
        planned.check(q, k_pages)
        table = self._table_of_run(planned, k_pages)
        check_optional(out=out, lse=lse)
        assert self._seq_lens is not None
        assert self._qo_indptr_buf is not None
        written, returned = lse_views(q, lse, return_lse, lse_base, lse_layout)
        key_scale, value_scale = page_scales("run", k_scale, v_scale, k_pages)
        found = kernels.attention_prefill(
            q,
            k_pages,
            v_pages,
            table,
            self._seq_lens,
            self._qo_indptr_buf,
            k_scale=key_scale,
            v_scale=value_scale,
            scale=softmax_scale("run", self._sm_scale, planned.head_dim, q_scale),
            causal=self._causal,
            out=out,
            lse_out=written,
            return_lse=return_lse,
            base2=lse_base == "log2",
        )
        return delivered(found, returned, return_lse)

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: float | None = None,
        v_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`run` with another mask and softmax scale, which later runs keep (FlashInfer's older name)."""
        refuse_positions("forward", pos_encoding_mode, window_left, logits_soft_cap)
        self._set_scale("forward", sm_scale)
        self._causal = causal
        return self.run(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale)

    def forward_return_lse(
        self,
        q: Tensor,
        paged_kv_cache: Cache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
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
        self._causal = causal
        return self.run(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale, return_lse=True)

    def workspace_size(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Dtype = "float16",
        kv_data_type: Dtype = None,
        o_data_type: Dtype = None,
        prefix_len_ptr: Tensor | None = None,
        token_pos_in_items_ptr: Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Tensor | None = None,
        seq_lens: Tensor | None = None,
        seq_lens_q: Tensor | None = None,
        block_tables: Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        uniform_q_len: int | None = None,
    ) -> tuple[int, int]:
        """Bytes that such a plan uses of the two workspace buffers: (0, 0). Raises the errors of `plan`."""
        self._checked(
            "workspace_size",
            (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len),
            (num_qo_heads, num_kv_heads, head_dim_qk, page_size, head_dim_vo),
            (pos_encoding_mode, window_left, logits_soft_cap),
            (q_data_type, kv_data_type, o_data_type),
            sm_scale,
            custom_mask=(custom_mask, None),
            packed_custom_mask=(packed_custom_mask, None),
            prefix_len_ptr=(prefix_len_ptr, None),
            token_pos_in_items_ptr=(token_pos_in_items_ptr, None),
            token_pos_in_items_len=(token_pos_in_items_len, 0),
            max_item_len_ptr=(max_item_len_ptr, None),
        )
        return 0, 0
