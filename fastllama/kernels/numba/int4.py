"""Products with 4-bit weights, unpacked in registers: codes stay in the order in which matrix instructions want them.

A run of 16 words holds, for one pair of rows, 64 columns in an order that is the same everywhere: x is brought into
that order once, so that eight words meet eight numbers of x in one vector instruction.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastllama.kernels import cpu
from fastllama.kernels.checks import as_rows
from fastllama.kernels.cpu.matmul import by_blocks
from fastllama.kernels.numba.numerics import LIKE, load, parallel_jit, store, use_threads
from fastllama.kernels.reference.int4 import COLUMNS, ROWS

ROW_LIMIT = 32  # beyond, to unpack the weight once is as fast
HALF = 64  # columns of 512 words
_PLACES = torch.tensor([[1.0, 2.0**-8], [2.0**-16, 2.0**-24]])[..., None]  # e, h


# One iteration owns a row of tiles, 64 features, for all rows of x. x: [rows, halves, e, h, 16] (`_ordered`). A group
# is `per_group` halves, or half of one where that is 0. Codes are not shifted down but for every second one: their
# places are factors of x. Nor are they centred: 8 times the sum of x, `eights` [rows, halves, 2], is taken off a group.
@parallel_jit
def rows_kernel(
    words, x, eights, scales_ptr, out_ptr, features, groups, per_group, scale_stride, out_stride, like, scale_like
):
    rows, halves = x.shape[0], x.shape[1]
    for tile in numba.prange((features + 63) // 64):
        sums = np.zeros((4, 2, 8, 16), np.float32)  # w, r, g and the 16 words of a run
        result = np.zeros(64, np.float32)
        for m in range(rows):
            result[:] = np.float32(0)
            low_eight, high_eight = np.float32(0), np.float32(0)
            for half in range(halves):
                at = (np.int64(tile) * halves + half) * 512
                low_eight += eights[m, half, 0]
                high_eight += eights[m, half, 1]
                for w in range(4):
                    for g in range(8):
                        run = at + w * 128 + g * 16
                        for i in range(16):
                            word = words[run + i]
                            next_word = word >> np.uint32(4)
                            a, b = sums[w, 0, g, i], sums[w, 1, g, i]
                            a += np.float32(np.int32(word & np.uint32(0xF))) * x[m, half, 0, 0, i]
                            b += np.float32(np.int32(next_word & np.uint32(0xF))) * x[m, half, 0, 0, i]
                            a += np.float32(np.int32(word & np.uint32(0xF00))) * x[m, half, 0, 1, i]
                            b += np.float32(np.int32(next_word & np.uint32(0xF00))) * x[m, half, 0, 1, i]
                            a += np.float32(np.int32(word & np.uint32(0xF0000))) * x[m, half, 1, 0, i]
                            b += np.float32(np.int32(next_word & np.uint32(0xF0000))) * x[m, half, 1, 0, i]
                            a += np.float32(np.int32(word & np.uint32(0xF000000))) * x[m, half, 1, 1, i]
                            b += np.float32(np.int32(next_word & np.uint32(0xF000000))) * x[m, half, 1, 1, i]
                            sums[w, 0, g, i], sums[w, 1, g, i] = a, b
                if half + 1 < halves and per_group > 1 and (half + 1) % per_group != 0:
                    continue
                group = 2 * half if per_group == 0 else half // per_group
                next_group = min(group + 1, groups - 1)  # past the last x is 0
                group = min(group, groups - 1)
                for w in range(4):
                    for r in range(2):
                        for g in range(8):
                            row = 16 * w + 8 * r + g
                            feature = min(np.int64(tile) * 64 + row, features - 1)
                            low, high = -low_eight, -high_eight
                            for q in range(4):  # words of the first 32 columns, and of the last
                                low += sums[w, r, g, 4 * q] + sums[w, r, g, 4 * q + 1]
                                high += sums[w, r, g, 4 * q + 2] + sums[w, r, g, 4 * q + 3]
                            scale = load(scales_ptr, feature * scale_stride + group, scale_like)
                            if per_group == 0:
                                other = load(scales_ptr, feature * scale_stride + next_group, scale_like)
                                result[row] += low * scale + high * other
                            else:
                                result[row] += (low + high) * scale
                sums[:] = np.float32(0)
                low_eight, high_eight = np.float32(0), np.float32(0)
            for row in range(min(64, features - np.int64(tile) * 64)):
                store(out_ptr, m * out_stride + np.int64(tile) * 64 + row, result[row], like)


# One iteration owns a row of tiles: the 64 rows of `wide` [rows, K] fp32 that they hold, less what is past its end.
@parallel_jit
def widen_kernel(words, scales_ptr, wide, first_tile, groups, group_size, scale_stride, scale_like):
    rows, size = wide.shape
    halves = 2 * ((size + 127) // 128)
    for tile in numba.prange((rows + 63) // 64):
        for w in range(4):
            for r in range(2):
                for g in range(8):
                    row = np.int64(tile) * 64 + 16 * w + 8 * r + g
                    if row >= rows:
                        continue
                    at = ((first_tile + np.int64(tile)) * halves) * 512 + w * 128 + g * 16
                    scales_at = (first_tile * 64 + row) * scale_stride
                    for half in range(halves):
                        for t in range(4):
                            start = half * 64 + 16 * t
                            if start >= size:
                                continue
                            scale = load(scales_ptr, scales_at + min(start // group_size, groups - 1), scale_like)
                            for q in range(4):
                                word = words[at + half * 512 + 4 * q + t] >> np.uint32(4 * r)
                                for h in range(2):
                                    for e in range(2):
                                        col = start + 8 * h + 2 * q + e
                                        code = np.int32((word >> np.uint32(16 * e + 8 * h)) & np.uint32(15))
                                        if col < size:
                                            wide[row, col] = np.float32(code - 8) * scale


def matmul_int4(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    """See kernels.matmul_int4. Zeros are the other CPU implementation's."""
    (features, groups), size = scales.shape, x.shape[-1]
    like, scale_like = LIKE.get(x.dtype), LIKE.get(scales.dtype)
    rows = x.numel() // size
    if zeros is not None or like is None or scale_like is None or not packed.is_contiguous() or not rows * features:
        cpu.matmul_int4(x, packed, scales, zeros, bias, out, workspace)
        return
    given, target = as_rows("x", x), as_rows("out", out)
    words = packed.view(-1).numpy().view(np.uint32)
    group_size, stride = size // groups, scales.stride(0)
    if rows <= ROW_LIMIT:
        use_threads(rows * features * size)
        per_group = group_size // HALF if groups > 1 else 2 * packed.shape[1]
        rows_kernel(
            words,
            *(each.numpy() for each in _ordered(given)),
            scales.data_ptr(),
            target.data_ptr(),
            features,
            groups,
            per_group,
            stride,
            target.stride(0),
            like,
            scale_like,
        )
    else:

        def widen(start: int, wide: Tensor) -> None:
            use_threads(wide.numel())
            first = start // ROWS
            widen_kernel(words, scales.data_ptr(), wide.numpy(), first, groups, group_size, stride, scale_like)

        by_blocks(given, features, target, widen)
    if bias is not None:
        target += bias


def _ordered(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, K] in the order of the words, and 8 times its sums.

    [rows, halves, e, h, 4 q + t] fp32, 0 past K, divided by 2^(16 e + 8 h), where a word has the code; [rows, halves,
    2], of 32 columns each.
    """
    columns = -(-x.shape[1] // COLUMNS) * COLUMNS
    padded = F.pad(x.float(), (0, columns - x.shape[1])).view(x.shape[0], -1, 4, 2, 4, 2)  # half, t, h, q, e
    ordered = padded.permute(0, 1, 5, 3, 4, 2).reshape(x.shape[0], -1, 2, 2, 16)
    return ordered * _PLACES, 8 * padded.view(x.shape[0], -1, 2, 32).sum(-1)
