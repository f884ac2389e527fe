"""The Triton implementation of each op."""

from __future__ import annotations

from fastllama.kernels.dispatch.backends import Kernels
from fastllama.kernels.triton.attention import decode, merge, prefill
from fastllama.kernels.triton.matmul import dense, int4, int8, quantized, w8a8
from fastllama.kernels.triton.rows import embedding, norm, quantize_rows, rope, swiglu, write_kv
from fastllama.kernels.triton.sampling import adjust_logits, draw

KERNELS = {
    "add_rms_norm": Kernels(norm.add_rms_norm),
    "add_rms_norm_int8": Kernels(norm.add_rms_norm_int8),
    "adjust_logits": Kernels(adjust_logits.adjust_logits),
    "attention_decode": Kernels(decode.attention_decode, decode.workspace_size),
    "attention_prefill": Kernels(prefill.attention_prefill),
    "attention_varlen": Kernels(prefill.attention_varlen),
    "embedding": Kernels(embedding.embedding),
    "matmul": Kernels(dense.matmul, dense.workspace_size, dense.few_rows, dense.fuses),
    "matmul_int4": Kernels(int4.matmul_int4, quantized.workspace_size, quantized.few_rows, int4.fuses),
    "matmul_int8": Kernels(int8.matmul_int8, quantized.workspace_size, quantized.few_rows, int8.fuses),
    "matmul_w8a8": Kernels(w8a8.matmul_w8a8, w8a8.workspace_size),
    "merge_state": Kernels(merge.merge_state),
    "quantize_rows": Kernels(quantize_rows.quantize_rows),
    "rms_norm": Kernels(norm.rms_norm),
    "rms_norm_int8": Kernels(norm.rms_norm_int8),
    "rope": Kernels(rope.rope),
    "rope_and_write_kv": Kernels(rope.rope_and_write_kv),
    "sample": Kernels(draw.sample, draw.workspace_size),
    "silu_mul": Kernels(swiglu.silu_mul),
    "silu_mul_int8": Kernels(swiglu.silu_mul_int8),
    "write_kv": Kernels(write_kv.write_kv),
}
