"""Every op as a Llama calls it, with the bytes that must move and the operations; important calls first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fastllama.catalogue.arguments import in_order
from fastllama.catalogue.maker import Arguments, Maker
from fastllama.catalogue.rotary import PAGE
from fastllama.catalogue.sizes import LLAMA_2, TOY, LlamaSizes
from fastllama.catalogue.table import CATALOGUE, Shape

MEASURED = tuple(op for op, entry in CATALOGUE.items() if entry.only is None)


@dataclass(frozen=True)
class LlamaCall:
    """One op at one shape. rows, context, pages_dtype: as in `Shape`."""

    op: str
    sizes: LlamaSizes
    rows: int
    context: int
    dtype: torch.dtype
    pages_dtype: torch.dtype | None = None

    @property
    def label(self) -> str:
        """The shape as text."""
        context = f", {self.context} tokens of context" if self.context else ""
        pages = "" if self.pages_dtype is None else f", {str(self.pages_dtype).removeprefix('torch.')} pages"
        return f"{self.sizes.name}, {self.rows} rows{context}{pages}"

    @property
    def shape(self) -> Shape:
        """The shape, without op, sizes and dtype."""
        return Shape(self.rows, self.context, self.pages_dtype)

    def make(self, device: torch.device, seed: int, rows: int | None = None) -> Arguments:
        """New random inputs, and poisoned outputs; `rows` overrides the call's own."""
        shape = self.shape if rows is None else self.shape._replace(rows=rows)
        return in_order(self.op, CATALOGUE[self.op].llama(Maker.seeded(self.dtype, device, seed), self.sizes, shape))

    def bytes(self, call: Arguments) -> int:
        """The bytes that must move."""
        return CATALOGUE[self.op].bytes(self.sizes, self.shape, call)

    @property
    def flops(self) -> int:
        """Floating-point operations of the op's matmuls; 0 where the op is bound by memory."""
        return CATALOGUE[self.op].flops(self.sizes, self.shape)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of all sequences, which may exceed a GPU's memory; 0 where there are none."""
        if not self.context:
            return 0
        values = self.rows * -(-self.context // PAGE) * PAGE * self.sizes.kv_heads
        per_head = self.sizes.head_dim * (self.pages_dtype or self.dtype).itemsize + (4 if self.pages_dtype else 0)
        return 2 * values * per_head


def llama_calls(
    dtype: torch.dtype, ops: Sequence[str] = MEASURED, models: Sequence[LlamaSizes] = LLAMA_2
) -> Iterator[LlamaCall]:
    """The calls of Llama 2, by importance: large before small shapes, 7B before 70B and 13B."""
    most = max(len(CATALOGUE[op].shapes) for op in ops)
    for rank in range(most + len(models)):
        for place, sizes in enumerate(models):
            for op in ops:
                if 0 <= rank - place < len(CATALOGUE[op].shapes):
                    shape = CATALOGUE[op].shapes[rank - place]
                    yield LlamaCall(op, sizes, shape.rows, shape.context, dtype, shape.pages_dtype)


def toy_calls(dtype: torch.dtype, ops: Sequence[str] = MEASURED) -> Iterator[LlamaCall]:
    """One small call of each op, and one with quantized pages where supported, for trial runs."""
    for op in ops:
        shapes = CATALOGUE[op].shapes
        context = 2 * PAGE if shapes[0].context else 0
        for pages_dtype in dict.fromkeys(shape.pages_dtype for shape in shapes):
            yield LlamaCall(op, TOY, 3, context, dtype, pages_dtype)
