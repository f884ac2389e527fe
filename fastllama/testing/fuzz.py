"""Edge cases for kernels: extreme values, tensors with guard bands, and the judgement of results against fp64.

The rule. The oracle is a reference in fp64 on the same inputs; `plain` are results of the reference in the call's own
dtype (more than one where a kernel may round between the ops it is made of). For each element:

- the kind (finite, +inf, -inf, NaN) is the oracle's, or that of a plain result. They differ where fp32 overflows or
  underflows on the way, and then neither is wrong: 1e30 squared is infinite, so RMSNorm of it in fp32 is 0.
- beyond the largest number of the dtype (65504 in fp16), or within its error of it, finite and infinite are one.
- a finite element is off by no more than `bounds.bound` allows: twice the plain results' error and one rounding,
  relative to the row's largest finite exact element; and by `spread`, how far the oracle itself moves where inputs
  move by a rounding, 8 times. Without that, sums that cancel (1e4 - 1e4 + 1) are judged by luck.

And a call writes nothing but its outputs, and changes no input.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastllama.testing.bounds import bound

MARGIN = 32  # elements before and after a guarded tensor
SPREAD = 8.0
KINDS = ("finite", "+inf", "-inf", "NaN")
_NARROW = (torch.float16, torch.bfloat16, torch.float32)


class Wrong(AssertionError):
    """A result that the rule does not allow."""


@dataclass
class Extremes:
    """Draws tensors, each row in a mood of its own: normal, zeros, denormal, huge, with outliers, with infinities...

    calm: the share of rows that are normal.
    """

    rng: random.Random
    calm: float = 0.4
    not_finite: bool = True
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator("cpu").manual_seed(self.rng.getrandbits(62))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers in fp64."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")

    def tensor(self, dtype: torch.dtype, *shape: int, not_finite: bool = True) -> Tensor:
        """not_finite: whether there may be infinities and NaN."""
        made = self.normal(*shape)
        flat = made.view(math.prod(shape[:-1]), shape[-1]) if shape else made.view(1, 1)
        for row in flat:
            if self.rng.random() >= self.calm:
                self._strain(row, dtype, not_finite and self.not_finite)
        largest = torch.finfo(dtype).max
        finite = made.isfinite()
        return torch.where(finite, made.clamp(-largest, largest), made).to(dtype)

    def _strain(self, row: Tensor, dtype: torch.dtype, not_finite: bool) -> None:
        """Put a row of fp64 into a mood, in place."""
        limits = torch.finfo(dtype)
        denormal = limits.smallest_normal * limits.eps
        signs = row.sign()
        mood = self.rng.choice(("zeros", "denormal", "tiny", "huge", "root", "outliers", "one", "few", "few", "few"))
        if mood == "zeros":
            row.copy_(signs * 0.0)
        elif mood == "denormal":
            row.mul_(denormal * self.rng.choice((1, 8, 100)))
        elif mood == "tiny":
            row.mul_(limits.smallest_normal * self.rng.choice((1, 1e3)))
        elif mood == "huge":
            row.copy_(signs * limits.max * (1 - row.abs().clamp(max=8) / 16))
        elif mood == "root":  # squares that are about to overflow
            row.mul_(limits.max**0.5 * self.rng.choice((0.1, 1, 3)))
        elif mood == "outliers":
            row[:: self.rng.choice((2, 7, 33))] *= self.rng.choice((1e2, 1e4))
        elif mood == "one":
            row.fill_(self.rng.choice((1.0, -1.0, 0.5, limits.max, denormal, 100.0)))
        elif row.numel():
            specials = [0.0, -0.0, denormal, -denormal, limits.max, -limits.max, 1e4, -1e4, 88.8, -104.0]
            if not_finite:
                specials += [math.inf, -math.inf, math.nan]
            for _ in range(self.rng.choice((1, 1, 2, 5))):
                row[self.rng.randrange(row.numel())] = self.rng.choice(specials)


@dataclass
class Guarded:
    """Memory of a call's tensors, in buffers of noise: says what was written that must not be."""

    rng: random.Random
    _held: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)

    def place(self, name: str, value: Tensor, lead: int = 1, *, strided: bool = False) -> Tensor:
        """A copy of a tensor within noise; with `strided` there is some between its rows, too.

        lead: the first dimensions, which are its rows.
        """
        lead = min(lead, value.dim())
        rows, size = math.prod(value.shape[:lead]), math.prod(value.shape[lead:])
        if value.dim() == lead:
            rows, size = 1, rows
        stride = size + (self.rng.choice((1, 5, 16)) if strided and value.dim() > lead else 0)
        front = MARGIN + (self.rng.choice((0, 0, 1)) if strided else 0)
        kind = torch.uint8 if value.dtype.itemsize == 1 else value.dtype
        buffer = torch.empty(front + rows * stride + MARGIN, dtype=kind, device="cpu")
        raw = buffer.view(torch.uint8)
        raw.copy_(torch.full_like(raw, 0xFF))  # NaN, or -1
        inner = buffer[front : front + rows * stride].view(value.dtype).view(rows, stride)[:, :size]
        made = inner.view(value.shape) if stride == size else inner.unflatten(1, value.shape[lead:])
        if stride != size and lead != 1:
            made = made.unflatten(0, value.shape[:lead])
        if value.dim() == lead:
            made = inner.reshape(value.shape)
        made.copy_(value)
        self._held.append((name, buffer, raw.clone()))
        return made

    def check(self, written: Sequence[Tensor]) -> None:
        """Raise Wrong where memory changed that is not an element of `written`."""
        for name, buffer, before in self._held:
            raw = buffer.view(torch.uint8)
            changed = raw != before
            if not changed.any():
                continue
            legal = torch.zeros_like(raw, dtype=torch.bool)
            for tensor in written:
                if tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr():
                    _bytes_of(tensor, legal).fill_(True)
            if (changed & ~legal).any():
                at = int((changed & ~legal).nonzero()[0])
                raise Wrong(f"memory in or around {name} was written, at byte {at} of {raw.numel()}")


