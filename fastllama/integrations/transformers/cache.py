"""The KV cache of a patched model: layers of a DynamicCache, stored [B, capacity, Hkv, D] and grown by doubling.

transformers' DynamicLayer concatenates [B, Hkv, L, D] at each token: it copies all keys and values, and changes the
stride between heads, a compile-time constant of the Triton attention kernels. Here that stride is always D, a token is
written in place, and capacity doubles.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from fastllama.arithmetic import power_of_2

SMALLEST = 256  # tokens of a sequence
_UPDATES = DynamicLayer.update, Cache.update  # some libraries replace them, to observe or change the cached values


class _Growing:
    """Keys or values: the first `length` tokens of each row of a buffer [B, capacity, Hkv, D]."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.length = 0

    def reserve(self, like: Tensor, shape: tuple[int, int, int], tokens: int) -> Tensor:
        """The buffer, with room for `tokens` more; shape: B, Hkv, D; like: a tensor of its dtype and device."""
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
            self.buffer = old.clone()  # inference tensors cannot be written outside inference mode
        assert self.buffer is not None
        return self.buffer

    def append(self, new: Tensor) -> Tensor:
        """Append new [B, Hkv, S, D]; returns `view`, in the wider of the two dtypes."""
        view = self.view
        if view is not None and (view.dtype != new.dtype or (torch.is_grad_enabled() and new.requires_grad)):
            view = self.view = torch.cat((view, new), -2)  # not in place: a backward may need the old ones
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
        """Replace the content by [B, Hkv, L, D]: only the length changes if it is a prefix of `view`, else a copy."""
        view = self.view
        if value is None or value.dim() != 4:  # transformers initializes with an empty one-dimensional tensor
            self.buffer, self.length = None, 0
        elif view is not None and _begins(value, view):
            self.length = value.shape[2]
        else:
            self.buffer, self.length = None, 0
            self.append(value)


def _begins(value: Tensor, view: Tensor) -> bool:
    """Whether a tensor is a prefix, in tokens, of a view."""
    same = value.data_ptr() == view.data_ptr() and value.stride() == view.stride() and value.dtype == view.dtype
    return same and (value.shape[:2], value.shape[3]) == (view.shape[:2], view.shape[3])


class GrowingLayer(DynamicLayer):
    """A DynamicLayer that writes in place. Assigning or slicing `keys` and `values` works as on a stock one.

    `keys` and `values` are views: after a crop, later writes show in views taken before.
    """

    def __init__(self, **unused: Any) -> None:
        self._keys, self._values = _Growing(), _Growing()
        super().__init__()

    keys = property(lambda self: self._keys.view, lambda self, value: setattr(self._keys, "view", value))
    values = property(lambda self: self._values.view, lambda self, value: setattr(self._values, "view", value))

    def __copy__(self) -> GrowingLayer:
        """A copy with its own buffers: two layers that share one would overwrite each other's tokens."""
        return copy.deepcopy(self)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Does nothing: memory is allocated with the first token."""
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
        """Buffers [B, capacity, Hkv, D] of keys and values, with room for `tokens` more.

        shape: B, Hkv and D; like: a tensor of their dtype and device.
        """
        if not self.is_initialized:
            self.lazy_initialization(like)
        return self._keys.reserve(like, shape, tokens), self._values.reserve(like, shape, tokens)

    def written(self, tokens: int) -> None:
        """Advance the length by `tokens` written into the buffers of `reserve`."""
        self._keys.length += tokens
        self._values.length += tokens

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether keys and values of a dtype may be written to the buffers."""
        return all(kept.buffer is None or kept.buffer.dtype == dtype for kept in (self._keys, self._values))


def own_layer(cache: Cache | None, index: int, dtype: torch.dtype) -> GrowingLayer | None:
    """The layer of a cache, if it is a GrowingLayer that accepts the dtype; an empty DynamicCache layer becomes one.

    Other caches (static, quantized, offloaded, or already filled) are unchanged, and so is one whose `update` was
    replaced.
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
