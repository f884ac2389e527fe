"""The Numba implementation of each op, and of each quantization and packing of a weight."""

from __future__ import annotations

import numba

from fastllama.kernels.dispatch.backends import Kernels
from fastllama.kernels.numba import (
    adjust_logits,
    attention,
    bf12,
    int4,
    int8,
    matmul,
    norm,
    rope,
    rounding,
    sampling,
    swiglu,
)

if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set, and these kernels run as machine code alone")

KERNELS = {
    "add_rms_norm": Kernels(norm.add_rms_norm),
    "adjust_logits": Kernels(adjust_logits.adjust_logits),
    "attention_decode": Kernels(attention.attention_decode),
    "attention_prefill": Kernels(attention.attention_prefill),
    "matmul": Kernels(matmul.matmul),
    "matmul_bf12": Kernels(bf12.matmul_bf12),
    "matmul_int4": Kernels(int4.matmul_int4),
    "matmul_int8": Kernels(int8.matmul_int8),
    "pack_bf12": Kernels(bf12.pack_bf12),
    "pack_int4": Kernels(rounding.pack_int4),
    "pack_int8": Kernels(rounding.pack_int8),
    "quantize_int4": Kernels(rounding.quantize_int4),
    "quantize_int8": Kernels(rounding.quantize_int8),
    "rms_norm": Kernels(norm.rms_norm),
    "rope_and_write_kv": Kernels(rope.rope_and_write_kv),
    "sample": Kernels(sampling.sample),
    "silu_mul": Kernels(swiglu.silu_mul),
    "write_kv": Kernels(rope.write_kv),
}
