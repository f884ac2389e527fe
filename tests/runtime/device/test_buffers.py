"""Buffers: typed parts of one piece of memory, each where the widest access may go, sent as they are."""

from __future__ import annotations

import pytest
import torch

from fastllama.runtime.device.buffers import Buffers, on_device

WANTED = {"a": ((3,), torch.int32), "b": ((2, 5), torch.int64), "none": ((0,), torch.int64), "c": ((1,), torch.float32)}


def test_parts_are_apart_and_aligned() -> None:
    buffers = Buffers(WANTED, torch.device("cpu"))
    for number, part in enumerate(buffers.host.values()):
        assert part.ctypes.data % 16 == 0
        part[...] = number + 1
    for number, (name, (shape, dtype)) in enumerate(WANTED.items()):
        part = buffers.device[name]
        assert (part.shape, part.dtype) == (shape, dtype)
        assert (part == number + 1).all()
    buffers.send()


def test_a_device_has_its_own() -> None:
    buffers = Buffers(WANTED, torch.device("meta"))
    assert {part.device.type for part in buffers.device.values()} == {"meta"}
    for part in buffers.host.values():
        part[...] = 1
    buffers.send()


@pytest.mark.parametrize("values", [[1, 2], [[1], [2]], []])
def test_on_device(values: list[object]) -> None:
    made = on_device(values, torch.int32, torch.device("cpu"))
    assert (made.tolist(), made.dtype) == (values, torch.int32)
