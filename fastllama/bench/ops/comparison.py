"""One op at one shape: ours and its peers are checked, then timed in turns; every sample is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch

from fastllama import env, kernels
from fastllama.bench import timing
from fastllama.bench.models import check_memory
from fastllama.bench.ops.formulas import Function
from fastllama.bench.ops.judge import judged
from fastllama.bench.ops.peers import Peers
from fastllama.bench.ops.report import ALONE, OURS
from fastllama.catalogue.llama_calls import LlamaCall
from fastllama.catalogue.maker import Arguments
from fastllama.kernels.dispatch.backends import Implementation
from fastllama.kernels.dispatch.op import OPS
from fastllama.kernels.launch.device import device_info

T = TypeVar("T")
ROUNDS = 30
SECONDS = 3.0  # of samples per way of timing; only the slowest shapes reach it
GRAPH_CALLS = 20
CALLS_UNTIL_COLD = 64  # maximum number of input sets: small ones stay in the L2 cache in a decode step, too


def implementations(op: str, device: torch.device) -> list[Implementation]:
    """All implementations of an op: the Triton kernel first where it can run, on a CPU in the interpreter."""
    found = OPS[op].implementations(device.type)
    if device.type == "cpu" and env.triton_interpret() and OPS[op].has_triton:
        found.insert(0, Implementation("triton", OPS[op].launcher("cpu"), "TRITON_INTERPRET=1"))
    return found


def implementation(op: str, device: torch.device) -> Implementation:
    """The measured implementation: the Triton kernel where it can run, else the default."""
    return implementations(op, device)[0]


def interpreted(wanted: bool) -> AbstractContextManager[None]:
    """Patch Triton's interpreter for correct bf16, where kernels run in it."""
    if not wanted:
        return nullcontext()
    from fastllama.testing.interpreter import repaired  # imports Triton's interpreter, which a GPU does not need

    return repaired()


@contextmanager
def running(op: str, device: torch.device) -> Iterator[Function]:
    """The public op with that implementation."""
    public: Callable[..., Any] = getattr(kernels, op)
    with OPS[op].bound_to(device, implementation(op, device).run):
        yield lambda inputs: public(**inputs)


def alone(op: str, device: torch.device) -> Function:
    """Our op without overlapping launches, which make a graph of equal launches faster than its kernels.

    The launch is prepared at each call, which does not affect a graph.
    """
    run, public = implementation(op, device).run, getattr(kernels, op)

    def call(inputs: Arguments) -> Any:
        with env.PDL.set_to("0"), OPS[op].bound_to(device, run):
            return public(**inputs)

    return call


def overlaps(device: torch.device) -> bool:
    """Whether launches on a device can begin before the previous one has ended."""
    from fastllama.kernels.triton import overlap  # Triton is installed where kernels run

    return overlap.overlaps(device)


def measure(case: LlamaCall, device: torch.device, peers: Peers, rounds: int = ROUNDS) -> dict[str, Any]:
    """The figures of one call and its peers, as JSON values. A failed contender has an error instead of samples.

    Raises MemoryError, before allocating, where two sets of its keys and values do not fit in memory.
    """
    check_memory("keys and values, twice,", 2 * case.kv_bytes, device)
    sets = input_sets(case, device)
    found: dict[str, Any] = {
        "op": case.op,
        "model": case.sizes.name,
        "rows": case.rows,
        "context": case.context,
        "codes": case.pages_dtype and str(case.pages_dtype).removeprefix("torch."),
        "dtype": str(case.dtype).removeprefix("torch."),
        "label": case.label,
        "backend": implementation(case.op, device).backend,
        "bytes": case.bytes(sets[0]),
        "flops": case.flops,
        "input_sets": len(sets),
    }
    with torch.inference_mode(), running(case.op, device) as ours:
        offered: Peers = {OURS: lambda: ours}
        if found["backend"] == "triton" and overlaps(device):
            offered[ALONE] = lambda: alone(case.op, device)
        contenders, verdicts = _ready(case, device, offered | peers)
        for name, ways in timed(contenders, sets, device, rounds, captured=found["backend"] != "reference").items():
            verdicts[name] |= ways
    found["contenders"] = verdicts
    return found


def timed(
    contenders: Mapping[str, Callable[[T], Any]], sets: Sequence[T], device: torch.device, rounds: int, captured: bool
) -> dict[str, dict[str, dict[str, Any]]]:
    """Samples and quantiles by contender and way of timing, or the failure. captured: whether ours can be captured."""
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in contenders}
    for way, samplers in _samplers(contenders, sets, device, captured).items():
        for name, failure in samplers.items():
            if isinstance(failure, str):
                found[name][way] = {"failed": failure}
        able = {name: sampler for name, sampler in samplers.items() if not isinstance(sampler, str)}
        for name, seconds in timing.in_turns(able, rounds, SECONDS).items():
            found[name][way] = {"seconds": seconds, **timing.quantiles(seconds)}
    return found


def input_sets(case: LlamaCall, device: torch.device) -> list[Arguments]:
    """At least two sets of arguments, together four times the L2 cache."""
    first = case.make(device, seed=1)
    wanted = 4 * device_info(device).l2_cache // max(case.bytes(first), 1) + 1
    return [first, *(case.make(device, seed) for seed in range(2, 1 + min(max(wanted, 2), CALLS_UNTIL_COLD)))]


def _ready(
    case: LlamaCall, device: torch.device, offered: Peers
) -> tuple[dict[str, Function], dict[str, dict[str, Any]]]:
    """Contenders that load, run and are correct; and every one's error, bound and seconds until checked, or failure."""
    ready: dict[str, Function] = {}
    verdicts: dict[str, dict[str, Any]] = {}
    for name, load in offered.items():
        start = time.monotonic()
        try:
            function = load()
            error, bound = judged(case, function, device)
        except Exception as failure:  # a peer that cannot run is a finding, not the end of the run
            verdicts[name] = {"failed": f"{type(failure).__name__}: {failure}"[:500]}
            continue
        verdicts[name] = {"error": error, "bound": bound, "judged_seconds": time.monotonic() - start}
        if error <= bound:
            ready[name] = function
        else:
            verdicts[name]["failed"] = f"wrong: error {error:.2g}, bound {bound:.2g}"
    return ready, verdicts


def _samplers(
    contenders: Mapping[str, Callable[[T], Any]], sets: Sequence[T], device: torch.device, captured: bool
) -> dict[str, dict[str, timing.Sampler | str]]:
    """Samplers by way of timing and contender; a text where that way fails. captured: whether ours can be captured."""
    calls = {name: timing.rotating(function, sets) for name, function in contenders.items()}
    if device.type == "cpu":
        return {"eager": {name: timing.wall(call) for name, call in calls.items()}}
    scratch = torch.empty(2 * device_info(device).l2_cache, dtype=torch.int8, device=device)
    graphs: dict[str, timing.Sampler | str] = {}
    for name, call in calls.items():
        if name == OURS and not captured:
            graphs[name] = "not captured: the torch reference reads lengths on the host"
            continue
        try:
            graphs[name] = timing.graph(call, max(GRAPH_CALLS, len(sets)))
        except Exception as failure:  # capture fails in as many ways as there are peers
            graphs[name] = f"{type(failure).__name__}: {failure}"[:500]
    return {"graph": graphs, "eager": {name: timing.events(call, scratch) for name, call in calls.items()}}
