"""The runtime's options, checked as far as they can be without a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastllama.errors import check_choice, check_range

KV_DTYPES = {"auto": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}  # of pages; None is the model's


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of the runtime, checked as far as they can be without the model; None is chosen by memory.sizes.

    kv_cache_tokens and host_cache_tokens are rounded up to whole pages. kv_cache_dtype: one of KV_DTYPES.
    seed: of the draws of requests that bring none; None takes one of the system's.
    deterministic: a request's logits do not depend on what else runs. num_draft_tokens: drafts behind a
    sequence's last token in one step, if something proposes them: 7 at most, for attention is proven for 8 tokens of a
    sequence at once.
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
    num_draft_tokens: int = 3  # a step of four rows, the most that CPU kernels take at once (docs/tuning.md)

    def __post_init__(self) -> None:
        least = {"max_model_len": 2, "kv_cache_tokens": 2}  # a prompt of one token and its answer
        least |= {"max_num_seqs": 1, "max_num_batched_tokens": 1}
        for name, low in least.items():
            if getattr(self, name) is not None:
                self._check(name, low)
        if self.max_num_seqs is not None and self.max_num_batched_tokens is not None:
            self._check("max_num_batched_tokens", self.max_num_seqs)  # each running sequence advances in each step
        self._check("host_cache_tokens", 0)
        check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_DTYPES)
        self._check("page_size", 16, 256)
        if self.seed is not None:
            self._check("seed", 0)
        self._check("num_draft_tokens", 1, 7)
        if not isinstance(self.deterministic, bool):
            raise TypeError(f"deterministic must be True or False, got {self.deterministic!r}")

    def _check(self, name: str, low: int, high: int | None = None) -> None:
        value = getattr(self, name)
        check_range(name, value, low, high)
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
