"""What a public op costs beyond the implementation it calls: `python -m benchmarks.op_overhead`.

The goal is 3 us where torch.add takes 1.1 us: the line of conditions says what it takes here and now.
"""

from __future__ import annotations

import argparse
import inspect
import os
import platform
import statistics
from collections.abc import Callable
from typing import Any

import torch

from fastllama import kernels
from fastllama.bench import timing
from fastllama.kernels.dispatch.op import OPS

Arguments = tuple[Any, ...]
Outputs = dict[str, torch.Tensor]


def cases() -> dict[str, tuple[Arguments, dict[str, Any], Outputs]]:
    """Per op the arguments of its public function, positional and by name, and its outputs; tiny, as at batch 1."""
    tokens, heads, kv_heads, dim, page_size, vocab = 1, 2, 1, 16, 16, 32
    x, weight = torch.randn(tokens, dim), torch.randn(dim)
    q, k = torch.randn(tokens, heads, dim), torch.randn(tokens, kv_heads, dim)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim)
    pages = torch.randn(2, kv_heads, page_size, dim), torch.randn(2, kv_heads, page_size, dim)
    positions = torch.zeros(tokens, dtype=torch.int64)
    cos_sin = kernels.cos_sin_cache(torch.rand(dim // 2), 8)
    bounds = torch.tensor([0, tokens], dtype=torch.int32)
    paged = (q, *pages, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32))
    zeros = torch.zeros(tokens)
    logits = (torch.randn(tokens, vocab), zeros, zeros.int(), zeros + 1, zeros, zeros.long(), zeros.long())
    rounded = {"out": x.to(torch.int8), "scales_out": torch.empty(tokens)}
    scale = {"scale": 0.25, "base2": False}
    return {
        "rms_norm": ((x, weight, 1e-5), {}, {"out": x.clone()}),
        "add_rms_norm": ((x, x.clone(), weight, 1e-5), {}, {"out": x.clone(), "residual_out": x.clone()}),
        "rope": ((q, k, cos_sin, positions), {"interleaved": False}, {"q_out": q.clone(), "k_out": k.clone()}),
        "rope_and_write_kv": (
            (qkv, cos_sin, positions, positions, *pages, None, None),
            {"interleaved": False},
            {"q_out": q.clone()},
        ),
        "attention_varlen": ((q, k, k, bounds, bounds), scale | {"causal": True}, {"out": q.clone()}),
        "attention_prefill": ((*paged, bounds), scale, {"out": q.clone()}),
        "attention_decode": (paged, scale, {"out": q.clone()}),
        "matmul": ((x, torch.randn(8, dim), None), {}, {"out": torch.empty(tokens, 8)}),
        "matmul_bf12": (
            (torch.randn(tokens, 64), *kernels.pack_bf12(torch.randn(8, 64).bfloat16()), None),
            {},
            {"out": torch.empty(tokens, 8)},
        ),
        "matmul_int4": (
            (
                torch.randn(tokens, 64),
                kernels.pack_int4(torch.zeros(8, 64, dtype=torch.uint8)),
                torch.randn(8, 1),
                None,
                None,
            ),
            {},
            {"out": torch.empty(tokens, 8)},
        ),
        "matmul_int8": (
            (torch.randn(tokens, 64), kernels.pack_int8(torch.zeros(8, 64, dtype=torch.int8)), torch.randn(8, 1), None),
            {},
            {"out": torch.empty(tokens, 8)},
        ),
        "quantize_rows": ((x,), {}, rounded),
        "rms_norm_int8": ((x, weight, 1e-5), {}, rounded),
        "add_rms_norm_int8": ((x, x.clone(), weight, 1e-5), {}, rounded),
        "silu_mul_int8": ((torch.cat((x, x), 1),), {}, rounded),
        "matmul_w8a8": (
            (
                torch.zeros(tokens, 64, dtype=torch.int8),
                torch.ones(tokens),
                kernels.pack_int8(torch.zeros(8, 64, dtype=torch.int8)),
                torch.randn(8),
                None,
            ),
            {},
            {"out": torch.empty(tokens, 8)},
        ),
        "embedding": ((positions, torch.randn(vocab, dim)), {}, {"out": x.clone()}),
        "silu_mul": ((x,), {}, {"out": torch.empty(tokens, dim // 2)}),
        "merge_state": (
            (q, q[..., 0].contiguous(), q.clone(), q[..., 1].contiguous()),
            {},
            {"out": q.clone(), "lse_out": torch.empty(tokens, heads)},
        ),
        "sample": (logits, {}, {"tokens": positions.clone(), "logprobs": zeros.clone()}),
    }


def microseconds(functions: list[Callable[[], Any]], rounds: int, calls: int) -> list[float]:
    """Median of each function's time over rounds of `calls` calls, taken in turn so that noise meets them all."""
    samplers = {str(place): timing.wall(function, calls) for place, function in enumerate(functions)}
    return [1e6 * statistics.median(samples) for samples in timing.in_turns(samplers, rounds).values()]


def overheads(op: str, rounds: int, calls: int) -> tuple[float, float, float]:
    """Microseconds: the implementation; what the public call adds with outputs given, and when it allocates them.

    What is added is timed with an implementation that does nothing: the real one's own noise would bury it.
    """
    args, options, outputs = cases()[op]
    public, run = getattr(kernels, op), OPS[op].implementation("cpu").run
    named = dict(zip(inspect.signature(public).parameters, args, strict=False)) | options | outputs
    bare = tuple(named.get(name) for name in OPS[op].names)
    (implementation,) = microseconds([lambda: run(*bare)], rounds, calls)

    def nothing(*args: Any) -> None:
        pass

    with OPS[op].bound_to(torch.device("cpu"), nothing):
        empty, given, allocated = microseconds(
            [lambda: nothing(*bare), lambda: public(*args, **options, **outputs), lambda: public(*args, **options)],
            rounds,
            calls,
        )
    return implementation, given - empty, allocated - empty


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--calls", type=int, default=20, help="calls in a row in each round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(1, 16)
    with torch.inference_mode():
        (add,) = microseconds([lambda: torch.add(x, x)], options.rounds, options.calls)
        print(
            f"one token, fp32, inference mode, 1 thread; medians of {options.rounds} rounds of {options.calls} calls; "
            f"torch {torch.__version__}, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f} on "
            f"{os.cpu_count()} cores; torch.add: {add:.2f} us"
        )
        print(f"{'op':20} {'backend':10} {'implementation us':>18} {'outputs given +us':>18} {'allocated +us':>14}")
        for op in OPS:
            implementation, given, allocated = overheads(op, options.rounds, options.calls)
            backend = OPS[op].implementation("cpu").backend
            print(f"{op:20} {backend:10} {implementation:18.2f} {given:18.2f} {allocated:14.2f}")


if __name__ == "__main__":
    main()
