"""How the drop-in adapters treat each argument of the functions that they replace, and which functions they lack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

Kind = Literal["taken", "ignored", "refused"]


@dataclass(frozen=True)
class Treatment:
    """Arguments by name, or by "function.name" or "module.name" where these treat a name unlike the others.

    taken: has the same effect.
    ignored: changes nothing of the result: a value to try, and why that is right.
    refused: raises NotImplementedError by its name: a value that is refused. What means "off" is legal.
    absent: functions, classes and methods that there is nothing for, by the reason.
    """

    taken: str
    ignored: Mapping[str, tuple[Any, str]]
    refused: Mapping[str, Any]
    absent: Mapping[str, str]

    def keys(self) -> dict[Kind, set[str]]:
        return {"taken": set(self.taken.split()), "ignored": set(self.ignored), "refused": set(self.refused)}

    def of(self, module: str, function: str, argument: str) -> tuple[Kind, str]:
        """The treatment of an argument, and its key. Raises KeyError where not exactly one key matches."""
        for key in (f"{function}.{argument}", f"{module.split('.')[-1]}.{argument}", argument):
            found: list[Kind] = [kind for kind, names in self.keys().items() if key in names]
            if len(found) == 1:
                return found[0], key
            if found:
                raise KeyError(f"{key} is {' and '.join(found)}")
        raise KeyError(f"{function} has an argument {argument} without a treatment")

    def why_absent(self, name: str) -> str | None:
        """The reason why a function, class or method is not there; None if it is, or should be."""
        found = [why for why, names in self.absent.items() if {name, name.split(".")[0]} & set(names.split())]
        assert len(found) < 2, f"{name}: {found}"
        return found[0] if found else None


SIZES = "the workspace depends on sizes alone"
SPLITS = "the ops choose how the work is split"
VECTOR = torch.ones(2, dtype=torch.float32)


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


FLASH_ATTN = Treatment(
    taken="""
        q k v kv qkv k_cache v_cache cu_seqlens cu_seqlens_q cu_seqlens_k cache_seqlens seqused_q seqused_k
        block_table page_table cache_batch_idx cache_leftpad cu_seqlens_k_new
        rotary_cos rotary_sin rotary_interleaved rotary_seqlens
        softmax_scale causal out return_attn_probs return_softmax_lse return_lse num_heads_q
        hidden_states attention_mask indices batch seqlen unused_mask
    """,
    ignored={
        "deterministic": (True, "the order of summation is fixed"),
        "max_seqlen": (3, "it follows from the indptr (cu_seqlens)"),
        "max_seqlen_q": (3, "it follows from the indptr (cu_seqlens)"),
        "max_seqlen_k": (3, "it follows from the indptr (cu_seqlens)"),
        "num_splits": (2, SPLITS),
        "pack_gqa": (True, SPLITS),
        "sm_margin": (4, SPLITS),
        "scheduler_metadata": (VECTOR, SPLITS),
        "fa_version": (3, "one implementation runs"),
    },
    refused={
        "dropout_p": 0.1,
        "window_size": (4, 0),
        "softcap": 30.0,
        "alibi_slopes": VECTOR,
        "learnable_sink": VECTOR,
        "s_aux": VECTOR,
        "attention_chunk": 4,
        "qv": VECTOR,
        "q_descale": VECTOR,
        "k_descale": VECTOR,
        "v_descale": VECTOR,
        "score_mod": max,
        "mask_mod": max,
    },
    absent={
        "helpers of its own": "maybe_contiguous round_multiple",
        "for training; these ops are for inference": "index_put_first_axis index_first_axis_residual",
        "merges partial results of its own kernels; kernels.merge_state merges ours": "flash_attn_combine",
        "plans launches of its own kernels": "get_scheduler_metadata",
        "masks that pack several sequences into a row": "unpad_input_for_concatenated_sequences",
    },
)
FLASHINFER = Treatment(
    taken="""
        input weight residual eps out logits temperature
        q k indptr offsets pos_ids rotary_dim interleave rope_scale rope_theta low_freq_factor high_freq_factor
        old_context_len positions query key head_size cos_sin_cache is_neox
        probs top_k top_p min_p indices filter_apply_order generator check_nan seed offset return_valid
        append_key append_value batch_indices paged_kv_cache kv_indices kv_indptr kv_layout append_indptr seq_lens nnz
        kv_last_page_len page_size v s v_a s_a v_b s_b v_other s_other mask
        self float_workspace_buffer use_cuda_graph workspace_buffer indptr_buffer indices_buffer last_page_len_buffer
        paged_kv_indptr_buffer paged_kv_indices_buffer paged_kv_last_page_len_buffer
        qo_indptr_buf paged_kv_indptr_buf paged_kv_indices_buf paged_kv_last_page_len_buf kv_indptr_buf
        last_page_len qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len
        num_qo_heads num_kv_heads head_dim head_dim_qk q_data_type kv_data_type data_type q_len_per_req
        causal sm_scale non_blocking global_override_indptr_cpu
        q_scale k_scale v_scale lse return_lse lse_base lse_layout
    """,
    ignored={
        "enable_pdl": (True, "launches overlap where a kernel can"),
        "deterministic": (False, "sampling is deterministic"),
        "is_deterministic": (True, "renormalising is deterministic"),
        "append_paged_kv_cache.kv_last_page_len": (integers(2, 1), "it follows from the positions"),
        "backend": ("fa2", "one implementation runs"),
        "use_tensor_cores": (True, "the ops choose their kernel"),
        "BatchDecodeWithPagedKVCacheWrapper.workspace_size.pos_encoding_mode": ("ROPE_LLAMA", SIZES),
        "BatchDecodeWithPagedKVCacheWrapper.workspace_size.window_left": (4, SIZES),
        "BatchDecodeWithPagedKVCacheWrapper.workspace_size.logits_soft_cap": (30.0, SIZES),
        "BatchDecodeWithPagedKVCacheWrapper.workspace_size.o_data_type": ("float16", SIZES),
        "BatchDecodeWithPagedKVCacheWrapper.workspace_size.sm_scale": (0.5, SIZES),
        "BatchDecodeWithPagedKVCacheWrapper.workspace_size.last_page_len": (integers(2, 2), SIZES),
        "BatchPrefillWithPagedKVCacheWrapper.workspace_size.causal": (True, SIZES),
        "use_fp16_qk_reduction": (True, "sums are fp32"),
        "use_fp16_softmax": (True, "sums are fp32"),
        "int_workspace_buffer": (VECTOR, "no op needs it"),
        "variant": ("shared", "caches of any strides are taken"),
        "decode.rope_scale": (2.0, "apply to rotation inside attention, which is refused"),
        "decode.rope_theta": (1e6, "apply to rotation inside attention, which is refused"),
        "prefill.rope_scale": (2.0, "apply to rotation inside attention, which is refused"),
        "prefill.rope_theta": (1e6, "apply to rotation inside attention, which is refused"),
        "decode.seq_lens": (integers(3, 2), "it follows from the page indptr and indices"),
        "prefill.seq_lens": (integers(3, 2), "it follows from the page indptr and indices"),
        "seq_lens_q": (integers(2, 1), "it follows from the indptr (cu_seqlens)"),
        "block_tables": (integers(4, 1, 0, 0).view(2, 2), "it follows from the page indptr and indices"),
        "max_token_per_sequence": (2, "it follows from the indptr (cu_seqlens)"),
        "max_sequence_kv": (3, "it follows from the indptr (cu_seqlens)"),
        "uniform_q_len": (2, "it follows from the indptr (cu_seqlens)"),
        "fixed_split_size": (4, SPLITS),
        "disable_split_kv": (True, SPLITS),
    },
    refused={
        "pos_encoding_mode": "ROPE_LLAMA",
        "window_left": 4,
        "window_right": 4,
        "logits_soft_cap": 30.0,
        "custom_mask": VECTOR,
        "packed_custom_mask": VECTOR,
        "custom_mask_buf": VECTOR,
        "mask_indptr_buf": VECTOR,
        "head_dim_vo": 8,
        "o_data_type": "float16",
        "o_dtype": torch.float16,
        "prefix_len_ptr": VECTOR,
        "token_pos_in_items_ptr": VECTOR,
        "token_pos_in_items_len": 4,
        "max_item_len_ptr": VECTOR,
        "v_indptr": VECTOR,
        "o_indptr": VECTOR,
        "jit_args": ["name"],
        "jit_kwargs": {"name": 1},
        "variant_owns_mask": True,
        "args": (VECTOR,),
        "sinks": VECTOR,
        "skip_softmax_threshold_scale_factor": 1.0,
        "kv_cache_sf": VECTOR,
        "uses_spcompress": True,
        "o_scale": 2.0,
        "scale_q": VECTOR,
        "scale_k": VECTOR,
        "scale_v": VECTOR,
        "is_causal": True,
    },
    absent={
        "GELU, LayerNorm and Gemma's norm are no part of a Llama": """
            gelu_and_mul gelu_tanh_and_mul layernorm layernorm_quant gemma_rmsnorm gemma_fused_add_rmsnorm
        """,
        "norms fused with what a Llama lacks, or with rounding to fp8": """
            rmsnorm_quant fused_add_rmsnorm_quant fused_add_rmsnorm_fp8_block_quant fused_rmsnorm_silu
            fused_qk_rmsnorm_rope rmsnorm_sigmoid_gate
            fused_dit_gate_residual_layernorm_gamma_beta fused_dit_gate_residual_layernorm_scale_shift
            fused_dit_residual_layernorm_scale_shift
            gated_residual_rmsnorm gated_residual_next_rmsnorm
            supports_gated_residual_rmsnorm supports_gated_residual_next_rmsnorm
        """,
        "4-bit floats (NVFP4), which no op here reads": """
            silu_and_mul_scaled_nvfp4_experts_quantize nvfp4_quantize_append_paged_kv_cache
            nvfp4_quantize_append_paged_kv_cache_with_slot_mapping nvfp4_quantize_append_paged_mla_kv_cache
            prepare_nvfp4_attention minimax_h3_varlen_nvfp4_attention
        """,
        "multi-head latent attention and its rotation are DeepSeek's": """
            BatchDecodeMlaWithPagedKVCacheWrapper append_paged_mla_kv_cache mla_rope_quantize_fp8
        """,
        "rotation fused with rounding to fp8": "rope_quantize_fp8 rope_quantize_fp8_append_paged_kv_cache",
        "a wrapper for each level of prefixes, and merge_state, do the same": """
            BatchDecodeWithSharedPrefixPagedKVCacheWrapper BatchPrefillWithSharedPrefixPagedKVCacheWrapper
            MultiLevelCascadeAttentionWrapper
        """,
        "kernels for one generation of GPUs, or another library's, under names of their own": """
            TrtllmGenDecodeModule trtllm_batch_decode_with_kv_cache trtllm_batch_context_with_kv_cache
            trtllm_fmha_v2_prefill trtllm_ragged_attention_deepseek trtllm_sage_attention_quantize
            xqa_batch_decode_with_kv_cache fmha_v2_prefill_deepseek fmha_v2_prefill_sm120 fmha_varlen fmha_varlen_plan
            minimax_h3_varlen_attention sm110_gqa_decode prepare_sm110_gqa_decode launch_sm110_gqa_decode_prepared
            prepare_balanced_batch_decode_with_kv_cache
        """,
        "kernels that a user compiles": """
            single_decode_with_kv_cache_with_jit_module single_prefill_with_kv_cache_with_jit_module
            get_customize_batch_prefill_module
        """,
        "the runtime verifies draft tokens (`speculation=`)": "chain_speculative_sampling",
        "helpers of its own": "get_seed_and_offset make_hashable_cache",
    },
)
TREATMENTS = {"flash_attn": FLASH_ATTN, "flashinfer": FLASHINFER}
