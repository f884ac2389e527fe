"""Faster CPU implementations, in out-form, of ops for which the reference is measurably slower; every other op runs the reference."""

from fastllama.kernels.cpu.attention import attention_decode, attention_prefill, attention_varlen
from fastllama.kernels.cpu.matmul import matmul
from fastllama.kernels.cpu.rope import rope_and_write_kv

__all__ = ["attention_decode", "attention_prefill", "attention_varlen", "matmul", "rope_and_write_kv"]
