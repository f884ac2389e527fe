"""mini-sglang's and SGLang's calls of FlashInfer, written anew, give explicit attention on our ops."""

from __future__ import annotations

import math
from itertools import accumulate
from random import Random
from typing import Any

import torch
from torch import Tensor

from fastllama.integrations import flashinfer
from tests.integrations.flashinfer.batches import attend

FLOAT, DIM, HEADS, KV_HEADS, LONGEST = torch.float32, 8, 4, 2, 24


class Layer:
    """An attention layer and its cache: rotation, tokens written at slots of their own, pages of one token."""

    def __init__(self, slots: int, max_batch: int) -> None:
        self.cache = torch.zeros(2, slots, KV_HEADS, DIM, dtype=FLOAT)
        angles = torch.arange(LONGEST, dtype=FLOAT)[:, None] * 10000 ** (-torch.arange(DIM // 2, dtype=FLOAT) * 2 / DIM)
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), 1)
        self.free = list(range(slots))
        Random(0).shuffle(self.free)
        self.table = torch.zeros(max_batch, LONGEST, dtype=torch.int32)
        self.tokens: list[Tensor] = []  # q, k, v of each request so far, rotated explicitly
        workspace = torch.empty(1 << 16, dtype=torch.uint8)
        self.prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, kv_layout="NHD", backend="fa2")
        self.decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, use_tensor_cores=True, kv_layout="NHD", backend="fa2"
        )
        self.decode._int_workspace_buffer = self.prefill._int_workspace_buffer
        self.lengths = torch.zeros(max_batch, dtype=torch.int32)
        self.bounds = torch.zeros(max_batch + 1, dtype=torch.int32)
        self.indices = torch.zeros(max_batch * LONGEST, dtype=torch.int32)
        self.graphs: dict[int, Any] = {}
        for size in range(1, max_batch + 1):  # all over the same buffers
            graph = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
                workspace, kv_layout="NHD", use_tensor_cores=True, indptr_buffer=self.bounds[: size + 1],
                indices_buffer=self.indices, last_page_len_buffer=self.lengths[:size],
            )  # fmt: skip
            graph._backend = "fa2"
            graph._int_workspace_buffer = self.prefill._int_workspace_buffer
            self.graphs[size] = graph

    def step(self, new: list[int], before: list[int], graph: bool) -> tuple[Tensor, list[Tensor]]:
        """Appends new tokens to each request: the layer's result, and the explicit one."""
        rows, after = sum(new), [a + b for a, b in zip(new, before, strict=True)]
        qkv = torch.randn(rows, (HEADS + 2 * KV_HEADS) * DIM, dtype=FLOAT)
        plain = qkv.clone()
        q, k, v = qkv.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], 1)
        positions = torch.cat([torch.arange(a, b) for a, b in zip(before, after, strict=True)])
        flashinfer.apply_rope_with_cos_sin_cache_inplace(positions, q, k, DIM, self.cos_sin, is_neox=True)
        slots = torch.tensor([self.free.pop() for _ in range(rows)])
        for b, own in enumerate(slots.split(new)):
            self.table[b, before[b] : after[b]] = own
        self.cache[0, slots], self.cache[1, slots] = k.view(-1, KV_HEADS, DIM), v.view(-1, KV_HEADS, DIM)
        pair = tuple(x.view(-1, 1, KV_HEADS, DIM) for x in self.cache)
        found = self._planned(new, after, graph).run(q=q.view(-1, HEADS, DIM), paged_kv_cache=pair)
        return found, self._explicit(plain, positions, new)

    def _planned(self, new: list[int], after: list[int], graph: bool) -> Any:
        """Bounds and lengths on the host, indices on the device."""
        ones, lengths = torch.ones(len(after), dtype=torch.int32), torch.tensor(after, dtype=torch.int32)
        keys = torch.tensor([0, *accumulate(after)], dtype=torch.int32)
        indices = torch.cat([self.table[b, :length] for b, length in enumerate(after)])
        if max(new) == 1:
            wrapper = self.graphs[len(new)] if graph else self.decode
            wrapper.plan(
                indptr=keys, indices=indices, last_page_len=ones, num_qo_heads=HEADS, num_kv_heads=KV_HEADS,
                head_dim=DIM, page_size=1, pos_encoding_mode="NONE", seq_lens=lengths, data_type=FLOAT,
                q_data_type=FLOAT, kv_data_type=FLOAT, non_blocking=True,
            )  # fmt: skip
            return wrapper
        self.prefill.plan(
            qo_indptr=torch.tensor([0, *accumulate(new)], dtype=torch.int32), paged_kv_indptr=keys,
            paged_kv_indices=indices, paged_kv_last_page_len=ones, num_qo_heads=HEADS, num_kv_heads=KV_HEADS,
            head_dim_qk=DIM, page_size=1, pos_encoding_mode="NONE", seq_lens=lengths, q_data_type=FLOAT,
            kv_data_type=FLOAT, non_blocking=True, causal=True,
        )  # fmt: skip
        return self.prefill

    def _explicit(self, qkv: Tensor, positions: Tensor, new: list[int]) -> list[Tensor]:
        x = qkv.double().view(qkv.shape[0], -1, DIM)
        cos, sin = self.cos_sin.double()[positions].chunk(2, 1)
        first, second = x[:, : HEADS + KV_HEADS].chunk(2, 2)
        turned = (first * cos[:, None] - second * sin[:, None], second * cos[:, None] + first * sin[:, None])
        x = torch.cat((torch.cat(turned, 2), x[:, HEADS + KV_HEADS :]), 1)
        results = []
        for b, own in enumerate(x.split(new)):
            if b == len(self.tokens):
                self.tokens.append(own)
            else:
                self.tokens[b] = torch.cat((self.tokens[b], own))
            q, k, v = self.tokens[b].split([HEADS, KV_HEADS, KV_HEADS], 1)
            results.append(attend(q[-own.shape[0] :], k, v, DIM**-0.5, True)[0])
        return results


