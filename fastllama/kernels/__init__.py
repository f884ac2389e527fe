"""Every op that Llama needs, as functions on tensors on any device, independent of modules, models and requests.

The examples in their docstrings assume `import torch` and `from fastllama import kernels`.
"""

from fastllama.kernels.dispatch.backends import Implementation
from fastllama.kernels.dispatch.op import backend_of
from fastllama.kernels.ops.adjust_logits import adjust_logits
from fastllama.kernels.ops.attention import attention_decode, attention_prefill, attention_varlen, attention_workspace
from fastllama.kernels.ops.bf12 import matmul_bf12, pack_bf12, unpack_bf12
from fastllama.kernels.ops.int4 import (
    dequantize_int4,
    matmul_int4,
    matmul_int4_workspace,
    pack_int4,
    quantize_int4,
    unpack_int4,
)
from fastllama.kernels.ops.int8 import (
    dequantize_int8,
    matmul_int8,
    matmul_int8_workspace,
    pack_int8,
    quantize_int8,
    unpack_int8,
)
from fastllama.kernels.ops.matmul import embedding, matmul, matmul_workspace
from fastllama.kernels.ops.merge import merge_state
from fastllama.kernels.ops.norm import add_rms_norm, rms_norm
from fastllama.kernels.ops.quantize_rows import add_rms_norm_int8, quantize_rows, rms_norm_int8, silu_mul_int8
from fastllama.kernels.ops.rope import cos_sin_cache, rope, rope_and_write_kv
from fastllama.kernels.ops.sampling import sample, sample_workspace
from fastllama.kernels.ops.swiglu import silu_mul
from fastllama.kernels.ops.w8a8 import matmul_w8a8, matmul_w8a8_workspace
from fastllama.kernels.ops.write_kv import write_kv

__all__ = [
    "Implementation",
    "add_rms_norm",
    "add_rms_norm_int8",
    "adjust_logits",
    "attention_decode",
    "attention_prefill",
    "attention_varlen",
    "attention_workspace",
    "backend_of",
    "cos_sin_cache",
    "dequantize_int4",
    "dequantize_int8",
    "embedding",
    "matmul",
    "matmul_bf12",
    "matmul_int4",
    "matmul_int4_workspace",
    "matmul_int8",
    "matmul_int8_workspace",
    "matmul_w8a8",
    "matmul_w8a8_workspace",
    "matmul_workspace",
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
    "sample_workspace",
    "silu_mul",
    "silu_mul_int8",
    "unpack_bf12",
    "unpack_int4",
    "unpack_int8",
    "write_kv",
]