def _bytes_of(tensor: Tensor, raw: Tensor) -> Tensor:
    """The bytes of a tensor's elements, as elements of `raw`, which has one for each byte of its storage."""
    size = tensor.itemsize
    strides = (*(stride * size for stride in tensor.stride()), 1)
    return raw.as_strided((*tensor.shape, size), strides, tensor.storage_offset() * size)


def kinds(x: Tensor) -> Tensor:
    """0 where finite, 1 for +inf, 2 for -inf, 3 for NaN."""
    found = torch.zeros(x.shape, dtype=torch.int8, device=x.device)
    found[x == math.inf], found[x == -math.inf], found[x.isnan()] = 1, 2, 3
    return found


def double(value: Any) -> Any:
    """Floating tensors in fp64, all else, codes in fp8 among it, as it is; tensors are copied."""
    if not isinstance(value, Tensor):
        return value
    return value.double() if value.dtype in _NARROW else value.clone()


def jostled(value: Any, eps: float, generator: torch.Generator) -> Any:
    """A floating tensor in fp64, each element moved by up to eps of it."""
    if not isinstance(value, Tensor) or value.dtype != torch.float64:
        return value.clone() if isinstance(value, Tensor) else value
    noise = torch.rand(value.shape, generator=generator, dtype=torch.float64, device="cpu")
    moved = value * (1 + eps * (2 * noise - 1))
    return torch.where(value.isfinite() & (value != 0), moved, value)


def spread_of(exact: Tensor, again: Sequence[Tensor]) -> Tensor:
    """How far results of moved inputs are from the exact one, in each row; infinite where the kind changes."""
    widest = torch.zeros_like(exact)
    for other in again:
        apart = (other - exact).abs()
        apart = torch.where(kinds(other) == kinds(exact), apart.nan_to_num(0.0, posinf=0.0), math.inf)
        widest = torch.maximum(widest, apart)
    return widest


def judge(
    name: str,
    found: Tensor,
    exact: Tensor,
    plain: Sequence[Tensor],
    spread: Tensor | None = None,
    *,
    slack: Tensor | float = 0.0,
    nan_for_inf: bool = False,
    free: Tensor | None = None,
) -> None:
    """Raise Wrong unless `found` is as the rule above says. All of one shape; exact in fp64.

    slack: an error that is legal besides. nan_for_inf: NaN may stand where an infinity is legal. free: elements that
    may be anything, as sums overflow in one order and not in another.
    """
    if not exact.numel():
        return
    dtype = found.dtype
    limits = torch.finfo(dtype)
    ours = found.double()
    finite = exact.isfinite()
    size = exact.abs().where(finite, 0.0).amax(-1, keepdim=True) if exact.dim() else exact.abs().where(finite, 0.0)
    off = torch.zeros_like(exact)
    for each in plain:
        apart = (each.double() - exact).abs()
        off = torch.maximum(off, apart.where(finite & each.isfinite(), 0.0))
    theirs = off.amax(-1, keepdim=True) if exact.dim() else off
    relative = (theirs / size.where(size > 0, 1.0)).clamp(max=1e300)
    legal = (2 * relative + bound(0.0, dtype)) * size + 2 * limits.smallest_normal * limits.eps + slack
    if spread is not None:
        wide = spread.amax(-1, keepdim=True) if spread.dim() else spread
        legal = legal + SPREAD * wide
    kind, wanted = kinds(ours), [kinds(exact), kinds(exact.to(dtype)), *map(kinds, plain)]
    right = torch.zeros_like(finite)
    for each in wanted:
        right |= kind == each
        if nan_for_inf:
            right |= (kind == 3) & ((each == 1) | (each == 2))
    edge = exact.abs() + legal >= limits.max
    either = (ours.sign() == exact.sign()) | (exact.abs() <= legal)
    right |= edge & finite & ((kind == 0) | either & (kind < 3))
    loose = torch.zeros_like(finite) if free is None else free
    right |= loose
    if not right.all():
        at = tuple((~right).nonzero()[0].tolist())
        raise Wrong(
            f"{name}{list(at)} is {ours[at].item()}, {int((~right).sum())} elements so; exact: {exact[at].item()}, "
            f"plain: {', '.join(str(each[at].item()) for each in plain)}"
        )
    apart = (ours - exact).abs()
    both = finite & (kind == 0) & ~loose
    for each in plain:  # where fp32 overflows on the way, the kind is all
        both &= each.isfinite()
    wrong = both & ~(apart <= legal) & ~edge
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise Wrong(
            f"{name}{list(at)} is {ours[at].item()}, {int(wrong.sum())} elements so; exact: {exact[at].item()}, off by "
            f"{apart[at].item():.3g} where {legal.expand(exact.shape)[at].item():.3g} is legal, "
            f"plain: {', '.join(str(each[at].item()) for each in plain)}"
        )
