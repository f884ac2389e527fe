"""The KV cache of a patched model: a DynamicCache's layers, kept [B, capacity, Hkv, D] and grown by doubling.

transformers' own DynamicLayer concatenates [B, Hkv, L, D] at each token: it copies all keys and values every time, and
the stride between heads, which Triton compiles into the attention kernels, is another one each time. Here that stride
is D for ever, a token is written in place, and capacity doubles.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from fastllama.arithmetic import power_of_2

SMALLEST = 256  # tokens of a sequence
_UPDATES = DynamicLayer.update, Cache.update  # which some libraries replace, to see or to change what is cached


class _Growing:
    """Keys or values: the first `length` tokens of each row of a buffer [B, capacity, Hkv, D]."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.length = 0

    def reserve(self, like: Tensor, shape: tuple[int, int, int], tokens: int) -> Tensor:
        """The buffer, with room for so many more tokens; shape: B, Hkv, D; like: a tensor of its dtype and device."""
        batch, heads, head_dim = shape
        needed = self.length + tokens
        old = self.buffer
        if old is not None and (old.shape[0], *old.shape[2:], old.dtype) != (batch, heads, head_dim, like.dtype):
            raise ValueError(
                f"the cache holds {old.shape[0]} sequences of {old.shape[2]} heads of {old.shape[3]}, {old.dtype}; "
                f"these are {batch} of {heads} of {head_dim}, {like.dtype}"
            )
        if old is None or old.shape[1] < needed:
            capacity = max(power_of_2(needed), SMALLEST)
            self.buffer = like.new_empty(batch, capacity, heads, head_dim)
            if old is not None:
                self.buffer[:, : self.length] = old[:, : self.length]
        elif old.is_inference() and not torch.is_inference_mode_enabled():
            self.buffer = old.clone()  # torch writes to no tensor of inference mode outside of it
        assert self.buffer is not None
        return self.buffer

    def append(self, new: Tensor) -> Tensor:
        """Write new [B, Hkv, S, D] behind what is there; returns `view`. The result has the wider of two dtypes."""
        view = self.view
        if view is not None and (view.dtype != new.dtype or (torch.is_grad_enabled() and new.requires_grad)):
            view = self.view = torch.cat((view, new), -2)  # not in place: a backward may want the old ones
            return view
        batch, heads, tokens, head_dim = new.shape
        buffer = self.reserve(new, (batch, heads, head_dim), tokens)
        end = self.length + tokens
        buffer[:, self.length : end] = new.transpose(1, 2)
        self.length = end
        return self.view

    @property
    def view(self) -> Any:
        """[B, Hkv, L, D]; None before the first token."""
        return None if self.buffer is None else self.buffer[:, : self.length].transpose(1, 2)

    @view.setter
    def view(self, value: Tensor | None) -> None:
        """Take a tensor [B, Hkv, L, D] for what is kept: by its length where it is the begin of `view`, else a copy."""
        view = self.view
        if value is None or value.dim() != 4:  # transformers begins with a tensor of no dimensions worth the name
            self.buffer, self.length = None, 0
        elif view is not None and _begins(value, view):
            self.length = value.shape[2]
        else:
            self.buffer, self.length = None, 0
            self.append(value)


def _begins(value: Tensor, view: Tensor) -> bool:
    """Whether a tensor is the first tokens of every sequence and head of a view."""
    same = value.data_ptr() == view.data_ptr() and value.stride() == view.stride() and value.dtype == view.dtype
    return same and (value.shape[:2], value.shape[3]) == (view.shape[:2], view.shape[3])


class GrowingLayer(DynamicLayer):
    """A DynamicLayer that writes in place. What sets or slices `keys` and `values` does as it does on a stock one.

    `keys` and `values` are views: after a crop, what is written next shows in those taken before.
    """

    def __init__(self, **unused: Any) -> None:
        self._keys, self._values = _Growing(), _Growing()
        super().__init__()

    keys = property(lambda self: self._keys.view, lambda self, value: setattr(self._keys, "view", value))
    values = property(lambda self: self._values.view, lambda self, value: setattr(self._values, "view", value))

    def __copy__(self) -> GrowingLayer:
        """Of its own, as two that write to one buffer would overwrite each other's tokens."""
        return copy.deepcopy(self)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Nothing is allocated before the first token."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, Hkv, S, D]; returns all keys and values, [B, Hkv, L, D], as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        return self._keys.append(key_states), self._values.append(value_states)

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self._keys.length

    def reserve(self, like: Tensor, shape: tuple[int, int, int], tokens: int) -> tuple[Tensor, Tensor]:
        """Buffers [B, capacity, Hkv, D] of keys and values, with room for so many more tokens.

        shape: B, Hkv and D; like: a tensor of their dtype and device.
        """
        if not self.is_initialized:
            self.lazy_initialization(like)
        return self._keys.reserve(like, shape, tokens), self._values.reserve(like, shape, tokens)

    def written(self, tokens: int) -> None:
        """So many tokens were written into the buffers of `reserve`."""
        self._keys.length += tokens
        self._values.length += tokens

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether keys and values of a dtype may be written to the buffers."""
        return all(kept.buffer is None or kept.buffer.dtype == dtype for kept in (self._keys, self._values))


def own_layer(cache: Cache | None, index: int, dtype: torch.dtype) -> GrowingLayer | None:
    """The layer of a cache, if it is one of ours and takes a dtype; an empty layer of a DynamicCache becomes one.

    Other caches (static, quantized, offloaded, or filled by something else) stay what they are, and one whose `update`
    was replaced is asked for it.
    """
    if type(cache) is not DynamicCache or cache.offloading or "update" in cache.__dict__:
        return None
    if (DynamicLayer.update, Cache.update) != _UPDATES:
        return None
    layers: list[Any] = cache.layers
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    while cache.layer_class_to_replicate is GrowingLayer and len(layers) <= index:
        layers.append(GrowingLayer())
    layer = layers[index]
    if type(layer) is DynamicLayer and not layer.is_initialized and "update" not in layer.__dict__:
        layer = layers[index] = GrowingLayer()
    return layer if type(layer) is GrowingLayer and "update" not in layer.__dict__ and layer.takes(dtype) else None
