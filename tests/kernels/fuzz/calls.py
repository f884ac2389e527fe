"""Legal calls of ops that treat rows, of matmuls, `sample` and `adjust_logits`: extreme values and odd shapes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastllama.kernels import pack_bf12, pack_int4, pack_int8
from fastllama.testing.fuzz import Extremes, Guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = (1e-5, 1e-5, 1e-6, 0.0, 1e-30, 1e-45, 1e30, 1e300, math.inf, math.nan, -1.0, -1e-6, 0, 1)
SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 257)
ROWS = (0, 1, 1, 2, 3, 4, 5, 9)
Arguments = dict[str, Any]


@dataclass
class CallMaker:
    """Random source of a call's sizes and tensors. small: sizes for the interpreter, which is slow."""

    rng: random.Random
    small: bool = False
    values: Extremes = field(init=False)
    memory: Guarded = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.values = Extremes(self.rng, self.rng.choice((0.0, 0.3, 0.6, 0.9, 1.0)), self.rng.random() < 0.7)
        self.memory = Guarded(self.rng)
        self.dtype = self.rng.choice(DTYPES)

    def one_of(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def rows(self, *more: int) -> int:
        count = self.one_of(*ROWS, *more)
        return min(count, 4) if self.small else count

    def size(self) -> int:
        size = self.one_of(*SIZES)
        return min(size, 65) if self.small else size

    def leading(self, *more: int) -> tuple[int, ...]:
        """The dimensions before the last."""
        rows = self.rows(*more)
        return self.one_of((rows,), (rows,), (1, rows), (2, rows), (rows, 0, 2), ()) if self.chance(0.4) else (rows,)

    def place(self, name: str, value: Tensor, lead: int | None = None) -> Tensor:
        """lead: how many leading dimensions; all but the last where None."""
        lead = max(value.dim() - 1, 0) if lead is None else lead
        if name == "packed":  # 16 bytes at a time are read of it
            return self.memory.place(name, value, value.dim())
        return self.memory.place(name, value, lead, strided=value.dim() > 1 and self.chance(0.4))

    def floats(self, name: str, *shape: int, dtype: torch.dtype | None = None, lead: int | None = None) -> Tensor:
        return self.place(name, self.values.tensor(dtype or self.dtype, *shape), lead)

    def fresh(self, name: str, *shape: int, dtype: torch.dtype | None = None, lead: int | None = None) -> Tensor:
        """An output, of NaN or the largest integer."""
        dtype = dtype or self.dtype
        poison = math.nan if dtype.is_floating_point else torch.iinfo(dtype).max
        return self.place(name, torch.full(shape, poison, dtype=dtype), lead)

    def wide_or_own(self) -> torch.dtype:
        return self.one_of(self.dtype, torch.float32)

    def integer(self) -> torch.dtype:
        return self.one_of(torch.int32, torch.int64)


def rms_norm(m: CallMaker) -> Arguments:
    size = 0 if m.chance(0.05) else m.size()
    x = m.floats("x", *m.leading(), size)
    out = x if m.chance(0.2) else m.fresh("out", *x.shape)
    return {"x": x, "weight": m.floats("weight", size, dtype=m.wide_or_own()), "eps": m.one_of(*EPS), "out": out}


def add_rms_norm(m: CallMaker) -> Arguments:
    call = rms_norm(m)
    residual = m.floats("residual", *call["x"].shape)
    if call["out"] is not call["x"] and m.chance(0.2):
        call["out"] = m.fresh("out", *call["x"].shape)
    total = residual if m.chance(0.4) else m.fresh("residual_out", *call["x"].shape)
    return call | {"residual": residual, "residual_out": total}


def silu_mul(m: CallMaker) -> Arguments:
    leading, size = m.leading(), 0 if m.chance(0.05) else m.size()
    if m.chance(0.4):
        gate, up = (m.floats(name, *leading, size) for name in ("gate_up", "up"))
        return {"gate_up": gate, "up": up, "out": m.one_of(gate, up, *2 * [m.fresh("out", *leading, size)])}
    gate_up = m.floats("gate_up", *leading, 2 * size)
    half = m.one_of(0, size) if m.chance(0.2) and leading else None
    out = m.fresh("out", *leading, size) if half is None else gate_up[..., half : half + size]
    return {"gate_up": gate_up, "up": None, "out": out}


def codes(m: CallMaker, *shape: int) -> Arguments:
    scales = m.memory.place("scales_out", torch.full(shape[:-1], math.nan), len(shape) - 1)
    return {"out": m.fresh("out", *shape, dtype=torch.int8), "scales_out": scales}


def quantize_rows(m: CallMaker) -> Arguments:
    x = m.floats("x", *m.leading(), m.size())
    return {"x": x} | codes(m, *x.shape)


def rms_norm_int8(m: CallMaker) -> Arguments:
    x = m.floats("x", *m.leading(), m.size())
    weight = m.floats("weight", x.shape[-1], dtype=m.wide_or_own())
    return {"x": x, "weight": weight, "eps": m.one_of(*EPS)} | codes(m, *x.shape)


def add_rms_norm_int8(m: CallMaker) -> Arguments:
    call = rms_norm_int8(m)
    return call | {"residual": m.floats("residual", *call["x"].shape)}


def silu_mul_int8(m: CallMaker) -> Arguments:
    leading, size = m.leading(), m.size()
    return {"gate_up": m.floats("gate_up", *leading, 2 * size)} | codes(m, *leading, size)


def embedding(m: CallMaker) -> Arguments:
    vocab, size, rows = m.one_of(1, 2, 65), m.one_of(0, *SIZES), m.rows()
    ids = torch.tensor([m.rng.randrange(vocab) for _ in range(rows)], dtype=m.integer())
    return {
        "ids": m.place("ids", ids),
        "weight": m.floats("weight", vocab, size),
        "out": m.fresh("out", rows, size),
    }


def merge_state(m: CallMaker) -> Arguments:
    rows, heads, size = m.rows(), m.one_of(0, 1, 2, 5), m.size()
    call: Arguments = {}
    for side in "ab":
        lse = m.values.tensor(torch.float32, rows, heads)
        for place in range(lse.numel()):
            if m.chance(0.3):
                lse.view(-1)[place] = m.one_of(-math.inf, math.inf, 0.0, -1e38, 3e38, 1e4, -104.0, math.nan)
        call[side] = m.floats(side, rows, heads, size, lead=1)
        call[f"{side}_lse"] = m.place(f"{side}_lse", lse)
    out = call[m.one_of("a", "b")] if m.chance(0.3) else m.fresh("out", rows, heads, size, lead=1)
    lse_out = call["a_lse"] if m.chance(0.2) else m.fresh("lse_out", rows, heads, dtype=torch.float32)
    return call | {"base2": m.chance(0.3), "out": out, "lse_out": lse_out}


def around(m: CallMaker, features: int, size: int, *more: int) -> Arguments:
    """x, and the options of a matmul's prologue and epilogue."""
    form = m.one_of("", "", "gated", "residual")
    gated = form == "gated" and features % 2 == 0
    leading = m.leading(*more)
    columns = features // 2 if gated else features
    residual = m.floats("residual", *leading, columns) if form == "residual" else None
    return {
        "x": m.floats("x", *leading, size),
        "bias": m.floats("bias", features) if m.chance(0.4) else None,
        "norm": m.floats("norm", size, dtype=m.wide_or_own()) if m.chance(0.25) else None,
        "eps": m.one_of(*EPS),
        "residual": residual,
        "gated": gated,
        "out": residual if residual is not None and m.chance(0.3) else m.fresh("out", *leading, columns),
    }


def features_of(m: CallMaker) -> int:
    return m.one_of(0, 1, 2, 3, 4, 5, 8, 17, 33, 64, 66) if not m.small else m.one_of(0, 1, 2, 5, 17)


def matmul(m: CallMaker) -> Arguments:
    features, size = features_of(m), 0 if m.chance(0.05) else m.size()
    return {"weight": m.floats("weight", features, size)} | around(m, features, size, 33, 40)


def _grouped(m: CallMaker) -> tuple[int, int]:
    """A number of columns, and of groups of them."""
    group = m.one_of(32, 64, 128, 0)
    if m.small:
        group = m.one_of(32, 64, 0)
    size = m.size() if group == 0 else group * m.one_of(1, 2, 3)
    return size, 1 if group == 0 else size // group


def _codes(m: CallMaker, low: int, high: int, features: int, size: int, dtype: torch.dtype) -> Tensor:
    made = torch.randint(low, high, (features, size), generator=m.values.generator, dtype=torch.int64)
    if m.chance(0.2):
        made.fill_(m.one_of(low, high - 1, (low + high) // 2))
    return made.to(dtype)


def matmul_int4(m: CallMaker) -> Arguments:
    features, (size, groups) = features_of(m), _grouped(m)
    scales = m.floats("scales", features, groups, dtype=m.wide_or_own())
    zeros = None
    if m.chance(0.4):
        zeros = (m.values.normal(features, groups).abs() * 5).clamp(max=15)
        zeros = m.place("zeros", zeros.to(m.one_of(torch.uint8, m.dtype, torch.float32)))
    packed = m.place("packed", pack_int4(_codes(m, 0, 16, features, size, torch.uint8)), 1)
    return {"packed": packed, "scales": scales, "zeros": zeros} | around(m, features, size, 33, 70)


def matmul_int8(m: CallMaker) -> Arguments:
    features, (size, groups) = features_of(m), _grouped(m)
    scales = m.floats("scales", features, groups, dtype=m.wide_or_own())
    packed = m.place("packed", pack_int8(_codes(m, -128, 128, features, size, torch.int8)), 1)
    return {"packed": packed, "scales": scales} | around(m, features, size, 33, 70)


def matmul_w8a8(m: CallMaker) -> Arguments:
    features, size, leading = features_of(m), m.size(), m.leading(33)
    wide = m.wide_or_own()
    x = _codes(m, -127, 128, math.prod(leading), size, torch.int8).view(*leading, size)
    scales = m.values.tensor(torch.float32, *leading, 1)[..., 0]
    return {
        "x": m.place("x", x),
        "x_scales": m.memory.place("x_scales", scales, len(leading)),
        "packed": m.place("packed", pack_int8(_codes(m, -128, 128, features, size, torch.int8)), 1),
        "scales": m.floats("scales", features, dtype=wide),
        "bias": m.floats("bias", features, dtype=m.wide_or_own()) if m.chance(0.5) else None,
        "out": m.fresh("out", *leading, features),
    }


def matmul_bf12(m: CallMaker) -> Arguments:
    features, size = features_of(m), m.one_of(0, 64, 64, 128, 192)
    weight = m.values.tensor(torch.bfloat16, features, size)
    packed, outliers, exponent = pack_bf12(weight)
    return {
        "codes": m.place("codes", packed),
        "outliers": m.memory.place("outliers", outliers, 1),
        "exponent": exponent,
    } | around(m, features, size, 33)


HEATS = (1.0, 1.0, 0.7, 2.5, 0.0, -0.0, 1e-45, 1e-38, 1e-10, 1e10, 1e30, 3e38, math.inf, math.nan, -1.0, -math.inf)
SHARES = (1.0, 1.0, 0.9, 0.5, 0.0, -0.0, 1e-9, 0.9999999, 1 - 2**-24, 2.0, -1.0, 1e-45, math.inf, -math.inf, math.nan)
LEAST = (0.0, 0.0, 0.05, 0.5, 1.0, -0.0, -1.0, 1.5, 1e-45, 1e-38, 1e30, math.inf, -math.inf, math.nan)
SEEDS = (0, 1, -1, 7, 1 << 31, 1 << 32, (1 << 63) - 1, -(1 << 63), 0x123456789ABCDEF, 880909, 9297664)


def sample(m: CallMaker) -> Arguments:
    rows, vocab = m.rows(), m.one_of(1, 2, 3, 8, 17, 64, 100, 1000)
    logits = m.values.tensor(m.dtype, rows, vocab)
    kind = m.integer()
    counts = [0, 0, 1, 2, vocab - 1, vocab, vocab + 1, -1, torch.iinfo(kind).max, torch.iinfo(kind).min]

    def column(name: str, choices: Any, dtype: torch.dtype) -> Tensor:
        return m.place(name, torch.tensor([m.rng.choice(choices) for _ in range(rows)], dtype=dtype))

    plain = m.chance(0.2)
    return {
        "logits": m.place("logits", logits),
        "temperature": column("temperature", (1.0, 0.7) if plain else HEATS, torch.float32),
        "top_k": column("top_k", counts, kind),
        "top_p": column("top_p", (1.0, 0.8) if plain else SHARES, torch.float32),
        "min_p": column("min_p", (0.0, 0.1) if plain else LEAST, torch.float32),
        "seed": column("seed", SEEDS, torch.int64),
        "offset": column("offset", SEEDS, torch.int64),
        "tokens": m.fresh("tokens", rows, dtype=torch.int64),
        "logprobs": m.fresh("logprobs", rows, dtype=torch.float32),
    }


OFFSETS = (0.0, 0.0, 1.0, -0.5, 1e-45, 3e38, -3e38, 1e38, math.inf, -math.inf, math.nan)
FACTORS = (1.0, 1.0, 1.25, 0.5, 1e-45, 1e-38, 1e10, 3e38, 0.0, math.inf, math.nan)
IDS = (-1, -(1 << 63), (1 << 63) - 1, 1 << 32, (1 << 32) + 1, 1 << 40)


def adjust_logits(m: CallMaker) -> Arguments:
    """Slots, bounds and ids of all kinds; a few recent tokens, that rows may share."""
    rows, vocab, num_slots, count = m.rows(), m.one_of(1, 2, 3, 17, 100, 513, 1000), m.one_of(0, 1, 2, 5), m.size() // 9

    def column(name: str, choices: Any, dtype: torch.dtype, length: int = rows) -> Tensor:
        return m.place(name, torch.tensor([m.rng.choice(choices) for _ in range(length)], dtype=dtype))

    plain = m.chance(0.3)
    seen = [0, 0, 0, 1, 2, 3, 5, (1 << 31) - 1]
    ids = (*range(vocab), vocab, *IDS)
    bounds = (*range(count + 1), count, -3, count + 1, 1 << 40)
    offsets = (0.0, 0.5, -0.25) if plain else OFFSETS
    counts = [[m.rng.choice(seen) for _ in range(vocab)] for _ in range(num_slots)]
    return {
        "logits": m.floats("logits", rows, vocab),
        "tokens": column("tokens", ids, torch.int64, count),
        "starts": column("starts", bounds, torch.int64),
        "ends": column("ends", bounds, torch.int64),
        "slots": column("slots", (-1, -5, num_slots, 1 << 40, *3 * [*range(num_slots)]), torch.int64),
        "bias": m.floats("bias", num_slots, vocab, dtype=torch.float32),
        "counts": m.place("counts", torch.tensor(counts, dtype=torch.int32).view(num_slots, vocab)),
        "repetition_penalty": column("repetition_penalty", (1.0, 1.5) if plain else FACTORS, torch.float32),
        "presence_penalty": column("presence_penalty", offsets, torch.float32),
        "frequency_penalty": column("frequency_penalty", offsets, torch.float32),
        "out": m.fresh("out", rows, vocab, dtype=torch.float32),
    }


CALLS: dict[str, Callable[[CallMaker], Arguments]] = {
    each.__name__: each
    for each in (
        rms_norm,
        add_rms_norm,
        silu_mul,
        quantize_rows,
        rms_norm_int8,
        add_rms_norm_int8,
        silu_mul_int8,
        embedding,
        merge_state,
        matmul,
        matmul_int4,
        matmul_int8,
        matmul_w8a8,
        matmul_bf12,
        sample,
        adjust_logits,
    )
}
