"""The table of ops: a small call, a Llama's call, the measured shapes, the bytes and the operations.

Bytes count each input read once and each output written once: at the device's copy bandwidth they give the floor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllama.catalogue import attention, matmuls, rotary, rows, sampling
from fastllama.catalogue.arguments import SCRATCH, in_order
from fastllama.catalogue.maker import Arguments, Maker
from fastllama.catalogue.rotary import PAGE
from fastllama.catalogue.sizes import LlamaSizes

# Of small calls: tokens, query heads, key heads, head dimension, pages, page size. All different, so that torch.compile
# does not unify symbolic sizes.
T, HQ, HKV, D, P, SMALL_PAGE = 3, 6, 2, 8, 5, 7
POSITIONS, FEATURES, VOCAB = 16, 6, 9  # of small calls
SMALL_PAGES: dict[str, Any] = {"page": SMALL_PAGE, "pages": P, "width": 2}
SMALL_LENGTHS, SMALL_QUERIES = (6, 3, 0), (2, 1, 0)  # the last sequence is padding
SMALL_FILTERS = ((0.0, 0, 1.0, 0.0), (1.0, 5, 0.9, 0.0), (0.5, 2, 1.0, 0.1))
FORM = "bias, norm, residual"  # of small matmuls


class Shape(NamedTuple):
    """One call of a Llama. rows: tokens, or sequences where the op has a row for each (sample, attention_decode).

    context: sequence length of attention_decode, 0 elsewhere. pages_dtype: of quantized pages.
    """

    rows: int
    context: int = 0
    pages_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class CatalogueEntry:
    """The catalogue's entry of an op.

    small: one call with all tensors that the op accepts, in distinct sizes. llama: the call of a Llama's layer; for
    matmuls, of its largest weight. shapes: measured shapes, by importance. flops: floating-point operations; 0 where
    the op is bound by memory. only: the device type that the op is restricted to; any where None.
    """

    small: Callable[[Maker], Arguments]
    llama: Callable[[Maker, LlamaSizes, Shape], Arguments]
    shapes: tuple[Shape, ...]
    bytes: Callable[[LlamaSizes, Shape, Arguments], int]
    flops: Callable[[LlamaSizes, Shape], int] = lambda sizes, shape: 0
    only: str | None = None


def small_call(op: str) -> Arguments:
    """Every argument by name except an optional log-sum-exp, in fp32 on the CPU."""
    return in_order(op, CATALOGUE[op].small(Maker(torch.float32)))


def _all_bytes(sizes: LlamaSizes, shape: Shape, call: Arguments) -> int:
    """Every tensor once, without scratch memory; of the cos/sin cache only the rows read."""
    tensors = {name: value.nbytes for name, value in call.items() if isinstance(value, Tensor) and name != SCRATCH}
    if "cos_sin" in tensors:
        tensors["cos_sin"] = shape.rows * sizes.head_dim * call["cos_sin"].element_size()
    return sum(tensors.values())


def _page_bytes(sizes: LlamaSizes, shape: Shape, call: Arguments) -> int:
    """As `_all_bytes`, but of the pages only the written slots."""
    pages = sum(call[name].nbytes for name in ("k_pages", "v_pages"))
    slots = shape.rows / call["k_pages"].shape[0] / PAGE
    return _all_bytes(sizes, shape, call) - pages + round(pages * slots)


def _row_bytes(sizes: LlamaSizes, shape: Shape, call: Arguments) -> int:
    """As `_all_bytes`, but of the table only the rows read."""
    return int(call["ids"].nbytes + 2 * call["out"].nbytes)


def _matmul_flops(sizes: LlamaSizes, shape: Shape) -> int:
    features, size = sizes.gate_up
    return 2 * shape.rows * features * size


def _causal_flops(sizes: LlamaSizes, shape: Shape) -> int:
    return 2 * sizes.heads * sizes.head_dim * shape.rows * (shape.rows + 1)


def _decode_flops(sizes: LlamaSizes, shape: Shape) -> int:
    return 4 * sizes.heads * sizes.head_dim * shape.rows * shape.context


def _of_rows(*counts: int) -> tuple[Shape, ...]:
    return tuple(map(Shape, counts))


ROWS = _of_rows(8192, 1, 64, 1024)
PRODUCTS = _of_rows(1, 64, 16, 1024, 8, 256, 32, 4, 128, 2)
PROMPTS = _of_rows(2048, 8192, 512, 16384, 4096, 1024)
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


def _small_bf12(m: Maker) -> Arguments:
    """A number of rows other than the 3 numbers of an outlier, and two outliers."""
    values = m.normal(FEATURES, 64).bfloat16()
    values[2, 7], values[5, 63] = 2.0**40, 2.0**-40
    return matmuls.matmul_bf12(m, 4, FEATURES, 64, form=FORM, weight=matmuls.bf12_weight(values))


def _small_slots(m: Maker, call: Arguments) -> Arguments:
    """A small call with other slots: the second of its three rows is padding."""
    return call | {"slots": m.tensor([0, -1, 7], torch.int64)}


def _rotation(m: Maker, sizes: LlamaSizes, shape: Shape) -> Arguments:
    return rotary.rope_and_write_kv(m, shape.rows, *sizes.attention, pages_dtype=shape.pages_dtype)


def _decode(m: Maker, sizes: LlamaSizes, shape: Shape) -> Arguments:
    width = -(-shape.context // PAGE)
    lengths = [shape.context] * shape.rows
    return attention.attention_decode(m, lengths, *sizes.attention, width=width, pages_dtype=shape.pages_dtype)


# By importance for a Llama's speed.
CATALOGUE: dict[str, CatalogueEntry] = {
    "add_rms_norm": CatalogueEntry(
        lambda m: rows.add_rms_norm(m, T, D),
        lambda m, sizes, shape: rows.add_rms_norm(m, shape.rows, sizes.hidden),
        ROWS,
        _all_bytes,
    ),
    "rope_and_write_kv": CatalogueEntry(
        lambda m: _small_slots(
            m, rotary.rope_and_write_kv(m, T, HQ, HKV, D, page=SMALL_PAGE, pages=P, positions=POSITIONS)
        ),
        _rotation,
        ROWS,
        _page_bytes,
    ),
    "silu_mul": CatalogueEntry(
        lambda m: rows.silu_mul(m, T, D, apart=True),
        lambda m, sizes, shape: rows.silu_mul(m, shape.rows, sizes.intermediate),
        ROWS,
        _all_bytes,
    ),
    "sample": CatalogueEntry(
        lambda m: sampling.sample(m, T, VOCAB, filters=SMALL_FILTERS),
        lambda m, sizes, shape: sampling.sample(m, shape.rows, sizes.vocab),
        _of_rows(64, 1, 256),
        _all_bytes,
    ),
    "adjust_logits": CatalogueEntry(
        lambda m: sampling.adjust_logits(m, T, VOCAB, recent=2, slots=(3, -1, 0), num_slots=4),
        lambda m, sizes, shape: sampling.adjust_logits(m, shape.rows, sizes.vocab),
        _of_rows(64, 1, 16),
        _all_bytes,
    ),
    "rms_norm": CatalogueEntry(
        lambda m: rows.rms_norm(m, T, D),
        lambda m, sizes, shape: rows.rms_norm(m, shape.rows, sizes.hidden),
        ROWS,
        _all_bytes,
    ),
    "rope": CatalogueEntry(
        lambda m: rotary.rope(m, T, HQ, HKV, D, positions=POSITIONS),
        lambda m, sizes, shape: rotary.rope(m, shape.rows, *sizes.attention),
        ROWS,
        _all_bytes,
    ),
    "write_kv": CatalogueEntry(
        lambda m: _small_slots(m, rotary.write_kv(m, T, HKV, D, page=SMALL_PAGE, pages=P)),
        lambda m, sizes, shape: rotary.write_kv(
            m, shape.rows, sizes.kv_heads, sizes.head_dim, pages_dtype=shape.pages_dtype
        ),
        ROWS,
        _page_bytes,
    ),
    "merge_state": CatalogueEntry(
        lambda m: rows.merge_state(m, T, HQ, D),
        lambda m, sizes, shape: rows.merge_state(m, shape.rows, sizes.heads, sizes.head_dim),
        ROWS,
        _all_bytes,
    ),
    "attention_decode": CatalogueEntry(
        lambda m: attention.attention_decode(m, SMALL_LENGTHS, HQ, HKV, D, **SMALL_PAGES),
        _decode,
        DECODES,
        _all_bytes,
        _decode_flops,
    ),
    "attention_varlen": CatalogueEntry(
        lambda m: attention.attention_varlen(m, SMALL_QUERIES, SMALL_QUERIES, HQ, HKV, D),
        lambda m, sizes, shape: attention.attention_varlen(m, [shape.rows], [shape.rows], *sizes.attention),
        PROMPTS,
        _all_bytes,
        _causal_flops,
    ),
    "attention_prefill": CatalogueEntry(  # a prompt without cached prefix: the same work as attention_varlen
        lambda m: attention.attention_prefill(m, SMALL_LENGTHS, SMALL_QUERIES, HQ, HKV, D, **SMALL_PAGES),
        lambda m, sizes, shape: attention.attention_prefill(m, [shape.rows], [shape.rows], *sizes.attention),
        PROMPTS,
        _all_bytes,
        _causal_flops,
    ),
    "matmul": CatalogueEntry(
        lambda m: matmuls.matmul(m, T, FEATURES, D, form=FORM),
        lambda m, sizes, shape: matmuls.matmul(m, shape.rows, *sizes.gate_up),
        PRODUCTS,
        _all_bytes,
        _matmul_flops,
    ),
    "matmul_int4": CatalogueEntry(
        lambda m: matmuls.matmul_int4(m, T, FEATURES, 160, group=32, zeros=m.dtype, form=FORM),
        lambda m, sizes, shape: matmuls.matmul_int4(m, shape.rows, *sizes.gate_up),
        PRODUCTS,
        _all_bytes,
        _matmul_flops,
    ),
    "matmul_int8": CatalogueEntry(
        lambda m: matmuls.matmul_int8(m, T, FEATURES, 160, group=32, form=FORM),
        lambda m, sizes, shape: matmuls.matmul_int8(m, shape.rows, *sizes.gate_up),
        PRODUCTS,
        _all_bytes,
        _matmul_flops,
    ),
    "quantize_rows": CatalogueEntry(
        lambda m: rows.quantize_rows(m, T, D),
        lambda m, sizes, shape: rows.quantize_rows(m, shape.rows, sizes.hidden),
        ROWS,
        _all_bytes,
    ),
    "rms_norm_int8": CatalogueEntry(
        lambda m: rows.rms_norm_int8(m, T, D),
        lambda m, sizes, shape: rows.rms_norm_int8(m, shape.rows, sizes.hidden),
        ROWS,
        _all_bytes,
    ),
    "add_rms_norm_int8": CatalogueEntry(
        lambda m: rows.add_rms_norm_int8(m, T, D),
        lambda m, sizes, shape: rows.add_rms_norm_int8(m, shape.rows, sizes.hidden),
        ROWS,
        _all_bytes,
    ),
    "silu_mul_int8": CatalogueEntry(
        lambda m: rows.silu_mul_int8(m, T, D),
        lambda m, sizes, shape: rows.silu_mul_int8(m, shape.rows, sizes.intermediate),
        ROWS,
        _all_bytes,
    ),
    "matmul_w8a8": CatalogueEntry(
        lambda m: matmuls.matmul_w8a8(m, T, FEATURES, 128, form="bias"),
        lambda m, sizes, shape: matmuls.matmul_w8a8(m, shape.rows, *sizes.gate_up),
        (*PRODUCTS, Shape(8192)),
        _all_bytes,
        _matmul_flops,
    ),
    "embedding": CatalogueEntry(
        lambda m: rows.embedding(m, T, FEATURES, D),
        lambda m, sizes, shape: rows.embedding(m, shape.rows, sizes.vocab, sizes.hidden),
        _of_rows(64, 1024),
        _row_bytes,
    ),
    "matmul_bf12": CatalogueEntry(  # LLM uses it on CPUs only
        _small_bf12,
        lambda m, sizes, shape: matmuls.matmul_bf12(m, shape.rows, *sizes.gate_up),
        PRODUCTS,
        _all_bytes,
        _matmul_flops,
        only="cpu",
    ),
}
