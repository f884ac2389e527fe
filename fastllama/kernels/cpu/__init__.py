"""Faster CPU implementations, in out-form, of the ops whose reference is measurably slower; the others run it."""

from fastllama.kernels.cpu.attention import attention_decode, attention_prefill, attention_varlen
from fastllama.kernels.cpu.matmul import matmul
from fastllama.kernels.cpu.rope import rope_and_write_kv

__all__ = ["attention_decode", "attention_prefill", "attention_varlen", "matmul", "rope_and_write_kv"]
