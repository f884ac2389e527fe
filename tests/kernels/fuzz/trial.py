"""One case of an op: made from its number, run on a backend, judged by the rule of fastllama/testing/fuzz.py.

Where the rule is another one:
- quantized values and scales are judged dequantized, and may be a step off: ties go either way.
- a sampled token is judged by its share of the mass: the row's random number must fall into it, as in verify.sampling.
- matmuls of 4-bit and 8-bit weights may be off by a unit of the fixed point of their x, and give NaN in place of an
  infinity, as bf12 may: their docstrings state it.
- write_kv under scales that are given, powers of two, gives what its reference gives in fp32, bit for bit.
- adjust_logits gives what its reference gives in fp32, bit for bit.
- matmuls may round between the ops they are made of, or multiply by the norm's factor last: both count as plain.
"""

from __future__ import annotations

import contextlib
import io
import math
import random
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastllama.catalogue.arguments import SCRATCH, outputs, positional
from fastllama.kernels import reference
from fastllama.kernels.dispatch.op import OPS
from fastllama.kernels.reference.numerics import wide
from fastllama.testing.fuzz import Wrong, double, jostled, judge, spread_of
from fastllama.verify.sampling import Draw, miss
from tests.kernels.fuzz.attention_calls import ATTENTION_CALLS
from tests.kernels.fuzz.calls import CALLS, Arguments, CallMaker
from tests.kernels.fuzz.tolerance import FP32, fixed_point, has_denormals, least_weights, magnitudes, sums_overflow
from tests.kernels.honest import assert_equal, implementation, on_cpu

ALL_CALLS = {**CALLS, **ATTENTION_CALLS}
TRIALS = 2  # oracles of moved inputs
CODES = {"out": "scales_out", "k_pages": "k_scales", "v_pages": "v_scales"}
STEPS = {torch.int8: 1.01, torch.float8_e4m3fn: 33.0}  # of a scale, between neighbouring values at most
ROUNDS_BETWEEN = ("bias", "norm", "gated", "residual")


@dataclass(frozen=True)
class Case:
    """An op, the number of a case and whether it is a small one for the interpreter."""

    op: str
    number: int
    small: bool = False

    def make(self) -> tuple[CallMaker, Arguments]:
        """The call's tensors: fresh memory each time, with the same contents."""
        rng = random.Random(zlib.crc32(f"{self.op} {self.number} {self.small}".encode()))
        maker = CallMaker(rng, self.small)
        return maker, ALL_CALLS[self.op](maker)

    @property
    def command(self) -> str:
        """The command that runs the case again."""
        small = " --small" if self.small else ""
        return f"python -m tests.kernels.fuzz --op {self.op} --case {self.number}{small}"


def backends_of(op: str) -> list[str]:
    """Backends that compute it on CPU tensors."""
    return on_cpu(op)


def written(op: str, call: Arguments) -> dict[str, Tensor]:
    """The tensors of a call that its op writes, by name."""
    names = [OPS[op].names[place] for place in OPS[op]._written]
    return {name: call[name] for name in names if name != SCRATCH and call.get(name) is not None}


def expected(op: str, call: Arguments) -> dict[str, Tensor]:
    """What the reference makes of a call's own tensors: those that it returns, and those that it updates."""
    made = getattr(reference, op)(*positional(op, call)[: OPS[op]._inputs])
    results = (made,) if isinstance(made, Tensor) else made or ()
    updated = {name: call[name] for name in written(op, call) if name not in outputs(op)}
    return {**updated, **dict(zip(outputs(op), results, strict=True))}


def inputs(op: str, call: Arguments) -> Arguments:
    """A call without its outputs."""
    return {name: value for name, value in call.items() if name not in outputs(op)}


@contextmanager
def bound(backend: str) -> Iterator[None]:
    """Within, one backend runs every op that it implements."""
    cpu = torch.device("cpu")
    with ExitStack() as stack:
        for name, op in OPS.items():
            if backend in on_cpu(name) or (backend == "triton" and op.has_triton):
                stack.enter_context(op.bound_to(cpu, implementation(name, backend)))
        yield


def trial(case: Case, backends: list[str]) -> dict[str, str]:
    """What was wrong with a case, by backend; empty where nothing was."""
    _, call = case.make()
    given = {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs(case.op, call).items()
    }
    exact: dict[str, Tensor] = {}
    plain: list[dict[str, Tensor]] = []
    again: list[dict[str, Tensor]] = []
    if case.op not in ("sample", "adjust_logits"):  # which have rules of their own
        exact = expected(case.op, {name: double(value) for name, value in given.items()})
        plain = [expected(case.op, {name: _copy(value) for name, value in given.items()})]
        plain += [{"out": each} for each in _composed(case.op, given)]
        again = _moved(case, given)
    faults = {}
    for backend in backends:
        try:
            found = run(case, backend)
            _judge(case.op, given, found, exact, plain, again)
        except Exception as error:
            faults[backend] = f"{type(error).__name__}: {error}"
    return faults


