"""The model facts that requests are checked against: the bundled model's, with one chat format or another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import fastllama
from fastllama import LLM
from fastllama.io.chat import chat_format
from fastllama.io.tokenizer import Tokenizer, load_tokenizer
from fastllama.serve.model import ServedModel

TINY = Path(fastllama.__file__).parent / "assets" / "tiny"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TINY)


def served(tokenizer: Tokenizer, choice: str) -> ServedModel:
    return ServedModel(
        names=("tiny", "alias"),
        any_name=True,
        tokenizer=tokenizer,
        chat_format=chat_format(tokenizer, choice=choice),
        eos_token_ids=(tokenizer.eos_token_id,),
        vocab_size=tokenizer.vocab_size,
        max_model_len=256,
        max_n=4,
        created=1_700_000_000,
        fingerprint="fp_test",
        notice="",
    )


@pytest.fixture(scope="session")
def llama2(tokenizer: Tokenizer) -> ServedModel:
    """The bundled model asked in Llama 2's chat format, under any name; 256 tokens of context, 4 samples."""
    return served(tokenizer, "llama2")


@pytest.fixture(scope="session")
def plain(tokenizer: Tokenizer) -> ServedModel:
    """The same asked in plain text."""
    return served(tokenizer, "plain")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", kv_cache_tokens=4096, max_num_seqs=4) as llm:
        yield llm
