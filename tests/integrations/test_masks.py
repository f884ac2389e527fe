"""The mask of a patched model: attention over a key list is attention under transformers' own mask."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from fastllama.integrations.transformers.masks import as_booleans, is_key_list, key_list, width_of

CALLED_BY_POSITION = "cache_position" in inspect.signature(sdpa_mask).parameters  # transformers 4.57


def both(mask: Tensor | None, past: int, new: int, keys: int, batch: int, static: bool) -> tuple[Tensor | None, Tensor]:
    """The masks that our function and transformers' own make of a call."""
    call = {"batch_size": batch, "kv_length": keys, "attention_mask": mask, "mask_function": causal_mask_function}
    if CALLED_BY_POSITION:
        call["cache_position"] = torch.arange(past, past + new)
    else:
        call |= {"q_length": new, "q_offset": torch.tensor(past) if static else past}
    with torch.no_grad():
        return key_list(**call), sdpa_mask(**call, allow_is_causal_skip=False)


def meant(found: Tensor | None, new: int, keys: int, batch: int) -> Tensor:
    """[B, 1, S, L]: the keys that paged attention over a key list sees, by its definition."""
    if found is None:
        return torch.ones(new, keys, dtype=torch.bool).tril(keys - new).expand(batch, 1, new, keys)
    if not is_key_list(found):
        return found
    seen = torch.zeros(batch, 1, new, keys, dtype=torch.bool)
    for row, (length, *slots) in enumerate(found[:, 0, 0].tolist()):
        for query in range(new):
            seen[row, 0, query, slots[: max(length - new + query + 1, 0)]] = True
    return seen


def exactly(count: int, elements: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(elements, min_size=count, max_size=count)


@given(st.data())
def test_any_mask(data: st.DataObject) -> None:
    batch, past, new = (data.draw(st.integers(low, high)) for low, high in ((1, 3), (0, 5), (1, 5)))
    static = data.draw(st.booleans())
    keys = past + new + (data.draw(st.integers(0, 4)) if static else 0)
    mask = None
    if data.draw(st.booleans()):
        width = data.draw(st.integers(past + new, keys + 2))
        mask = torch.tensor(
            data.draw(st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=batch, max_size=batch))
        )
    found, expected = both(mask, past, new, keys, batch, static)
    seen = meant(found, new, keys, batch)
    if found is None or is_key_list(found):
        assert torch.equal(as_booleans(found, batch, new, keys, torch.device("cpu")), seen)
    expected = expected.expand(batch, 1, new, keys)
    # rows of padding before a sequence may attend to anything or nothing: they are unused
    rows = expected.any(-1)
    assert torch.equal(seen[rows], expected[rows])


@pytest.mark.parametrize(
    ("mask", "past", "listed"),
    [
        (None, 0, True),
        ([[0, 0, 1, 1], [1, 1, 1, 1]], 0, True),
        ([[1, 1, 0, 0], [1, 1, 1, 1]], 0, False),
        ([[1, 0, 1, 1], [1, 1, 1, 1]], 0, False),
        ([[1, 0, 1, 1], [1, 1, 1, 0]], 2, False),
        ([[1, 1, 1, 1], [0, 1, 0, 1]], 2, False),
        ([[1, 0, 1, 1], [0, 0, 0, 1]], 2, True),  # a hole among the cached tokens is nothing
        ([[1, 0, 1, 1], [1, 0, 0, 1]], 3, True),
    ],
)
def test_padding_is_listed_where_the_new_tokens_are_a_sequences_last(
    mask: list[list[int]] | None, past: int, listed: bool
) -> None:
    given_mask = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    found, _ = both(given_mask, past, 4 - past, 4, 2, static=True)
    assert (found is None or is_key_list(found)) == listed


def test_nothing_but_causal_is_no_mask() -> None:
    if not CALLED_BY_POSITION:  # before 5 a static cache cannot be recognized without waiting for the device
        assert both(None, 3, 2, 5, 2, static=False)[0] is None
    assert both(torch.ones(2, 5, dtype=torch.bool), 0, 5, 5, 2, static=False)[0] is None or CALLED_BY_POSITION


def test_a_list_keeps_its_shape_for_256_tokens() -> None:
    assert [width_of(keys) for keys in (1, 256, 257)] == [256, 256, 512]


@pytest.mark.parametrize("name", ["gradients", "another function"])
def test_masks_that_a_list_cannot_express_are_left_to_sdpa(name: str) -> None:
    call = {"batch_size": 1, "kv_length": 3, "attention_mask": None, "mask_function": causal_mask_function}
    call |= {"cache_position": torch.arange(3)} if CALLED_BY_POSITION else {"q_length": 3, "q_offset": 0}
    if name == "another function":
        call["mask_function"] = lambda batch, head, query, key: (query >= key) & (key > 0)
    with torch.set_grad_enabled(name == "gradients"):
        found = key_list(**call)
    assert found is not None
    assert found.dtype == torch.bool
    expected = torch.ones(3, 3, dtype=torch.bool).tril()
    expected[:, 0] &= name == "gradients"
    assert torch.equal(found.expand(1, 1, 3, 3)[0, 0], expected)