def run(case: Case, backend: str) -> dict[str, Tensor]:
    """The tensors that a backend wrote. Raises Wrong where it wrote elsewhere, printed or warned."""
    maker, call = case.make()
    said = io.StringIO()
    with bound(backend), warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(said):
        warnings.simplefilter("always")
        OPS[case.op](*positional(case.op, call))
    heard = [str(each.message) for each in caught if backend != "triton" and "deterministic" not in str(each.message)]
    if heard or said.getvalue():
        raise Wrong(f"the call printed or warned: {heard or said.getvalue()}")
    maker.memory.check(list(written(case.op, call).values()))
    return written(case.op, call)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _moved(case: Case, given: Arguments) -> list[dict[str, Tensor]]:
    """Oracles of inputs that are moved by a rounding: of the dtype where ops round on the way, else of fp32."""
    maker, _ = case.make()
    between = any(given.get(name) is not None and given.get(name) is not False for name in ROUNDS_BETWEEN)
    is_attention = case.op.startswith("attention")  # which rounds the scale, a score, its exponential and the quotient
    between |= is_attention
    eps = max(torch.finfo(maker.dtype).eps if between else 0, 4 * FP32 if is_attention else FP32)
    exact = {name: double(value) for name, value in given.items()}
    generator = torch.Generator().manual_seed(case.number)
    return [
        expected(case.op, {name: jostled(value, eps, generator) for name, value in exact.items()})
        for _ in range(TRIALS)
    ]


def _composed(op: str, given: Arguments) -> list[Tensor]:
    """A matmul's result where it rounds after each of its ops, and where it multiplies by the norm's factor last."""
    if not op.startswith("matmul") or op == "matmul_w8a8":
        return []
    x, norm, eps = given["x"], given["norm"], given["eps"]
    rest = [given[name] for name in OPS[op].names[1 : OPS[op].names.index("bias")]]
    multiply = getattr(reference, op)

    def behind(y: Tensor) -> Tensor:
        y = y if given["bias"] is None else y + given["bias"]
        y = reference.silu_mul(y) if given["gated"] else y
        return y if given["residual"] is None else y + given["residual"]

    found = [behind(multiply(x if norm is None else reference.rms_norm(x, norm, eps), *rest))]
    if norm is not None:
        factor = torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)
        found.append(behind((wide(multiply((x * norm).to(x.dtype), *rest)) * factor).to(x.dtype)))
    return found


def _judge(
    op: str,
    given: Arguments,
    found: dict[str, Tensor],
    exact: dict[str, Tensor],
    plain: list[dict[str, Tensor]],
    again: list[dict[str, Tensor]],
) -> None:
    if op == "sample":
        _judge_sample(given, found)
        return
    if op == "adjust_logits":  # defined in fp32: the order of its roundings and its largest values included
        assert_equal(found["out"], reference.adjust_logits(**given))
        return
    slack: Tensor | float = 0.0
    free = sums_overflow(op, given, exact["out"].shape) if "out" in exact else None
    quantized = op in ("matmul_int4", "matmul_int8", "matmul_bf12")
    if op == "matmul":  # BLAS may take a denormal number for 0, and 0 times infinity is NaN
        quantized = any(has_denormals(given[name]) for name in ("x", "weight"))
    if op in ("matmul_int4", "matmul_int8"):
        slack = fixed_point(op, given)
    elif op.startswith("attention"):
        slack = least_weights(given)
    elif op in ("matmul", "matmul_bf12") and found["out"].numel():
        x, weight = magnitudes(op, given)  # BLAS may take denormal numbers for 0
        least = torch.finfo(torch.float32).smallest_normal
        slack = least * (x.sum(-1, keepdim=True) + weight.sum(-1).amax() + 1)
        if given["gated"]:
            slack = slack * (
                1
                + exact["out"].abs().nan_to_num(0, 0, 0).amax(-1, keepdim=True)
                + (x @ weight.T).amax(-1, keepdim=True)
            )
    for name, ours in found.items():
        theirs, others = exact[name], [each[name] for each in plain if name in each]
        moved = [each[name] for each in again]
        scales = CODES.get(name)
        if op == "write_kv" and given["k_scale"] is not None:
            assert_equal(ours.float(), others[0].float())
        elif scales is not None and ours.dtype in STEPS:
            roundings = (0.0, 0.0)
            if op != "quantize_rows" and ours.dtype == torch.int8:
                limits = torch.finfo(_dtype_of(given))
                roundings = (127 * limits.eps, 2 * limits.smallest_normal * limits.eps)
            others = [(each[name], each[scales]) for each in plain]
            _judge_codes(name, ours, found[scales], theirs, exact[scales], others, roundings)
        else:
            spread = spread_of(theirs.double(), moved) if moved else None
            judge(
                name,
                ours,
                theirs.double(),
                others,
                spread,
                slack=FP32 if name.startswith("lse") else slack,  # of a logarithm the absolute error matters
                nan_for_inf=quantized,
                free=free.squeeze(-1) if free is not None and name == "lse_out" else free,
            )


