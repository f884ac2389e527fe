"""The ragged half of FlashInfer's `prefill`: attention of a batch with packed keys and values, without pages."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from fastllama import kernels
from fastllama.errors import check_shape
from fastllama.integrations.arguments import refuse_arguments
from fastllama.integrations.flashinfer import tables
from fastllama.integrations.flashinfer.checks import check_optional, check_tensors
from fastllama.integrations.flashinfer.layouts import Dtype, as_tokens, softmax_scale
from fastllama.integrations.flashinfer.wrappers import Wrapper, delivered, lse_views, planned_of, refuse_positions


class BatchPrefillWithRaggedKVCacheWrapper(Wrapper):
    """Attention of packed sequences over packed keys and values.

    Call `plan` once per step, `run` once per layer. use_cuda_graph: bounds are copied into qo_indptr_buf and
    kv_indptr_buf, [batch size + 1]; a later plan may have fewer rows than the first, not more.
    float_workspace_buffer specifies the device; its memory is not used. backend has no effect.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        kv_indptr_buf: Tensor | None = None,
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
            self._fix_batch_size(qo_indptr_buf=(qo_indptr_buf, 1), kv_indptr_buf=(kv_indptr_buf, 1))
        self._qo_indptr_buf, self._kv_indptr_buf = qo_indptr_buf, kv_indptr_buf
        self._kv_rows = 0

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
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
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        seq_lens: Tensor | None = None,
        seq_lens_q: Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        v_indptr: Tensor | None = None,
        o_indptr: Tensor | None = None,
        uniform_q_len: int | None = None,
    ) -> None:
        """Set the rows of q, and of k and v, of each sequence.

        qo_indptr, kv_indptr: [B + 1], int32 or int64, on the host or the device, read on the host; from 0. causal:
        the last query of a sequence sees all its keys. Everything else: as `BatchPrefillWithPagedKVCacheWrapper.plan`.
        """
        refuse_positions("plan", pos_encoding_mode, window_left, logits_soft_cap)
        refuse_arguments(
            "plan",
            custom_mask=(custom_mask, None),
            packed_custom_mask=(packed_custom_mask, None),
            prefix_len_ptr=(prefix_len_ptr, None),
            token_pos_in_items_ptr=(token_pos_in_items_ptr, None),
            token_pos_in_items_len=(token_pos_in_items_len, 0),
            max_item_len_ptr=(max_item_len_ptr, None),
            v_indptr=(v_indptr, None),
            o_indptr=(o_indptr, None),
        )
        self._check_plan(qo_indptr=qo_indptr, kv_indptr=kv_indptr)
        rows, keys = tables.bounds_of("qo_indptr", qo_indptr), tables.bounds_of("kv_indptr", kv_indptr)
        tables.check_from_zero("qo_indptr", rows)
        tables.check_from_zero("kv_indptr", keys)
        check_shape("kv_indptr", kv_indptr, (len(rows),))
        self._check_batch_size("qo_indptr", len(rows) - 1)
        self._check_rows(rows[-1])
        heads = (num_qo_heads, num_kv_heads, head_dim_qk)
        dtypes = (q_data_type, kv_data_type, o_data_type)
        planned = planned_of("plan", rows[-1], *heads, *dtypes, sm_scale, head_dim_vo=head_dim_vo, codes=())
        self._qo_indptr_buf = self._placed(self._qo_indptr_buf, qo_indptr, non_blocking)
        self._kv_indptr_buf = self._placed(self._kv_indptr_buf, kv_indptr, non_blocking)
        self._keep(planned, sm_scale, logits_soft_cap)
        self._causal = causal
        if self._max_total_num_rows is None:
            self._max_total_num_rows = rows[-1]
        self._qo_indptr_last, self._kv_rows = rows[-1], keys[-1]

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        o_scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        kv_cache_sf: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of q [qo_indptr[-1], Hq, D] over k and v [kv_indptr[-1], Hkv, D] (HND: [Hkv, kv_indptr[-1], D]).

        No device-to-host copy. q_scale and k_scale are factors of the scores. out, lse, return_lse, lse_base,
        lse_layout: as `BatchPrefillWithPagedKVCacheWrapper.run`.
        """
        planned = self._plan_of_run()
        refuse_arguments(
            "run",
            args=(args, ()),
            v_scale=(v_scale, None, 1),
            o_scale=(o_scale, None, 1),
            kv_cache_sf=(kv_cache_sf, None),
        )
        check_tensors(q=q)
        check_optional(out=out, lse=lse)
        k, v = as_tokens("k", k, self._kv_layout), as_tokens("v", v, self._kv_layout)
        planned.check(q, k)
        check_shape("k", k, (self._kv_rows, planned.num_kv_heads, planned.head_dim))
        assert self._qo_indptr_buf is not None
        assert self._kv_indptr_buf is not None
        written, returned = lse_views(q, lse, return_lse, lse_base, lse_layout)
        found = kernels.attention_varlen(
            q,
            k,
            v,
            self._qo_indptr_buf,
            self._kv_indptr_buf,
            scale=softmax_scale("run", self._sm_scale, planned.head_dim, q_scale, k_scale),
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
        k: Tensor,
        v: Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
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
        return self.run(q, k, v)

    def forward_return_lse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
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
        return self.run(q, k, v, return_lse=True)
