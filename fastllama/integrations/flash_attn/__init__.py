"""flash-attn's functions, with its signatures, on fastllama's ops: only the import changes."""

from fastllama.integrations.flash_attn import bert_padding
from fastllama.integrations.flash_attn.attention import flash_attn_func, flash_attn_varlen_func
from fastllama.integrations.flash_attn.kvcache import flash_attn_with_kvcache
from fastllama.integrations.flash_attn.packed import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "bert_padding",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
