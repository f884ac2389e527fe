"""CPU implementations composed of torch ops, in out-form, where the reference is slow or takes too much memory.

All multiply in full precision, whatever the process has set.
"""

from fastllama.kernels.cpu.attention import attention_decode as _attention_decode
from fastllama.kernels.cpu.attention import attention_prefill as _attention_prefill
from fastllama.kernels.cpu.attention import attention_varlen as _attention_varlen
from fastllama.kernels.cpu.int4 import matmul_int4 as _matmul_int4
from fastllama.kernels.cpu.int8 import matmul_int8 as _matmul_int8
from fastllama.kernels.cpu.int8 import matmul_w8a8 as _matmul_w8a8
from fastllama.kernels.cpu.matmul import matmul as _matmul
from fastllama.kernels.dispatch.isolation import in_full_precision

attention_decode = in_full_precision(_attention_decode)
attention_prefill = in_full_precision(_attention_prefill)
attention_varlen = in_full_precision(_attention_varlen)
matmul = in_full_precision(_matmul)
matmul_int4 = in_full_precision(_matmul_int4)
matmul_int8 = in_full_precision(_matmul_int8)
matmul_w8a8 = in_full_precision(_matmul_w8a8)

__all__ = [
    "attention_decode",
    "attention_prefill",
    "attention_varlen",
    "matmul",
    "matmul_int4",
    "matmul_int8",
    "matmul_w8a8",
]
