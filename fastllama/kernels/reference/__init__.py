"""Torch-only definitions of every op: the oracle of tests (fp64 in, fp64 throughout) and the CPU backend."""

from fastllama.kernels.reference.attention import attention_decode, attention_prefill, attention_varlen
from fastllama.kernels.reference.bf12 import matmul_bf12, pack_bf12, unpack_bf12
from fastllama.kernels.reference.matmul import embedding, matmul
from fastllama.kernels.reference.merge import merge_state
from fastllama.kernels.reference.norm import add_rms_norm, rms_norm
from fastllama.kernels.reference.rope import rope, rope_and_write_kv
from fastllama.kernels.reference.sampling import sample
from fastllama.kernels.reference.swiglu import silu_mul

__all__ = [
    "add_rms_norm",
    "attention_decode",
    "attention_prefill",
    "attention_varlen",
    "embedding",
    "matmul",
    "matmul_bf12",
    "merge_state",
    "pack_bf12",
    "rms_norm",
    "rope",
    "rope_and_write_kv",
    "sample",
    "silu_mul",
    "unpack_bf12",
]
