"""Edge cases for kernels: extreme values, tensors with guard bands, and the comparison of results with fp64.

The rule. The oracle is a reference in fp64 on the same inputs; `plain` are results of the reference in the call's own
dtype (several where a kernel may round between the ops that it fuses). For each element:

- the kind (finite, +inf, -inf, NaN) must be the oracle's, or that of a plain result. They differ where fp32 overflows
  or underflows in between, and then both are legal: 1e30 squared is infinite, so RMSNorm of it in fp32 is 0.
- beyond the largest number of the dtype (65504 in fp16), or within the error of it, finite and infinite are equal.
- a finite element's error is at most `bounds.bound`, twice the plain results' error plus one rounding, relative to the
  row's largest finite exact element, plus 8 times `spread`, the change of the oracle where inputs change by one
  rounding. Without that, sums that cancel (1e4 - 1e4 + 1) would fail at random.

A call must also write nothing but its outputs, and change no input.
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
    """A result that violates the rule."""


@dataclass
class Extremes:
    """Makes random tensors, each row of one kind: normal, zeros, denormal, huge, with outliers, with infinities...

    calm: the share of normal rows.
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
        """A random tensor. not_finite: whether it may contain infinities and NaN."""
        made = self.normal(*shape)
        flat = made.view(math.prod(shape[:-1]), shape[-1]) if shape else made.view(1, 1)
        for row in flat:
            if self.rng.random() >= self.calm:
                self._strain(row, dtype, not_finite and self.not_finite)
        largest = torch.finfo(dtype).max
        finite = made.isfinite()
        return torch.where(finite, made.clamp(-largest, largest), made).to(dtype)

    def _strain(self, row: Tensor, dtype: torch.dtype, not_finite: bool) -> None:
        """Turn a row of fp64 into one of a random kind, in place."""
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
        elif mood == "root":  # squares near overflow
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
    """Places a call's tensors in buffers of noise, and detects illegal writes."""

    rng: random.Random
    _held: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)

    def place(self, name: str, value: Tensor, lead: int = 1, *, strided: bool = False) -> Tensor:
        """A copy of a tensor inside noise; with `strided`, there is noise between its rows, too.

        lead: the number of leading dimensions that index rows.
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
                raise Wrong(f"memory in or next to {name} was written, at byte {at} of {raw.numel()}")


def _bytes_of(tensor: Tensor, raw: Tensor) -> Tensor:
    """The bytes of a tensor's elements, as a view of `raw`, the bytes of its storage."""
    size = tensor.itemsize
    strides = (*(stride * size for stride in tensor.stride()), 1)
    return raw.as_strided((*tensor.shape, size), strides, tensor.storage_offset() * size)


def kinds(x: Tensor) -> Tensor:
    """0 where finite, 1 for +inf, 2 for -inf, 3 for NaN."""
    found = torch.zeros(x.shape, dtype=torch.int8, device=x.device)
    found[x == math.inf], found[x == -math.inf], found[x.isnan()] = 1, 2, 3
    return found


def double(value: Any) -> Any:
    """Copies floating tensors to fp64, other tensors, fp8 included, in their dtype; other values unchanged."""
    if not isinstance(value, Tensor):
        return value
    return value.double() if value.dtype in _NARROW else value.clone()


def jostled(value: Any, eps: float, generator: torch.Generator) -> Any:
    """A floating tensor in fp64, each element changed by a relative error of up to eps."""
    if not isinstance(value, Tensor) or value.dtype != torch.float64:
        return value.clone() if isinstance(value, Tensor) else value
    noise = torch.rand(value.shape, generator=generator, dtype=torch.float64, device="cpu")
    moved = value * (1 + eps * (2 * noise - 1))
    return torch.where(value.isfinite() & (value != 0), moved, value)


def spread_of(exact: Tensor, again: Sequence[Tensor]) -> Tensor:
    """The largest difference, per row, of results for changed inputs from the exact one; inf where the kind changes."""
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
    """Raise Wrong unless `found` satisfies the rule above. All of one shape; exact in fp64.

    slack: a further legal error. nan_for_inf: NaN is legal where an infinity is. free: elements of any value, such as
    sums that overflow in one order only.
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
    for each in plain:  # where fp32 overflows in between, only the kind is compared
        both &= each.isfinite()
    wrong = both & ~(apart <= legal) & ~edge
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise Wrong(
            f"{name}{list(at)} is {ours[at].item()}, {int(wrong.sum())} elements so; exact: {exact[at].item()}, off by "
            f"{apart[at].item():.3g} where {legal.expand(exact.shape)[at].item():.3g} is legal, "
            f"plain: {', '.join(str(each[at].item()) for each in plain)}"
        )
