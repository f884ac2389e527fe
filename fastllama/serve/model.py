"""Facts of the served model that requests are checked against, as plain values."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fastllama.io.chat import ChatFormat
from fastllama.io.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """The served model.

    names: the names it is served under; responses use the first. any_name: whether requests may use any other name too.
    max_model_len: tokens of prompt and answer together. max_n: most samples of a request. created: Unix time.
    fingerprint: `system_fingerprint`; equal for equal version, model, dtype, quantization and determinism.
    notice: limits and licence of the model, Markdown.
    """

    names: tuple[str, ...]
    any_name: bool
    tokenizer: Tokenizer
    chat_format: ChatFormat
    eos_token_ids: Collection[int]
    vocab_size: int
    max_model_len: int
    max_n: int
    created: int
    fingerprint: str
    notice: str