def _judge_codes(
    name: str,
    codes: Tensor,
    scales: Tensor,
    exact: Tensor,
    exact_scales: Tensor,
    plain: list[tuple[Tensor, Tensor]],
    roundings: tuple[float, float],
) -> None:
    """Dequantized values; where the scale is not finite `codes` must be 0, unless the oracle's is finite.

    roundings: steps, and absolute errors, by which numbers may differ before they are quantized.
    """
    step = STEPS[codes.dtype] + roundings[0]
    finite = exact_scales.isfinite() & scales.isfinite()
    values, theirs = codes.double() * scales.double()[..., None], exact.double() * exact_scales.double()[..., None]
    legal = (1.02 * step * exact_scales + roundings[1])[..., None]
    for its_codes, its_scales in plain:
        finite &= (its_scales.double() - exact_scales).abs() <= 1e-2 * exact_scales.abs()
        legal = legal + 2 * (its_codes.double() * its_scales.double()[..., None] - theirs).abs()
    apart, legal = (each.where(finite[..., None], 0.0) for each in ((values - theirs).abs(), legal))
    if (apart > legal).any():
        at = tuple((apart > legal).nonzero()[0].tolist())
        raise Wrong(
            f"{name}{list(at)} stands for {values[at]}, not {theirs[at]}, with a scale of {exact_scales[at[:-1]]}"
        )
    spoilt = ~scales.isfinite()
    if codes.double()[spoilt].any():
        raise Wrong(f"{name} has quantized values that are not 0 where the scale is not finite")


def _dtype_of(given: Arguments) -> torch.dtype:
    dtype: torch.dtype = next(iter(given.values())).dtype
    return dtype


def _judge_sample(given: Arguments, found: dict[str, Tensor]) -> None:
    logits = given["logits"]
    largest = logits.double().amax(-1)
    for row, token in enumerate(found["tokens"].tolist()):
        logprob = found["logprobs"][row]
        if not largest[row].isfinite():
            if token or not logprob.isnan():
                raise Wrong(f"row {row} is no distribution, and gives token {token}, logprob {logprob.item()}")
            continue
        if not 0 <= token < logits.shape[1]:
            raise Wrong(f"row {row} gives token {token} of {logits.shape[1]}")
        normal = (logits[row].double() - largest[row]).log_softmax(-1)[token]
        values = (logits[row].float() - logits[row].float().amax()).double()  # which overflows to -inf where fp32 does
        narrow = values.float().log_softmax(-1)[token]
        judge(f"logprobs[{row}]", logprob, normal, [narrow], slack=4 * FP32 * (1 + abs(narrow.item())))
        heat = given["temperature"][row].item()
        if not heat > 0:
            if token != int(values.argmax()):
                raise Wrong(
                    f"row {row} of temperature {heat} gives token {token}; the largest is {int(values.argmax())}"
                )
            continue
        top_k = int(given["top_k"][row])
        share, least = (given[name][row].item() for name in ("top_p", "min_p"))
        share, least = (1.0 if math.isnan(share) else share), (0.0 if math.isnan(least) else min(least, 1.0))
        if values[values.isfinite()].amin() / heat > -1e-4:  # rounding makes ties of all these, or not
            if values[token] == -math.inf:
                raise Wrong(f"row {row} gives token {token}, whose logit is -inf: {_row_of(given, row)}")
            continue
        pair = int(given["seed"][row]), int(given["offset"][row])
        near = [(share * (1 + e), least * (1 + f)) for e in (0, -1e-6, 1e-6) for f in (0, -1e-6, 1e-6)]
        off = min(
            miss(token, each, Draw(1.0, top_k, p, min(q, 1.0), *pair))
            for p, q in near
            for limited in {heat, max(heat, 1e-37), min(heat, 1.2e38)}  # as kernels may
            for each in _rounded(values / limited)
        )
        if off > 4 * FP32:
            raise Wrong(f"row {row} misses its number by {off:.3g}: token {token}, {_row_of(given, row)}")


def _rounded(values: Tensor) -> list[Tensor]:
    """Logits, plain and with weights rounded to fp32 or to 20 bits below the largest, which makes ties."""
    weights = values.nan_to_num(-math.inf).exp()  # -inf at an infinite temperature
    return [values, weights.float().double().log(), (weights * 2**20).round().div(2**20).log()]


def _row_of(given: Arguments, row: int) -> str:
    return ", ".join(f"{name} {given[name][row].item()}" for name in ("temperature", "top_k", "top_p", "min_p"))
