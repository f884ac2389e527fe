"""The growing KV cache matches transformers' own under everything that generate does, and has one shape for Triton."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from fastllama.integrations.transformers.attention import pages_of
from fastllama.integrations.transformers.cache import SMALLEST, GrowingLayer, own_layer
from tests.integrations.models import BEFORE_5, CACHE, IDS, assert_close, cache_of, pair

SHAPE = 2, 3, 4  # sequences, heads, numbers


def tokens(count: int, batch: int) -> Any:
    return torch.randn(batch, SHAPE[1], count, SHAPE[2])


def write(layer: GrowingLayer, keys: Any, values: Any) -> None:
    """Appends as a patched layer does, into the pages themselves."""
    batch, heads, count, head_dim = keys.shape
    past = layer.get_seq_length()
    for buffer, new in zip(layer.reserve(keys, (batch, heads, head_dim), count), (keys, values), strict=True):
        pages = pages_of(buffer)
        for row in range(batch):
            for i in range(count):
                pages[row * buffer.shape[1] + past + i, :, 0] = new[row, :, i]
    layer.written(count)


def crop(layer: Any, count: int) -> None:
    if BEFORE_5:
        layer.crop(max(layer.get_seq_length() - count, 0))
    else:
        layer.crop(-count)


ACTIONS: dict[str, Callable[[Any], None]] = {
    "crop 1": lambda layer: crop(layer, 1),
    "crop 0": lambda layer: crop(layer, 0) if not BEFORE_5 else None,
    "reorder": lambda layer: layer.reorder_cache(torch.arange(layer.keys.shape[0]).flip(0)),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([0])),
    "first sequence": lambda layer: layer.batch_select_indices(slice(0, 1)),
    "wider numbers": lambda layer: layer.update(*[torch.ones(layer.keys.shape[0], 3, 1, 4, dtype=torch.float64)] * 2),
}


@given(st.data())
def test_whatever_is_done_to_it_it_holds_what_a_stock_layer_holds(data: st.DataObject) -> None:
    ours, stock = GrowingLayer(), DynamicLayer()
    for _ in range(data.draw(st.integers(1, 8))):
        action = data.draw(st.sampled_from(["update", "write", "copy", "pickle", *ACTIONS]))
        batch = stock.keys.shape[0] if stock.is_initialized else SHAPE[0]
        if action in ("update", "write") or not stock.get_seq_length():
            count = data.draw(st.sampled_from([1, 2, 5, SMALLEST]))
            keys, values = tokens(count, batch), tokens(count, batch)
            stock.update(keys, values)
            if action == "write" and ours.takes(torch.float32):
                write(ours, keys, values)
            else:
                ours.update(keys, values)
        elif action == "copy":
            before, ours = ours, data.draw(st.sampled_from([copy.copy, copy.deepcopy]))(ours)
            before.keys.zero_()  # which is none of the copy's business
        elif action == "pickle":
            ours = pickle.loads(pickle.dumps(ours))
        else:
            for layer in (ours, stock):
                ACTIONS[action](layer)
        assert ours.get_seq_length() == stock.get_seq_length()
        assert torch.equal(ours.keys, stock.keys)
        assert torch.equal(ours.values, stock.values)


def test_its_strides_stay_and_its_memory_doubles() -> None:
    layer, buffers, strides = GrowingLayer(), set(), set()
    for _ in range(3 * SMALLEST):
        layer.update(tokens(1, 2), tokens(1, 2))
        buffers.add(layer.keys.data_ptr())
        strides.add(layer.keys.stride()[1:])
    assert strides == {(SHAPE[2], SHAPE[1] * SHAPE[2], 1)}
    assert len(buffers) <= 3


def test_a_crop_copies_nothing() -> None:
    """Assisted decoding crops at every step."""
    layer = GrowingLayer()
    layer.update(tokens(9, 2), tokens(9, 2))
    before = layer.keys.data_ptr(), layer.values.data_ptr()
    crop(layer, 3)
    layer.update(tokens(1, 2), tokens(1, 2))
    assert (layer.keys.data_ptr(), layer.values.data_ptr()) == before
    assert layer.get_seq_length() == 7


@pytest.mark.parametrize("batch", [1, 3])
def test_another_batch_is_refused_before_anything_is_written(batch: int) -> None:
    layer = GrowingLayer()
    layer.update(tokens(2, 2), tokens(2, 2))
    with pytest.raises(ValueError, match=rf"the cache holds 2 sequences of 3 heads of 4, .*; these are {batch} of 3"):
        layer.reserve(torch.empty(0), (batch, 3, 4), 1)
    assert layer.get_seq_length() == 2


@pytest.mark.parametrize("made", ["from nothing", "from a configuration"])
def test_an_empty_dynamic_cache_gets_our_layers(made: str) -> None:
    stock, patched = pair()
    cache = DynamicCache() if made == "from nothing" else DynamicCache(config=stock.config)
    with torch.inference_mode():
        patched(IDS, **{CACHE: cache})
    assert [type(layer) for layer in cache.layers] == [GrowingLayer] * stock.config.num_hidden_layers


def test_a_cache_of_another_kind_stays_what_it_is() -> None:
    class Compressing(DynamicLayer):
        """Like a quantized cache, it returns other values than were stored."""

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys.bfloat16().float(), values.bfloat16().float()

    stock, patched = pair()
    found = []
    with torch.inference_mode():
        for model in (stock, patched):
            cache = DynamicCache(config=model.config)
            cache.layers = [Compressing() for _ in cache.layers]
            model(IDS, **{CACHE: cache})
            found.append(model(IDS[:, :1], **{CACHE: cache}).logits)
            assert type(cache.layers[0]) is Compressing
    assert_close(found[1], found[0], bound=1e-2)  # what rounds to one side here may round to the other there


def test_a_filled_cache_is_not_taken_over() -> None:
    stock, patched = pair()
    with torch.inference_mode():
        cache = cache_of(stock(IDS))
        patched(IDS[:, :1], **{CACHE: cache})
    assert type(cache.layers[0]) is DynamicLayer
    assert own_layer(cache, 0, torch.float32) is None


@pytest.mark.parametrize("place", ["cache", "layer", "class"])
def test_an_update_that_was_replaced_is_called(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries that compress or record caches do so."""
    _, patched = pair()
    cache, calls = DynamicCache(config=patched.config), []
    owner: Any = {"cache": cache, "layer": cache.layers[0], "class": DynamicLayer}[place]
    stock = owner.update

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return stock(*args, **kwargs)

    monkeypatch.setattr(owner, "update", counting)
    with torch.inference_mode():
        patched(IDS, **{CACHE: cache})
        patched(IDS[:, :1], **{CACHE: cache})
    assert len(calls) == (2 if place == "layer" else 2 * patched.config.num_hidden_layers)


def test_gradients_go_through_the_cache() -> None:
    """A patched model's cache continued by layers that train: none of their saved tensors is overwritten."""
    found = []
    for layer in (GrowingLayer(), DynamicLayer()):
        torch.manual_seed(0)
        layer.update(tokens(3, 2), tokens(3, 2))
        leaf = tokens(2, 2).requires_grad_()
        first, _ = layer.update(leaf, leaf.detach())
        second, _ = layer.update(2 * leaf, leaf.detach())
        ((first**2).sum() + (second**3).sum()).backward()
        found.append(leaf.grad)
    assert_close(found[0], found[1])


def test_a_prompts_cache_is_used_again() -> None:
    """A copy of the cache of a common beginning, as transformers' documentation advises."""
    stock, patched = pair()
    with torch.inference_mode():
        begun = cache_of(patched(IDS, use_cache=True))
        for end in (IDS[:, :3], IDS[:, 4:9]):
            found = patched(end, **{CACHE: copy.deepcopy(begun)}).logits
            assert_close(found, stock(torch.cat((IDS, end), 1)).logits[:, 9:])
        assert begun.get_seq_length() == 9
