"""Heuristics of launch configurations: legal for every shape and device, without a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllama.arithmetic import power_of_2
from fastllama.catalogue.sizes import LlamaSizes
from fastllama.kernels.launch import heuristics, tuning
from fastllama.kernels.launch.device import CPU, Device

A100 = Device("nvidia-a100-sxm4-80gb", "sm_80", 108, 32, 163 << 10, 40 << 20)
RTX_4090 = Device("nvidia-geforce-rtx-4090", "sm_89", 128, 32, 99 << 10, 72 << 20)
H200 = Device("nvidia-h200", "sm_90", 132, 32, 227 << 10, 60 << 20)
MI300X = Device("amd-instinct-mi300x", "gfx942", 304, 64, 64 << 10, 4 << 20)
SMALL, LARGE = LlamaSizes.of("llama-2-7b"), LlamaSizes.of("llama-2-70b")
DEVICES = [A100, RTX_4090, H200, MI300X, CPU]

sizes = st.integers(1, 1 << 18)
rows = st.integers(1, 1 << 20)
itemsizes = st.sampled_from([2, 4])
devices = st.sampled_from(DEVICES)


def assert_legal(device: Device, launch: Any) -> None:
    for name, value in dataclasses.asdict(launch).items():
        assert value >= 1
        assert value & (value - 1) == 0 or name == "stages"
    assert launch.num_warps * device.warp_size <= heuristics.MAX_THREADS


@given(devices, sizes, itemsizes)
def test_norm(device: Device, size: int, itemsize: int) -> None:
    launch = heuristics.norm_heuristic(device, size=size, itemsize=itemsize)
    assert_legal(device, launch)
    threads = launch.num_warps * device.warp_size
    assert threads == 512 or 16 * threads >= size, "more than 16 elements a thread while there were threads left"


@given(devices, rows, st.integers(1, 256), st.sampled_from([2, 32, 64, 80, 128, 256]), itemsizes)
def test_rope(device: Device, rows: int, heads: int, head_dim: int, itemsize: int) -> None:
    launch = heuristics.rope_heuristic(device, rows=rows, heads=heads, head_dim=head_dim, itemsize=itemsize)
    assert_legal(device, launch)
    assert launch.heads < 2 * heads


@given(devices, rows, sizes, itemsizes)
def test_swiglu(device: Device, rows: int, size: int, itemsize: int) -> None:
    launch = heuristics.swiglu_heuristic(device, rows=rows, size=size, itemsize=itemsize)
    assert_legal(device, launch)
    assert launch.block < 2 * size
    assert launch.block * itemsize >= 16 * min(launch.num_warps * device.warp_size, launch.block * itemsize // 16)


@given(devices, sizes, itemsizes)
def test_sample(device: Device, vocab_size: int, itemsize: int) -> None:
    launch = heuristics.sample_heuristic(device, vocab_size=vocab_size, itemsize=itemsize)
    assert_legal(device, launch)
    assert launch.block <= 8 * heuristics.MAX_THREADS


@given(devices, sizes, itemsizes)
def test_adjust(device: Device, vocab_size: int, itemsize: int) -> None:
    launch = heuristics.adjust_heuristic(device, vocab_size=vocab_size, itemsize=itemsize)
    assert_legal(device, launch)
    assert launch.block < 2 * vocab_size
    threads = launch.num_warps * device.warp_size
    assert launch.block == 4 * threads or threads == device.warp_size, "no 128-bit access of fp32 a thread"


@pytest.mark.parametrize(
    ("size", "warps", "warps_of_64"), [(64, 1, 1), (4096, 8, 4), (5120, 16, 8), (8192, 16, 8), (16384, 16, 8)]
)
def test_norms_of_llama_2(size: int, warps: int, warps_of_64: int) -> None:
    assert heuristics.norm_heuristic(H200, size=size, itemsize=2).num_warps == warps
    assert heuristics.norm_heuristic(MI300X, size=size, itemsize=2).num_warps == warps_of_64


def test_few_rows_still_fill_the_device() -> None:
    alone = heuristics.swiglu_heuristic(H200, rows=1, size=11008, itemsize=2)
    many = heuristics.swiglu_heuristic(H200, rows=8192, size=11008, itemsize=2)
    assert (alone, many) == (heuristics.SwigluLaunch(512, 2), heuristics.SwigluLaunch(2048, 8))
    alone = heuristics.rope_heuristic(H200, rows=1, heads=96, head_dim=128, itemsize=2)
    many = heuristics.rope_heuristic(H200, rows=8192, heads=96, head_dim=128, itemsize=2)
    some = heuristics.rope_heuristic(H200, rows=64, heads=96, head_dim=128, itemsize=2)
    assert (alone, some, many) == tuple(heuristics.RopeLaunch(*each) for each in ((4, 1), (8, 2), (16, 4)))


@given(devices, st.integers(1, 256), itemsizes, st.booleans())
def test_prefill(device: Device, head_dim: int, itemsize: int, codes: bool) -> None:
    sizes = {"itemsize": itemsize, "key_itemsize": 1 if codes else itemsize}
    launch = heuristics.prefill_heuristic(device, head_dim=head_dim, **sizes)
    assert_legal(device, launch)
    assert min(launch.rows, launch.keys) >= 16
    width = max(power_of_2(head_dim), 16) * itemsize
    assert (launch.rows + 2 * launch.stages * launch.keys) * width <= device.shared_memory or launch.rows == 16


@given(devices, st.integers(1, 64), st.integers(1, 256), itemsizes)
def test_decode(device: Device, queries: int, head_dim: int, itemsize: int) -> None:
    launch = heuristics.decode_heuristic(device, queries=queries, head_dim=head_dim, itemsize=itemsize)
    assert_legal(device, launch)
    assert launch.split % launch.keys == 0


@given(devices, sizes, sizes, itemsizes, st.sampled_from([4, 8]))
def test_quantized_weights(device: Device, features: int, size: int, itemsize: int, bits: int) -> None:
    kind = tuning.FAMILIES[f"int{bits}"]
    found = kind.heuristic(device, features=features, size=size, itemsize=itemsize)
    launch = cast(heuristics.QuantizedMatmulLaunch, found)
    assert_legal(device, launch)
    assert launch.splits == 1 or size // launch.splits >= 512
    assert launch.stages == 1 or launch.stages * 128 * (16 * bits + 64 * itemsize) <= device.shared_memory


@pytest.mark.parametrize(("features", "size", "splits"), [(*SMALL.down, 8), (*SMALL.qkv, 4), (*LARGE.gate_up, 1)])
def test_quantized_weights_of_llama_2(features: int, size: int, splits: int) -> None:
    """In 8 bits a program has twice as many rows of the weight as in 4."""
    shape = {"features": features, "size": size, "itemsize": 2}
    assert heuristics.int4_heuristic(H200, **shape) == heuristics.QuantizedMatmulLaunch(splits, 3, 4)
    more = 1 if splits == 1 else 2 * splits
    assert heuristics.int8_heuristic(H200, **shape) == heuristics.QuantizedMatmulLaunch(more, 3, 4)


def test_attention_of_llama_2() -> None:
    sizes = {"head_dim": 128, "itemsize": 2}
    for device, launch in ((H200, (128, 64, 3, 8)), (A100, (128, 32, 3, 8)), (MI300X, (128, 32, 2, 8))):
        assert heuristics.prefill_heuristic(device, **sizes, key_itemsize=2) == heuristics.PrefillLaunch(*launch)
    assert heuristics.prefill_heuristic(MI300X, **sizes, key_itemsize=1) == heuristics.PrefillLaunch(64, 32, 2, 4)
    for device, launch in ((H200, (32, 16, 2, 8)), (RTX_4090, (32, 16, 2, 8)), (MI300X, (16, 16, 1, 4))):
        fp32 = {"head_dim": 128, "itemsize": 4}
        assert heuristics.prefill_heuristic(device, **fp32, key_itemsize=4) == heuristics.PrefillLaunch(*launch)
        assert heuristics.prefill_heuristic(device, **fp32, key_itemsize=1) == heuristics.PrefillLaunch(16, 16, 1, 4)
    for queries in (1, 8):
        decode = heuristics.decode_heuristic(H200, queries=queries, head_dim=128, itemsize=2)
        assert decode == heuristics.DecodeLaunch(32, 512, 3, 4)


@pytest.mark.parametrize("name", ["norm", "sample", "prefill", "decode", "int4", "int8"])
def test_what_sums_does_not_know_the_batch(name: str) -> None:
    """Another number of threads is another order of summation: results would not be batch-invariant."""
    assert "rows" not in tuning.FAMILIES[name].shape


@pytest.mark.parametrize(("most", "expected"), [(1, [1]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8])])
def test_row_counts_meet_every_power_of_two(most: int, expected: list[int]) -> None:
    assert list(tuning.row_counts(most)) == expected
