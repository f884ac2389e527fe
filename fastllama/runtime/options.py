"""Options of the engine, checked as far as possible without a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from fastllama.errors import check_choice
from fastllama.runtime.values import flag, integer

KV_DTYPES = {"auto": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}  # of the pages; None is the model's dtype
_LEAST = {
    "max_model_len": 2,  # a prompt of one token and its answer
    "kv_cache_tokens": 2,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "host_cache_tokens": 0,
    "seed": 0,
}


@dataclass(frozen=True)
class EngineOptions:
    """Options of the engine, checked as far as possible without a model.

    None is an option's default, or chosen by memory.sizes. A number may be NumPy's or a 0-d tensor.
    kv_cache_tokens and host_cache_tokens are rounded up to whole pages. kv_cache_dtype: one of KV_DTYPES.
    seed: seeds the random seeds of requests without one; None takes it from the system.
    deterministic: logits are batch-invariant. num_draft_tokens: draft tokens of a sequence in one step, if speculation
    is on; at most 7, since attention is verified for up to 8 tokens of a sequence at once.
    """

    max_model_len: int | None = None
    kv_cache_tokens: int | None = None
    host_cache_tokens: int = 0
    kv_cache_dtype: str = "auto"
    page_size: int = 64
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    seed: int | None = None
    deterministic: bool = False
    num_draft_tokens: int = 3  # a step of four rows, the most that CPU kernels take at once (docs/measured/runtime.md)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None:
                object.__setattr__(self, field.name, field.default)
        for name, low in _LEAST.items():
            self._check(name, low)
        if self.max_num_seqs is not None:
            self._check("max_num_batched_tokens", self.max_num_seqs)  # each running sequence advances in each step
        check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_DTYPES)
        self._check("page_size", 16, 256)
        self._check("num_draft_tokens", 1, 7)
        object.__setattr__(self, "deterministic", flag("deterministic", self.deterministic))

    def _check(self, name: str, low: int, high: int | None = None) -> None:
        if (value := getattr(self, name)) is not None:
            object.__setattr__(self, name, integer(name, value, low, high))
