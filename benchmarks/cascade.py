"""Attention of a batch with a shared prefix: plain decode, which reads the prefix for each sequence, and cascade.

python -m benchmarks.cascade [--shapes llama-2-7b llama-2-70b] [--batch 32] [--prefix 4096] [--own 256]
    [--dtype bfloat16] [--device cpu] [--rounds 5] [--output FILE]

One decode step of one layer: `attention_decode` over each whole sequence, and examples/cascade.py, which attends to the
prefix for the whole batch, to each sequence's own tokens, and merges. Both use the same pages for the prefix. Bytes are
the keys and values that the kernel's programs load: plain decode loads the prefix once per sequence, cascade once per
group of sequences. A prefix that fits into a GPU's L2 cache is read from memory once in either case. A few sequences
are compared with attention in fp64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from examples.cascade import cascade, queries_together
from fastllama.bench import timing
from fastllama.bench.environment import environment
from fastllama.bench.files import output_file, write_record
from fastllama.catalogue.attention import paged
from fastllama.catalogue.maker import Maker
from fastllama.catalogue.rotary import PAGE
from fastllama.catalogue.sizes import LlamaSizes
from fastllama.kernels import attention_decode, backend_of, reference
from fastllama.kernels.launch.device import device_info

MIB = 1 << 20
JUDGED = 4  # sequences, spread over the batch: fp64 takes seconds for each


def read_bytes(sizes: LlamaSizes, batch: int, prefix: int, own: int, itemsize: int) -> dict[str, int]:
    """Bytes of keys and values that one layer's programs load, plain and cascade."""
    token = 2 * sizes.kv_heads * sizes.head_dim * itemsize
    times = batch // queries_together(batch, sizes.heads // sizes.kv_heads)
    return {"plain": batch * (prefix + own) * token, "cascade": (times * prefix + batch * own) * token}


def contenders(m: Maker, sizes: LlamaSizes, batch: int, prefix: int, own: int) -> dict[str, Callable[[], Tensor]]:
    """The step by plain decode, by cascade, and for JUDGED sequences by the reference in fp64."""
    held = paged(m, [prefix] + [own] * batch, sizes.kv_heads, sizes.head_dim)
    pages, table = (held["k_pages"], held["v_pages"]), held["page_table"]
    shared, rest, own_lens = table[0, : prefix // PAGE], table[1:, : -(-own // PAGE)], held["seq_lens"][1:]
    q = m.normal(batch, sizes.heads, sizes.head_dim)
    whole, lengths = torch.cat((shared.expand(batch, -1), rest), dim=1), own_lens + prefix

    def exact() -> Tensor:
        found = []
        for row, ids, length in zip(*(judged(x).split(1) for x in (q.double(), whole, lengths)), strict=True):
            k, v = (each[ids[0].long()].double() for each in pages)
            numbers = torch.arange(len(k), dtype=torch.int32, device=k.device)[None]
            found.append(reference.attention_decode(row, k, v, numbers, length, *4 * [None], sizes.head_dim**-0.5)[0])
        return torch.cat(found)

    return {
        "plain": lambda: attention_decode(q, *pages, whole, lengths),
        "cascade": lambda: cascade(q, *pages, shared, rest, own_lens),
        "exact": exact,
    }


def judged(x: Tensor) -> Tensor:
    """The sequences that are compared with fp64."""
    return x[:: max(len(x) // JUDGED, 1)]


def measure(sizes: LlamaSizes, options: argparse.Namespace) -> dict[str, Any]:
    """Returns bytes, errors and every sample of one shape."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    m = Maker.seeded(dtype, device, seed=0)
    ways = contenders(m, sizes, options.batch, options.prefix, options.own)
    exact = ways.pop("exact")()
    errors = {name: float((judged(way()) - exact).abs().max() / exact.abs().max()) for name, way in ways.items()}
    if device.type == "cuda":
        scratch = torch.empty(2 * device_info(device).l2_cache, dtype=torch.int8, device=device)
        samplers = {name: timing.events(way, scratch) for name, way in ways.items()}
    else:
        samplers = {name: timing.wall(way) for name, way in ways.items()}
    sampled = timing.in_turns(samplers, options.rounds)
    asked = read_bytes(sizes, options.batch, options.prefix, options.own, dtype.itemsize)
    return {
        name: {
            "bytes": asked[name],
            "error_of_largest": errors[name],
            "seconds": sampled[name],
            **timing.quantiles(sampled[name]),
        }
        for name in ways
    }


def main() -> None:
    """Measure, print a line for each shape and method, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-2-7b", "llama-2-70b"], help="presets, or toy")
    parser.add_argument("--batch", type=int, default=32, help="sequences")
    parser.add_argument("--prefix", type=int, default=4096, help=f"tokens that they share, a multiple of {PAGE}")
    parser.add_argument("--own", type=int, default=256, help="tokens of each sequence after the prefix")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=output_file, help="where to write conditions and every sample as JSON")
    options = parser.parse_args()
    if options.prefix % PAGE:
        parser.error(f"--prefix is {options.prefix}; legal: a multiple of {PAGE}, as pages are shared whole")
    backends = {op: backend_of(options.device)[op].backend for op in ("attention_decode", "merge_state")}
    samples = []
    with torch.inference_mode():
        for sizes in map(LlamaSizes.of, options.shapes):
            found = measure(sizes, options)
            samples.append({"shape": sizes.name, **found})
            for name, way in found.items():
                print(
                    f"{sizes.name}, {name}: {way['bytes'] / MIB:.0f} MiB of keys and values, "
                    f"{1e3 * way['median']:.2f} ms, {way['error_of_largest']:.1e} off",
                    flush=True,
                )
            plain, ours = found["plain"], found["cascade"]
            print(
                f"{sizes.name}: {(plain['bytes'] - ours['bytes']) / MIB:.0f} MiB saved, "
                f"{plain['bytes'] / ours['bytes']:.1f} times less, {plain['median'] / ours['median']:.1f} times faster",
                flush=True,
            )
    if options.output:
        conditions = {key: value for key, value in vars(options).items() if key != "output"} | {"backends": backends}
        record = {"benchmark": "cascade", "environment": environment(), "conditions": conditions}
        write_record(options.output, record | {"samples": samples})


if __name__ == "__main__":
    main()
