"""The attention mask of a patched model: a list of the cached tokens of each sequence, made once per forward.

transformers calls a mask function for one tensor that every layer then gets. A stock mask is [B, 1, S, L] booleans;
ours is a page table: for each sequence its number of keys and their slots in the cache, in order. Left padding and gaps
among the cached tokens are slots that are not listed, so the paged attention kernels need no mask at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from transformers.masking_utils import causal_mask_function, sdpa_mask

from fastllama.arithmetic import ceil_div

STEP = 256  # a list's length is a multiple of this, so that the shapes of decode steps rarely change


def width_of(num_keys: int) -> int:
    """Columns of a list of `num_keys` slots."""
    return ceil_div(num_keys, STEP) * STEP


def is_key_list(mask: Tensor | None) -> bool:
    """Whether a layer's mask is a key list; else it is None, or a boolean or additive mask of the caller."""
    if mask is None or mask.dtype != torch.int32 or mask.dim() != 4:
        return False
    return mask.shape[2] == 1 and mask.shape[3] % STEP == 1


def keys_of(mask: Tensor) -> int | None:
    """The number of keys that a key list was made for; None where a compiled graph made it."""
    return getattr(mask, "_fastllama_keys", None)


def as_booleans(mask: Tensor | None, batch: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """A key list, or None, as a boolean mask for SDPA: [B, 1, S, L]."""
    if mask is None:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        return seen.expand(batch, 1, queries, keys)
    lengths, slots = mask[:, 0, 0, :1], mask[:, 0, 0, 1:].long()
    places = torch.arange(slots.shape[1], dtype=torch.int64, device=device).expand_as(slots)
    # The index of each slot in the list; slots not listed get one after every query's last key.
    listed = torch.where(places < lengths, slots, keys)
    place_of = torch.full((batch, keys + 1), 1 << 30, dtype=torch.int64, device=device)
    place_of = place_of.scatter_(1, listed, places)[:, :keys]
    last = lengths - queries + torch.arange(queries, dtype=torch.int64, device=device)
    return (place_of[:, None] <= last[:, :, None])[:, None]


def key_list(
    *,
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    **others: Any,
) -> Tensor | None:
    """The mask function that transformers calls once per forward; attention_mask: [B, up to L] booleans, of padding.

    Returns [B, 1, 1, 1 + W] int32, the number of a sequence's keys and then their slots, W being L rounded up to a
    multiple of 256; or None, where every token attends to all before it; or SDPA's mask, [B, 1, S, L] booleans, where a
    list cannot express it: several sequences packed into one row, padding after or between the new tokens (attention
    aligns the last query with the last key); and where layers run transformers' code, with gradients or under autocast.
    4-D, because transformers passes such a mask through unchanged. With several new tokens and a mask it synchronizes
    with the device once, to read the padding; a decode step never does.
    transformers 5 passes q_length and q_offset, 4.57 cache_position.
    """
    if cache_position is not None:
        q_length = cache_position.shape[0]
        q_offset = 0 if q_length == kv_length else cache_position[0]
        others["cache_position"] = cache_position
    else:
        others |= {"q_length": q_length, "q_offset": q_offset}
    assert q_length is not None
    device = others.get("device", cache_position.device if cache_position is not None else None)
    listed = mask_function is causal_mask_function and not kv_offset and not _by_transformers(device)
    padding = attention_mask is not None
    if listed and attention_mask is not None:
        attention_mask = _as_long(attention_mask, kv_length)
        if q_length > 1:
            padding, ragged = _facts(attention_mask, q_offset, q_length)
            listed = not ragged
    if listed and not padding and isinstance(q_offset, int) and q_offset + q_length == kv_length:
        return None
    if listed:
        return _listed(attention_mask, batch_size, kv_length, q_offset, q_length, device)
    others |= {"kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask}
    # None could express neither a cache longer than its content, nor attention that is not causal.
    others |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(batch_size=batch_size, kv_length=kv_length, **others)


def _by_transformers(device: torch.device | None) -> bool:
    return torch.is_grad_enabled() or torch.is_autocast_enabled("cpu" if device is None else torch.device(device).type)


def _as_long(mask: Tensor, num_keys: int) -> Tensor:
    """The mask extended to [B, L]; slots that it does not cover are padding."""
    missing = num_keys - mask.shape[-1]
    return torch.nn.functional.pad(mask, (0, missing)) if missing > 0 else mask[:, :num_keys]


def _facts(mask: Tensor, q_offset: int | Tensor, q_length: int) -> tuple[bool, bool]:
    """Whether there is padding, and whether any follows a new token that is not padding: read from the device.

    Both are assumed true in torch.compile's graph, which cannot synchronize.
    """
    if is_compiling():
        return True, True
    slot = torch.arange(mask.shape[1], dtype=torch.int64, device=mask.device)
    new = (slot >= q_offset) & (slot < q_offset + q_length)
    trailing = (mask.cumsum(1) > 0) & ~mask & new
    padding, ragged = torch.stack(((~mask).any(), trailing.any())).tolist()
    return padding, ragged


def _listed(
    mask: Tensor | None,
    batch: int,
    num_keys: int,
    q_offset: int | Tensor,
    q_length: int,
    device: torch.device | None,
) -> Tensor:
    slot = torch.arange(num_keys, dtype=torch.int64, device=device)
    kept = (slot < q_offset + q_length).expand(batch, num_keys)
    if mask is not None:
        kept = kept & mask
    counts = kept.cumsum(1)
    width = width_of(num_keys)
    table = torch.zeros(batch, width + 2, dtype=torch.int32, device=device)
    # A slot's index is the number of kept slots up to it; others go to an extra last column, which is cut off.
    places = torch.where(kept, counts, width + 1)
    table.scatter_(1, places, slot.to(torch.int32).expand(batch, num_keys))
    table[:, 0] = counts[:, -1]
    table = table[:, None, None, : width + 1]
    if not is_compiling():
        table._fastllama_keys = num_keys  # type: ignore[attr-defined]
    return table
