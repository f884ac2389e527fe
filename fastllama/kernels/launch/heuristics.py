"""Launch configurations of each kernel family, computed from a call's shape and a device's properties alone."""

from __future__ import annotations

from dataclasses import dataclass

from fastllama.arithmetic import ceil_div, power_of_2
from fastllama.kernels.launch.device import Device

MAX_THREADS = 1024  # of a block, on NVIDIA and AMD alike


@dataclass(frozen=True)
class NormLaunch:
    """rms_norm and add_rms_norm: one program for each row."""

    num_warps: int


@dataclass(frozen=True)
class RopeLaunch:
    """rope and rope_and_write_kv: one program for `heads` heads (a power of two) of a token."""

    heads: int
    num_warps: int


@dataclass(frozen=True)
class SwigluLaunch:
    """silu_mul: one program for `block` columns (a power of two) of a row."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class SampleLaunch:
    """sample: one program for `block` logits (a power of two, at least 16) of a row."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class AdjustLaunch:
    """adjust_logits: one program for `block` logits (a power of two) of a row."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class PrefillLaunch:
    """attention_varlen and attention_prefill: one program for `rows` queries of a head, against `keys` keys at a time.

    Both are powers of two, at least 16. stages: tiles of keys in flight at once.
    """

    rows: int
    keys: int
    stages: int
    num_warps: int


@dataclass(frozen=True)
class DecodeLaunch:
    """attention_decode: one program for `split` keys of a sequence, `keys` at a time; split is a multiple of keys."""

    keys: int
    split: int
    stages: int
    num_warps: int


@dataclass(frozen=True)
class MatmulLaunch:
    """matmul of few rows: one program for `features` rows of the weight and one of `splits`, `size` columns at a time.

    All are powers of two, features and size at least 16. stages: tiles of the weight in flight at once.
    """

    features: int
    size: int
    splits: int
    stages: int
    num_warps: int


@dataclass(frozen=True)
class QuantizedMatmulLaunch:
    """matmul_int4 and _int8 of few rows: one program for 64 or 128 rows of the weight and one of `splits` of columns.

    stages: tiles of packed values, and of x, in flight at once. num_warps: up to 16 rows of x; twice as many for more.
    """

    splits: int
    stages: int
    num_warps: int


@dataclass(frozen=True)
class W8A8Launch:
    """matmul_w8a8: one program for `rows` rows of x, 128 of the weight and one of `splits`, `columns` at a time.

    rows is a power of two, at least 16; columns is 64 or 128. stages: tiles of both in flight at once.
    """

    rows: int
    columns: int
    splits: int
    stages: int
    num_warps: int


LaunchConfig = (
    NormLaunch
    | RopeLaunch
    | SwigluLaunch
    | SampleLaunch
    | AdjustLaunch
    | PrefillLaunch
    | DecodeLaunch
    | MatmulLaunch
    | QuantizedMatmulLaunch
    | W8A8Launch
)


def norm_heuristic(device: Device, *, size: int, itemsize: int) -> NormLaunch:
    """16 elements a thread (two 128-bit accesses of a 16-bit dtype), and more past 512 threads: 32 at 16384."""
    return NormLaunch(_warps(device, power_of_2(size) // 16, most=512))


def rope_heuristic(device: Device, *, rows: int, heads: int, head_dim: int, itemsize: int) -> RopeLaunch:
    """One 128-bit access a thread and half of a head, on as many heads as that takes.

    128 or 64 threads, the most that leave each multiprocessor four programs; else one warp.
    """
    pair_bytes = max(power_of_2(head_dim) // 2 * itemsize, 1)
    for threads in (128, 64):
        group = min(max(16 * threads // pair_bytes, 1), power_of_2(heads))
        if rows * ceil_div(heads, group) >= 4 * device.num_sms:
            return RopeLaunch(group, _warps(device, group * pair_bytes // 16))
    group = min(max(16 * device.warp_size // pair_bytes, 1), power_of_2(heads))
    return RopeLaunch(group, _warps(device, group * pair_bytes // 16))


def swiglu_heuristic(device: Device, *, rows: int, size: int, itemsize: int) -> SwigluLaunch:
    """One 128-bit access of gate and of up a thread: 256 or 128 if each multiprocessor gets four programs, else 64."""
    widest = power_of_2(size)
    for threads in (256, 128):
        block = threads * 16 // itemsize
        if block <= widest and rows * ceil_div(size, block) >= 4 * device.num_sms:
            return SwigluLaunch(block, _warps(device, threads))
    block = min(64 * 16 // itemsize, widest)
    return SwigluLaunch(block, _warps(device, block * itemsize // 16))


def sample_heuristic(device: Device, *, vocab_size: int, itemsize: int) -> SampleLaunch:
    """16 logits a thread: 8 programs for the smallest vocabulary of a Llama, 64 for 262144 tokens."""
    block = min(max(power_of_2(vocab_size), 16), 4096)
    return SampleLaunch(block, _warps(device, block // 16))


def adjust_heuristic(device: Device, *, vocab_size: int, itemsize: int) -> AdjustLaunch:
    """One 128-bit access of each tensor in fp32 a thread, 128 threads: 63 programs for one row of 32000 logits."""
    block = min(power_of_2(vocab_size), 512)
    return AdjustLaunch(block, _warps(device, block // 4))


def prefill_heuristic(device: Device, *, head_dim: int, itemsize: int, key_itemsize: int) -> PrefillLaunch:
    """The largest tiles whose sums stay in registers (64 a thread) and whose operands fit in shared memory."""
    width = max(power_of_2(head_dim), 16)
    for rows, keys, stages, num_warps in _prefill_tiles(device, itemsize, key_itemsize):
        registers = rows * width // (num_warps * device.warp_size)
        if registers <= 64 and _fits(device, rows, keys, stages, width * itemsize):
            break
    return PrefillLaunch(rows, keys, stages, num_warps)


def _prefill_tiles(device: Device, itemsize: int, key_itemsize: int) -> tuple[tuple[int, int, int, int], ...]:
    """Queries, keys, stages and warps that do not spill, the largest tiles first.

    64 keys only on sm_90, where tensor cores read them from shared memory: elsewhere they spill. So do 128 queries on
    AMD with 8-bit keys. NVIDIA multiplies fp32 without tensor cores, and a thread then holds whole rows of its
    operands: tiles of 128 by 32 spill 76 bytes on sm_80 and 80 KB on sm_100, of 64 by 16 still 12. 8-bit keys with fp32
    queries take the smallest tiles also because Triton would give larger ones to Blackwell's tensor cores, in TF32
    whatever precision is requested (triton-lang/triton#10176).
    """
    smallest = (16, 16, 1, 4)
    if itemsize == 4 and device.arch.startswith("sm_"):
        return (smallest,) if key_itemsize == 1 else ((32, 16, 2, 8), smallest)
    tiles = ((128, 32, 3, 8), (128, 32, 2, 8), (64, 32, 2, 4), (32, 32, 2, 4), smallest)
    if device.arch == "sm_90":
        return ((128, 64, 3, 8), *tiles)
    if key_itemsize == 1 and device.arch.startswith("gfx"):
        return tiles[2:]
    return tiles


def decode_heuristic(device: Device, *, queries: int, head_dim: int, itemsize: int) -> DecodeLaunch:
    """Tiles of 32 keys, with which twice as many programs fit as with 64; splits of 512: eight for 4096 tokens.

    itemsize: of keys and values. Three stages of 8-bit keys spill 8 bytes on sm_89, with Triton 3.6.
    """
    width = max(power_of_2(head_dim), 16) * itemsize
    for keys, stages in ((32, 3), (32, 2), (16, 2), (16, 1)):
        if stages == 3 and itemsize == 1 and device.arch == "sm_89":
            continue
        if _fits(device, max(power_of_2(queries), 16), keys, stages, width):
            break
    return DecodeLaunch(keys, 512, stages, 4)


def matmul_heuristic(device: Device, *, features: int, size: int, itemsize: int) -> MatmulLaunch:
    """Tiles of 64 rows by 256 bytes, and splits until each multiprocessor has three programs to hide a load's latency.

    Shared memory on sm_90 holds two programs at four stages (80 KiB up to 16 rows of x, 96 up to 32), one with more
    rows (128 KiB), and three at three stages up to 16 rows (60 KiB). `benchmarks.ops.tune` measures which is faster.
    128 bytes in fp32: 256 spill 1748 bytes at 64 rows on sm_80 and 8 on sm_90, with Triton 3.9.
    """
    columns = 128 if itemsize == 2 else 32
    for stages in (4, 3, 2):
        if stages * (64 + 64) * columns * itemsize <= device.shared_memory:
            break
    return MatmulLaunch(64, columns, _splits(3 * device.num_sms, ceil_div(features, 64), size), stages, 4)


def int4_heuristic(device: Device, *, features: int, size: int, itemsize: int) -> QuantizedMatmulLaunch:
    """Programs of 64 rows of the weight. Three stages spill 60 bytes on sm_100 in groups of 32, with Triton 3.6."""
    stages = 2 if device.arch == "sm_100" else 3
    return _quantized_matmul(device, ceil_div(features, 64), size, 128 // 2 + 64 * itemsize, stages)


def int8_heuristic(device: Device, *, features: int, size: int, itemsize: int) -> QuantizedMatmulLaunch:
    """Programs of 128 rows of the weight. Three stages spill 24 bytes on sm_80 up to 16 rows of x with a norm."""
    stages = 2 if device.arch == "sm_80" else 3
    return _quantized_matmul(device, ceil_div(features, 128), size, 128 + 64 * itemsize, stages)


def _quantized_matmul(
    device: Device, programs: int, size: int, column_bytes: int, stages: int
) -> QuantizedMatmulLaunch:
    """Three programs for each multiprocessor; the stages that fit in shared memory, up to `stages`.

    column_bytes: of a column of 128 packed rows of the weight and 64 rows of x.
    """
    splits = _splits(3 * device.num_sms, programs, size)
    return QuantizedMatmulLaunch(splits, min(max(device.shared_memory // (128 * column_bytes), 1), stages), 4)


def w8a8_heuristic(device: Device, *, rows: int, features: int, size: int) -> W8A8Launch:
    """Tiles of up to 128 rows; splits of at least 512 columns until each multiprocessor has a program, or three.

    With many rows, 128 columns at a time only on sm_90: elsewhere they spill.
    """
    block = min(max(power_of_2(rows), 16), 128)
    few = block <= 64
    columns = 128 if few or device.arch == "sm_90" else 64
    programs = ceil_div(rows, block) * ceil_div(features, 128)
    splits = _splits(device.num_sms * (3 if block <= 32 else 1), programs, size)
    stages = min(device.shared_memory // ((128 + block) * columns), 3 if columns == 128 else 4)
    return W8A8Launch(block, columns, splits, max(stages, 1), 4 if few else 8)


def _splits(wanted: int, programs: int, size: int) -> int:
    """Splits, a power of two: up to `wanted` programs, of at least 512 columns, since each writes partial sums."""
    splits = 1
    while programs * splits < wanted and 2 * splits * 512 <= size:
        splits *= 2
    return splits


def _fits(device: Device, rows: int, keys: int, stages: int, row_bytes: int) -> bool:
    """Whether a tile of queries and `stages` tiles of keys and of values fit in shared memory."""
    return (rows + 2 * stages * keys) * row_bytes <= device.shared_memory


def _warps(device: Device, threads: int, most: int = MAX_THREADS) -> int:
    """Warps for a number of threads that is a power of two."""
    return max(min(threads, most) // device.warp_size, 1)
