"""Rotary tables of flash_attn_with_kvcache are read anew at each call, whoever wrote them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastllama.integrations.flash_attn import flash_attn_with_kvcache
from fastllama.integrations.flash_attn.rotary import side_by_side
from tests.integrations.flash_attn.explicit import assert_near, rotated

WRITES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda x: x.mul_(0.1),
    "data": lambda x: x.data.copy_(torch.rand(16, 8)),
    "numpy": lambda x: x.numpy().__setitem__(slice(None), 0.5),
    "dlpack": lambda x: torch.from_dlpack(x).mul_(0.1),
}


def key_written(cos: Tensor, sin: Tensor, k: Tensor, **flags: bool) -> Tensor:
    """[H, D]: the cached value of the new key k [1, 1, H, D] at position 3."""
    cache = torch.zeros(1, 5, 2, 16), torch.zeros(1, 5, 2, 16)
    flash_attn_with_kvcache(torch.randn(1, 1, 2, 16), *cache, k, k, cos, sin, cache_seqlens=3, **flags)
    return cache[0][0, 3]


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("which", [0, 1], ids=["cosines", "sines"])
def test_angles_that_change_unseen_by_autograd_are_read_anew(which: int, write: Callable[[Tensor], object]) -> None:
    angles, k = (torch.rand(16, 8), torch.rand(16, 8)), torch.randn(1, 1, 2, 16)
    key_written(*angles, k)
    write(angles[which])
    assert_near(key_written(*angles, k), rotated(k[0], *angles, torch.tensor([3]), interleaved=True)[0], k.dtype, 4.0)


def test_pairs_lie_side_by_side_unless_it_is_asked_otherwise() -> None:
    cos, sin, k = torch.rand(16, 8), torch.rand(16, 8), torch.randn(1, 1, 2, 16)
    assert torch.equal(key_written(cos, sin, k), key_written(cos, sin, k, rotary_interleaved=True))
    assert not torch.equal(key_written(cos, sin, k), key_written(cos, sin, k, rotary_interleaved=False))


def test_halves_of_one_tensor_are_read_where_they_lie() -> None:
    whole, k = torch.rand(16, 16), torch.randn(1, 1, 2, 16)
    cos, sin = whole.chunk(2, 1)
    assert side_by_side(cos, sin).data_ptr() == whole.data_ptr()
    assert torch.equal(key_written(cos, sin, k), key_written(cos.clone(), sin.clone(), k))


@pytest.mark.parametrize(
    "halves",
    [
        lambda x: (x[:, 8:], x[:, :8]),
        lambda x: (x[:, :8], x[:, 7:15]),
        lambda x: (x[:8, :8], x[8:, :8]),
        lambda x: (x[:8:2, :8], x[:4, 8:]),
        lambda x: (x[:8, :8:2], x[:8, 4:12:2]),
        lambda x: (x[:, ::2], x[:, 1::2]),
        lambda x: (x[:, :8], x.clone()[:, 8:]),
    ],
    ids=[
        "other way round",
        "overlapping",
        "other rows",
        "rows farther apart",
        "every other number",
        "alternating",
        "another tensor",
    ],
)
def test_what_are_no_halves_of_one_tensor_is_copied(halves: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    cos, sin = halves(torch.rand(16, 16))
    assert torch.equal(side_by_side(cos, sin), torch.cat((cos, sin), 1))
