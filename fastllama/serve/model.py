"""What a request is judged by: facts of the model that is served, as plain values."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fastllama.io.chat import ChatFormat
from fastllama.io.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """The model behind the endpoints.

    names: under which it is served; responses name the first. any_name: whether requests may name any other, too.
    max_model_len: tokens of prompt and answer together. max_n: samples of a request at most. created: Unix time.
    fingerprint: `system_fingerprint`: the same where version, model, dtype, quantization and determinism are.
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
