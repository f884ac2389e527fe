"""LlamaDecoderLayer as six ops, named like the stock class it replaces."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.llama import modeling_llama

from fastllama import kernels
from fastllama.integrations.transformers.attention import (
    as_pages,
    attend,
    attend_by_sdpa,
    attention,
    causal,
    is_settled,
    pages_of,
)
from fastllama.integrations.transformers.cache import own_layer
from fastllama.integrations.transformers.fused import Matmul, in_graph
from fastllama.integrations.transformers.masks import is_key_list, key_list
from fastllama.integrations.transformers.reading import Reading, linears_of
from fastllama.integrations.transformers.shared import Shared
from fastllama.integrations.transformers.trouble import NAME, NORMS, is_stock, trouble

AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, key_list)

_STOCK = modeling_llama.LlamaDecoderLayer
_POSITIONAL = [*inspect.signature(_STOCK.forward).parameters][2:]  # after hidden_states
# transformers 4.57 passes the cache a position to write to; version 5 asks the cache.
_CACHE_KWARGS = "cache_kwargs" in inspect.signature(Cache.update).parameters


class LlamaDecoderLayer(_STOCK):
    """A decoder layer on our ops; on transformers' own code where `_runs` returns False."""

    _fastllama: Reading

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states [B, S, H] -> [B, S, H]; other arguments by position or name, as in the stock layer."""
        if type(self) is not LlamaDecoderLayer or not self._runs(hidden_states, kwargs):
            return _STOCK.forward(self, hidden_states, *args, **kwargs)
        if kwargs.get("output_attentions"):
            raise ValueError(
                "output_attentions is True, but a patched model has no attention weights to return: "
                "fastllama.unpatch(model), then model.set_attn_implementation('eager')"
            )
        given = kwargs | dict(zip(_POSITIONAL, args, strict=False)) if args else kwargs
        modules: dict[str, Any] = self._modules
        attention, first_norm, second_norm = (modules[name] for name in ("self_attn", *NORMS))
        batch, tokens, _ = hidden_states.shape
        shared = Shared.of(given["position_embeddings"], batch, tokens, attention.layer_idx == 0)
        if is_compiling():
            matmuls: Sequence[Matmul] = [partial(in_graph, linears) for linears in linears_of(self)]
            space = None
        else:
            matmuls = self._fastllama.matmuls
            space = shared.workspace(self._fastllama.room(batch * tokens))
        qkv, o_proj, gate_up, down_proj = matmuls
        x = hidden_states.contiguous()
        heads = qkv(x, space, first_norm._parameters["weight"], first_norm.variance_epsilon, None, False)
        heads = heads.view(batch * tokens, -1, attention.head_dim)
        out = self._attend(attention, heads, attention._modules["o_proj"].in_features, shared, given)
        x = o_proj(out.view(batch, tokens, -1), space, None, 0.0, x, False)
        up = gate_up(x, space, second_norm._parameters["weight"], second_norm.variance_epsilon, None, True)
        return down_proj(up, space, None, 0.0, x, False)

    def _attend(self, attention: Any, qkv: Tensor, features: int, shared: Shared, given: dict[str, Any]) -> Tensor:
        """Rotate, cache and attend: qkv [B * S, Hq + 2 Hkv, D], features: Hq * D -> [B * S, Hq, D]."""
        mask, batch, tokens = given.get("attention_mask"), shared.batch, shared.tokens
        head_dim, scale = attention.head_dim, attention.scaling
        heads = features // head_dim
        kv_heads = (qkv.shape[1] - heads) // 2
        cache = given.get("cache")
        if cache is None:
            cache = given.get("past_key_values")  # before transformers 5.24
        own = None if is_compiling() else own_layer(cache, attention.layer_idx, qkv.dtype)
        if own is not None:
            k, v = own.reserve(qkv, (batch, kv_heads, head_dim), tokens)
            k_pages, v_pages = pages_of(k), pages_of(v)
            table = shared.table(mask, own.get_seq_length() + tokens, k.shape[1])
            q = kernels.rope_and_write_kv(
                qkv.flatten(1), shared.angles, shared.positions, table.slots, k_pages, v_pages
            )
            own.written(tokens)
        else:
            q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
            q, k = kernels.rope(q, k, shared.angles, shared.positions)
            keys, values = (t.reshape(batch, tokens, kv_heads, head_dim).transpose(1, 2) for t in (k, v))
            if cache is not None:
                where = ({"cache_position": given.get("cache_position")},) if _CACHE_KWARGS else ()
                keys, values = cache.update(keys, values, attention.layer_idx, *where)
        if mask is not None and not is_key_list(mask):
            if own is not None:
                keys, values = own.keys, own.values
            return attend_by_sdpa(attention, q, keys, values, mask)
        if own is None:
            k_pages, v_pages, row = as_pages(keys, values, is_settled(cache, attention.layer_idx))
            table = shared.table(mask, keys.shape[2], row)
        return attend(q, k_pages, v_pages, table, scale, shared.attention_workspace(q, k_pages, table))

    def _runs(self, x: Tensor, given: dict[str, Any]) -> bool:
        """Whether this call can run on our ops; otherwise warns with the reason, where it may be unexpected.

        Raises RuntimeError where transformers' code cannot run either, as its attention does not accept our mask.
        """
        if self.training or type(x) is not Tensor or not causal(self._modules["self_attn"], given.get("is_causal")):
            return False
        reason = None
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            reason = "gradients are required: call the model under torch.inference_mode()"
        elif torch.is_autocast_enabled(x.device.type):
            reason = "autocast is on: load the model in its compute dtype"
        elif is_compiling() or not self._fastllama.holds(self):
            reason = self._changed()
        if reason is None and not is_compiling() and x.dtype != self._fastllama.dtype:
            return False  # transformers promotes, or raises
        if reason is not None and not is_compiling():
            warnings.warn(f"layers of a patched model run transformers' own code: {reason}", stacklevel=2)
        return reason is None

    def _changed(self) -> str | None:
        """Read the layer again; returns the reason where that is impossible."""
        reason = trouble(self)
        config = getattr(self.self_attn, "config", None)
        if config is not None and config._attn_implementation != NAME:
            reason = f"attention was set to {config._attn_implementation!r}"
        elif not is_stock(self.self_attn, "LlamaAttention"):
            raise RuntimeError(
                f"{reason}, which does not accept the masks of a patched model: fastllama.unpatch(model)"
            )
        if not is_compiling():
            if reason is None:
                self._fastllama.read(self)
            else:
                self._fastllama.forget()
        return reason

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Called to move or convert weights; releases the old fused ones at once, not at the next call."""
        self._fastllama.forget()
        return super()._apply(fn, recurse)
