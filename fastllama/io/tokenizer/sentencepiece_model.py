"""SentencePiece's tokenizer.model."""

from __future__ import annotations

import re
from pathlib import Path

import sentencepiece

from fastllama.errors import CheckpointError
from fastllama.io.tokenizer.base import SPACE, Tokenizer, Vocabulary
from fastllama.io.tokenizer.settings import read_settings

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece tokenizer.model (Llama 1 and 2, Code Llama): BPE with byte pieces and a leading space."""

    def __init__(self, path: Path) -> None:
        """`path`: the model file. CheckpointError if it is not a SentencePiece model with BOS and EOS pieces."""
        data = path.read_bytes()
        if not data:  # SentencePiece takes no bytes for a model, and complains on stderr when asked
            raise CheckpointError(f"{path} is empty; legal: a SentencePiece tokenizer.model")
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(data)
        except RuntimeError:
            raise CheckpointError(f"{path} is broken or not a SentencePiece tokenizer.model") from None
        bos, eos, pad = self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id()
        if bos < 0 or eos < 0:
            raise CheckpointError(f"{path} is not a Llama tokenizer: it has no {'BOS' if bos < 0 else 'EOS'} piece")
        super().__init__(path, self._vocabulary(), bos, eos, pad if pad >= 0 else None, read_settings(path.parent))

    def _vocabulary(self) -> Vocabulary:
        processor = self._processor
        ids = list(range(processor.vocab_size()))
        pieces = dict(enumerate(processor.id_to_piece(ids)))
        text = {i: piece_bytes(piece) for i, piece in pieces.items()}
        hidden = zip(ids, processor.is_control(ids), processor.is_unknown(ids), strict=True)
        return Vocabulary(pieces, text, frozenset(i for i, control, unknown in hidden if control or unknown))

    def _encode_raw(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids


def piece_bytes(piece: str) -> bytes:
    """UTF-8 of a SentencePiece piece; one byte for a byte piece such as "<0x0A>"."""
    return bytes([int(piece[3:5], 16)]) if _BYTE_PIECE.fullmatch(piece) else piece.replace(SPACE, " ").encode()
