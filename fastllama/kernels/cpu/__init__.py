"""CPU implementations composed of torch ops, in out-form, where the reference is slow or takes too much memory."""

from fastllama.kernels.cpu.attention import attention_decode, attention_prefill, attention_varlen
from fastllama.kernels.cpu.int4 import matmul_int4
from fastllama.kernels.cpu.int8 import matmul_int8, matmul_w8a8
from fastllama.kernels.cpu.matmul import matmul

__all__ = [
    "attention_decode",
    "attention_prefill",
    "attention_varlen",
    "matmul",
    "matmul_int4",
    "matmul_int8",
    "matmul_w8a8",
]
