"""Token ids to text, one id at a time, for streaming and for matching stop strings."""

from __future__ import annotations

import codecs
import copy
import io
from collections.abc import Sequence

from fastllama.io.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text that generated ids append to a prompt, in pieces of whole characters.

    The results of `push` and a last `flush` concatenate to `decode(prompt + generated)[len(decode(prompt)):]`. Each id
    stands for fixed bytes, so the state is an incremental UTF-8 decoder (at most three pending bytes) and a flag for
    the dropped leading space: constant work per id, however long the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        """prompt_ids: the ids before the generated ones; their text is not emitted."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_space = tokenizer.adds_leading_space
        self._emitted = io.StringIO()
        for token_id in self._end_of(prompt_ids):
            self._decode(token_id)
        # A prompt that ends inside a character has emitted U+FFFD for it: its completion is not new text.
        self._already_shown = len(self._decoder.getstate()[0].decode("utf-8", "replace"))

    def _end_of(self, prompt_ids: Sequence[int]) -> Sequence[int]:
        """The last tokens of a prompt, of at least four bytes, the longest character: earlier ones change nothing."""
        size, count = 0, 0
        while size < 4 and count < len(prompt_ids):
            count += 1
            size += len(self._tokenizer.token_bytes(prompt_ids[-count], skip_special_tokens=self._skip))
        return prompt_ids[len(prompt_ids) - count :]

    def push(self, token_id: int) -> str:
        """The text that became certain: "" while a character is incomplete. ValueError for an id without a piece."""
        return self._emit(self._decode(token_id))

    def flush(self) -> str:
        """The end of the text: U+FFFD if it stopped inside a character, else ""."""
        return self._emit(self._decoder.decode(b"", final=True))

    def fork(self, *, skip_special_tokens: bool) -> IncrementalDetokenizer:
        """A copy of the state, with its own `skip_special_tokens`."""
        other = copy.copy(self)
        other._skip = skip_special_tokens
        other._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        other._decoder.setstate(self._decoder.getstate())
        other._emitted = io.StringIO()
        other._emitted.write(self.text)
        return other

    @property
    def text(self) -> str:
        """All text emitted so far."""
        return self._emitted.getvalue()

    def _decode(self, token_id: int) -> str:
        data = self._tokenizer.token_bytes(token_id, skip_special_tokens=self._skip)
        if self._drops_space and data:
            self._drops_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def _emit(self, text: str) -> str:
        if self._already_shown and text:
            text = text[self._already_shown :]
            self._already_shown = 0
        self._emitted.write(text)
        return text
