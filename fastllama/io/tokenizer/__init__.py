"""Tokenizers of Llama checkpoints: a vocabulary in tokenizer.model or tokenizer.json, and its settings files."""

from fastllama.io.tokenizer.base import InfillingIds, Tokenizer, Vocabulary
from fastllama.io.tokenizer.conversion import as_tokenizer
from fastllama.io.tokenizer.find import load_tokenizer
from fastllama.io.tokenizer.sentencepiece_model import SentencePieceTokenizer
from fastllama.io.tokenizer.tokenizer_json import HFTokenizer

__all__ = [
    "HFTokenizer",
    "InfillingIds",
    "SentencePieceTokenizer",
    "Tokenizer",
    "Vocabulary",
    "as_tokenizer",
    "load_tokenizer",
]
