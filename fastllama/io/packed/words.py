"""Packs integers of 4 or 8 bits into 32-bit words, the first in the lowest bits; v is stored as v + 2^(bits - 1)."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllama.arithmetic import ceil_div

assert sys.byteorder == "little"  # words are viewed as bytes


def words_of(count: int, bits: int) -> int:
    """Number of words that `count` integers take."""
    return ceil_div(count * bits, 32)


def pack_nibbles(values: Tensor, dim: int = 1) -> Tensor:
    """Stored values uint8 [N, K], 0 to 15 -> int32, eight per word along dim 1 or 0, padded with zeros."""
    if dim == 0:
        return pack_nibbles(_transposed(values)).T.contiguous()
    values = F.pad(values, (0, -values.shape[1] % 8)).contiguous()
    return (values[:, 0::2] | values[:, 1::2] << 4).view(torch.int32)


def unpack_nibbles(words: Tensor, count: int, dim: int = 1) -> Tensor:
    """The inverse of `pack_nibbles`, from contiguous words: uint8 from 0 to 15, `count` of them along dim."""
    if dim == 0:
        return unpack_nibbles(_transposed(words), count).T.contiguous()
    pairs = words.view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), 2).flatten(1)[:, :count]


def pack_bytes(values: Tensor) -> Tensor:
    """int8 [N, K] -> int32, four per word along the columns, padded with zeros."""
    rows, columns = values.shape
    stored = F.pad(values.view(torch.uint8) ^ 128, (0, -columns % 4)).contiguous()
    return stored.view(-1).view(torch.int32).view(rows, words_of(columns, 8))


def unpack_bytes(words: Tensor, count: int, dim: int = 1) -> Tensor:
    """The inverse of `pack_bytes`, from contiguous words: int8, `count` of them along dim 1 or 0."""
    if dim == 0:
        return unpack_bytes(_transposed(words), count).T.contiguous()
    return (words.view(torch.uint8)[:, :count] ^ 128).view(torch.int8)


def _transposed(tensor: Tensor) -> Tensor:
    """A transposed copy; `contiguous` would keep odd strides of size-1 dimensions, which cannot be viewed as bytes."""
    return tensor.T.clone(memory_format=torch.contiguous_format)
