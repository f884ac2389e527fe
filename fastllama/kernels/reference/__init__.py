"""Torch-only definitions of every op: the oracle of tests (fp64 in, fp64 throughout) and the CPU backend."""

from fastllama.kernels.reference.adjust_logits import adjust_logits
from fastllama.kernels.reference.attention import attention_decode, attention_prefill, attention_varlen
from fastllama.kernels.reference.bf12 import matmul_bf12, pack_bf12, unpack_bf12
from fastllama.kernels.reference.int4 import dequantize_int4, matmul_int4, pack_int4, quantize_int4, unpack_int4
from fastllama.kernels.reference.int8 import dequantize_int8, matmul_int8, pack_int8, quantize_int8, unpack_int8
from fastllama.kernels.reference.lookup import embedding
from fastllama.kernels.reference.matmul import matmul
from fastllama.kernels.reference.merge import merge_state
from fastllama.kernels.reference.norm import add_rms_norm, rms_norm
from fastllama.kernels.reference.rope import rope, rope_and_write_kv, write_kv
from fastllama.kernels.reference.sampling import sample
from fastllama.kernels.reference.swiglu import silu_mul
from fastllama.kernels.reference.w8a8 import (
    add_rms_norm_int8,
    matmul_w8a8,
    quantize_rows,
    rms_norm_int8,
    silu_mul_int8,
)

__all__ = [
    "add_rms_norm",
    "add_rms_norm_int8",
    "adjust_logits",
    "attention_decode",
    "attention_prefill",
    "attention_varlen",
    "dequantize_int4",
    "dequantize_int8",
    "embedding",
    "matmul",
    "matmul_bf12",
    "matmul_int4",
    "matmul_int8",
    "matmul_w8a8",
    "merge_state",
    "pack_bf12",
    "pack_int4",
    "pack_int8",
    "quantize_int4",
    "quantize_int8",
    "quantize_rows",
    "rms_norm",
    "rms_norm_int8",
    "rope",
    "rope_and_write_kv",
    "sample",
    "silu_mul",
    "silu_mul_int8",
    "unpack_bf12",
    "unpack_int4",
    "unpack_int8",
    "write_kv",
]
