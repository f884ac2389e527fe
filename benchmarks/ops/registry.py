"""Every op at the shapes of Llama 2: inputs, the bytes it must move, the arithmetic it must do, and who judges it.

Bytes count each input read once and each output written once: time at the device's copy bandwidth is the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.ops import inputs as make
from benchmarks.ops.inputs import PAGE, Inputs, Maker, Model
from benchmarks.ops.judge import judge

JUDGED_PROMPT = 2048  # tokens: their scores in fp64 are 1 GiB of a 7B, and 64 times as much of eight times the prompt
JUDGE_BYTES = 40  # of memory for each byte of the case, at most: fp64 is four times bf16, and formulas have temporaries
LLAMA_2 = tuple(Model.of(f"llama-2-{size}") for size in ("7b", "70b", "13b"))
TOY = Model("toy", hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, vocab=128)


@dataclass(frozen=True)
class Case:
    """One op at one shape. rows: tokens, or sequences where the op has a row for each (sample, attention_decode)."""

    op: str
    model: Model
    rows: int
    context: int  # tokens that attention sees; 0 where there is none
    dtype: torch.dtype
    codes: torch.dtype | None = None  # of quantized pages

    @property
    def label(self) -> str:
        """The shape in words."""
        context = f", {self.context} tokens of context" if self.context else ""
        codes = "" if self.codes is None else f", {str(self.codes).removeprefix('torch.')} pages"
        return f"{self.model.name}, {self.rows} rows{context}{codes}"

    def make(self, device: torch.device, seed: int, rows: int | None = None) -> Inputs:
        """Fresh random inputs, and poisoned outputs; `rows` in place of the case's own."""
        generator = torch.Generator(device).manual_seed(seed)
        maker = Maker(self.model, rows or self.rows, self.context, self.codes, self.dtype, device, generator)
        return _OPS[self.op].make(maker)

    def bytes(self, inputs: Inputs) -> int:
        """The bytes that must move."""
        return _OPS[self.op].bytes(self, inputs)

    @property
    def flops(self) -> int:
        """Floating-point operations of the op's products; 0 where its arithmetic is beside the point."""
        return _OPS[self.op].flops(self)

    @property
    def kv_bytes(self) -> int:
        """Of the keys and values of all sequences, which alone can be more than a GPU holds; 0 where there are none."""
        if not self.context:
            return 0
        values = self.rows * -(-self.context // PAGE) * PAGE * self.model.kv_heads
        return 2 * values * (self.model.head_dim * (self.codes or self.dtype).itemsize + (4 if self.codes else 0))

    def judge(self, function: Callable[[Inputs], Any], device: torch.device) -> tuple[float, float]:
        """The error of function(inputs) against the fp64 reference, and what plain torch's own error allows.

        As in docs/numerics.md: relative to the largest value of a row, and at most twice plain torch's.
        """
        rows = min(self.rows, JUDGED_PROMPT) if self.op in ("attention_varlen", "attention_prefill") else self.rows
        if device.type != "cuda":
            return judge(self.op, function, self.make(device, seed=0, rows=rows))
        free = torch.cuda.mem_get_info(device)[0]
        if self.kv_bytes:  # before a byte of them is asked for
            rows = min(rows, max(free * rows // (JUDGE_BYTES * self.kv_bytes), 1))
        inputs = self.make(device, seed=0, rows=rows)
        share = torch.cuda.mem_get_info(device)[0] / (JUDGE_BYTES * max(self.bytes(inputs), 1))  # 0 bytes of no rows
        if share < 1:
            inputs = self.make(device, seed=0, rows=max(int(share * rows), 1))
        return judge(self.op, function, inputs)


class Shape(NamedTuple):
    """What a case is besides its op, its model and its dtype."""

    rows: int
    context: int = 0
    codes: torch.dtype | None = None


@dataclass(frozen=True)
class _Op:
    make: Callable[[Maker], Inputs]
    bytes: Callable[[Case, Inputs], int]
    shapes: tuple[Shape, ...]  # the most telling first
    flops: Callable[[Case], int] = lambda case: 0


def _rows(*rows: int) -> tuple[Shape, ...]:
    return tuple(map(Shape, rows))


def _all_bytes(case: Case, inputs: Inputs) -> int:
    """Every tensor once but scratch memory, and of the cos/sin cache only the rows that are read."""
    tensors = {name: value.nbytes for name, value in inputs.items() if isinstance(value, Tensor)}
    tensors.pop("workspace", None)
    if "cos_sin" in tensors:
        tensors["cos_sin"] = case.rows * case.model.head_dim * 4
    return sum(tensors.values())


def _page_bytes(case: Case, inputs: Inputs) -> int:
    """Of the pages only the slots that are written."""
    pages = sum(inputs[name].nbytes for name in ("k_pages", "v_pages"))
    slots = case.rows / inputs["k_pages"].shape[0] / PAGE
    return _all_bytes(case, inputs) - pages + round(pages * slots)


def _row_bytes(case: Case, inputs: Inputs) -> int:
    """Of the table only the rows that are read."""
    return inputs["ids"].nbytes + 2 * inputs["out"].nbytes


def _matmul_flops(case: Case) -> int:
    return 2 * case.rows * case.model.hidden * 2 * case.model.intermediate


def _causal_flops(case: Case) -> int:
    return 2 * case.model.heads * case.model.head_dim * case.rows * (case.rows + 1)


def _decode_flops(case: Case) -> int:
    return 4 * case.model.heads * case.model.head_dim * case.rows * case.context


ROWS = _rows(8192, 1, 64, 1024)
PRODUCTS = _rows(1, 64, 16, 1024, 8, 256, 32, 4, 128, 2)
PROMPTS = _rows(2048, 8192, 512, 16384, 4096, 1024)
DECODES = (
    Shape(1, 4096),
    Shape(64, 4096),
    Shape(1, 4096, torch.int8),
    Shape(8, 4096),
    Shape(1, 16384),
    Shape(64, 512),
    Shape(8, 16384),
    Shape(64, 4096, torch.int8),
    Shape(1, 32768),
    Shape(8, 32768),
    Shape(1, 512),
    Shape(8, 512),
    Shape(64, 16384),
    Shape(64, 32768),
)
_OPS = {
    "add_rms_norm": _Op(make.add_rms_norm, _all_bytes, ROWS),
    "rope_and_write_kv": _Op(make.rope_and_write_kv, _page_bytes, ROWS),
    "silu_mul": _Op(make.silu_mul, _all_bytes, ROWS),
    "sample": _Op(make.sample, _all_bytes, _rows(64, 1, 256)),
    "rms_norm": _Op(make.rms_norm, _all_bytes, ROWS),
    "rope": _Op(make.rope, _all_bytes, ROWS),
    "merge_state": _Op(make.merge_state, _all_bytes, ROWS),
    "attention_decode": _Op(make.attention_decode, _all_bytes, DECODES, _decode_flops),
    "attention_varlen": _Op(make.attention_varlen, _all_bytes, PROMPTS, _causal_flops),
    "attention_prefill": _Op(make.attention_prefill, _all_bytes, PROMPTS, _causal_flops),
    "matmul": _Op(make.matmul, _all_bytes, PRODUCTS, _matmul_flops),
    "matmul_int4": _Op(make.matmul_int4, _all_bytes, PRODUCTS, _matmul_flops),
    "matmul_int8": _Op(make.matmul_int8, _all_bytes, PRODUCTS, _matmul_flops),
    "quantize_rows": _Op(make.quantize_rows, _all_bytes, ROWS),
    "rms_norm_int8": _Op(make.rms_norm_int8, _all_bytes, ROWS),
    "add_rms_norm_int8": _Op(make.add_rms_norm_int8, _all_bytes, ROWS),
    "silu_mul_int8": _Op(make.silu_mul_int8, _all_bytes, ROWS),
    "matmul_w8a8": _Op(make.matmul_w8a8, _all_bytes, (*PRODUCTS, Shape(8192)), _matmul_flops),
    "embedding": _Op(make.embedding, _row_bytes, _rows(64, 1024)),
}
OPS = tuple(_OPS)


def cases(dtype: torch.dtype, ops: tuple[str, ...] = OPS) -> Iterator[Case]:
    """The cases of Llama 2, the most valuable first: large before small shapes, 7B before 70B and 13B."""
    most = max(len(_OPS[op].shapes) for op in ops)
    for rank in range(most + len(LLAMA_2)):
        for place, model in enumerate(LLAMA_2):
            for op in ops:
                if 0 <= rank - place < len(_OPS[op].shapes):
                    rows, context, codes = _OPS[op].shapes[rank - place]
                    yield Case(op, model, rows, context, dtype, codes)


def toy_cases(dtype: torch.dtype, ops: tuple[str, ...] = OPS) -> Iterator[Case]:
    """One small case of each op, and one with quantized pages where it has such, to walk the plan."""
    for op in ops:
        shapes = _OPS[op].shapes
        context = 2 * PAGE if shapes[0].context else 0
        for codes in dict.fromkeys(shape.codes for shape in shapes):
            yield Case(op, TOY, 3, context, dtype, codes)