def test_mini_sglang_prefills_extends_and_decodes() -> None:
    """Single-token pages, plans on the host, one int workspace, graph wrappers of each batch size over one buffer."""
    layer, lengths = Layer(64, max_batch=3), [0, 0, 0]
    steps = [([5, 3, 9], False), ([4, 1, 2], False)] + [([1, 1, 1], graph) for graph in (False, True, True, False)]
    for new, graph in steps:
        found, expected = layer.step(new, lengths, graph)
        torch.testing.assert_close(found.double(), torch.cat(expected), rtol=0, atol=2e-6)
        lengths = [a + b for a, b in zip(lengths, new, strict=True)]
    for size in (2, 1):  # requests end
        found, expected = layer.step([1] * size, lengths[:size], True)
        torch.testing.assert_close(found.double(), torch.cat(expected), rtol=0, atol=2e-6)
        lengths[:size] = [length + 1 for length in lengths[:size]]


def test_sglang_merges_new_tokens_with_the_cached_prefix() -> None:
    """Ragged and causal over the new tokens, paged and not causal over the cached ones.

    A prompt with nothing cached has no page; kv_last_page_len is 1 for it, too.
    """
    workspace = torch.empty(1 << 16, dtype=torch.uint8)
    ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend="auto")
    paged = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
    cached, new = [6, 0, 11], [3, 4, 1]
    pool = torch.randn(2, 30, KV_HEADS, DIM, dtype=FLOAT)
    slots = torch.randperm(30, dtype=torch.int32)[: sum(cached)]
    q, k, v = (torch.randn(sum(new), heads, DIM, dtype=FLOAT) for heads in (HEADS, KV_HEADS, KV_HEADS))
    own, prefix = (torch.tensor([0, *accumulate(x)], dtype=torch.int32) for x in (new, cached))
    ragged.begin_forward(own, own, HEADS, KV_HEADS, DIM, q_data_type=FLOAT)
    ones = torch.ones(3, dtype=torch.int32)
    paged.begin_forward(own, prefix, slots, ones, HEADS, KV_HEADS, DIM, 1, q_data_type=FLOAT, kv_data_type=FLOAT,
                        non_blocking=True, custom_mask=None, fixed_split_size=None)  # fmt: skip
    options: dict[str, Any] = {"sm_scale": 0.3, "window_left": -1, "logits_soft_cap": 0.0}
    seen = ragged.forward_return_lse(q, k, v, causal=True, **options)
    before = paged.forward_return_lse(q, (pool[0], pool[1]), causal=False, **options)
    out, lse = flashinfer.merge_state(*seen, *before)
    for b, rows in enumerate(zip(q.split(new), k.split(new), v.split(new), slots.long().split(cached), strict=True)):
        keys, values = (torch.cat((pool[i][rows[3]], rows[1 + i])) for i in range(2))
        expected = attend(rows[0], keys, values, 0.3, True)
        part = slice(own[b], own[b + 1])
        torch.testing.assert_close(out[part].double(), expected[0], rtol=0, atol=2e-6)
        torch.testing.assert_close(lse[part].double(), expected[1], rtol=0, atol=2e-6)
    assert not math.isnan(float(lse.sum()))
