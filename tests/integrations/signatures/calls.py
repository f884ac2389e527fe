"""A small legal call of each function and method of the drop-in adapters, whose arguments a test may replace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastllama.integrations import flash_attn, flashinfer
from tests.integrations.signatures.treatment import integers


@dataclass(frozen=True)
class Call:
    """Calls `run`; returns its result, or of an in-place function (`written`) copies of these after the call."""

    run: Callable[..., Any]
    arguments: Mapping[str, Any]
    written: tuple[str, ...] = ()

    def __call__(self, **others: Any) -> Any:
        given = {**self.arguments, **{name: self.arguments[name].clone() for name in self.written}, **others}
        found = self.run(**given)
        return tuple(given[name] for name in self.written) if self.written else found


def of(run: Callable[..., Any], *written: str, **arguments: Any) -> Call:
    return Call(run, arguments, written)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def flash_attn_calls() -> dict[str, Call]:
    q, k, v = numbers(2, 3, 4, 16), numbers(2, 5, 2, 16, seed=1), numbers(2, 5, 2, 16, seed=2)
    rows, keys, values = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    bounds, bounds_k = integers(0, 2, 6), integers(0, 4, 10)
    packed = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds_k, "max_seqlen_q": 4, "max_seqlen_k": 6}
    three = torch.stack((q, q + 1, q * 2), 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.int64)
    padding = flash_attn.bert_padding
    return {
        "flash_attn_func": of(flash_attn.flash_attn_func, q=q, k=k, v=v),
        "flash_attn_kvpacked_func": of(flash_attn.flash_attn_kvpacked_func, q=q, kv=torch.stack((k, v), 2)),
        "flash_attn_qkvpacked_func": of(flash_attn.flash_attn_qkvpacked_func, qkv=three),
        "flash_attn_varlen_func": of(flash_attn.flash_attn_varlen_func, q=rows, k=keys, v=values, **packed),
        "flash_attn_varlen_kvpacked_func": of(
            flash_attn.flash_attn_varlen_kvpacked_func, q=rows, kv=torch.stack((keys, values), 1), **packed
        ),
        "flash_attn_varlen_qkvpacked_func": of(
            flash_attn.flash_attn_varlen_qkvpacked_func, qkv=three.flatten(0, 1), cu_seqlens=bounds, max_seqlen=4
        ),
        "flash_attn_with_kvcache": of(
            flash_attn.flash_attn_with_kvcache, q=q, k_cache=k, v_cache=v, cache_seqlens=integers(3, 5)
        ),
        "unpad_input": of(padding.unpad_input, hidden_states=q, attention_mask=mask),
        "pad_input": of(padding.pad_input, hidden_states=rows[:3], indices=torch.tensor([0, 1, 3]), batch=2, seqlen=3),
    }


def row_calls() -> dict[str, Call]:
    """FlashInfer's norms, activation and rotations."""
    x, weight = numbers(3, 8), numbers(8, seed=1)
    q, k = numbers(3, 2, 16), numbers(3, 1, 16, seed=1)
    cached = {"positions": integers(5, 6, 0), "query": q.flatten(1), "key": k.flatten(1), "head_size": 16}
    cached["cos_sin_cache"] = numbers(8, 16, seed=2)
    norm, rope = flashinfer.norm, flashinfer.rope
    found = {
        "rmsnorm": of(norm.rmsnorm, input=x, weight=weight),
        "fused_add_rmsnorm": of(norm.fused_add_rmsnorm, "input", "residual", input=x, residual=x, weight=weight),
        "silu_and_mul": of(flashinfer.activation.silu_and_mul, input=x),
        "apply_rope_with_cos_sin_cache": of(rope.apply_rope_with_cos_sin_cache, **cached),
        "apply_rope_with_cos_sin_cache_inplace": of(
            rope.apply_rope_with_cos_sin_cache_inplace, "query", "key", **cached
        ),
    }
    places = {
        "rope": {"indptr": integers(0, 2, 3), "offsets": integers(5, 0)},
        "rope_pos_ids": {"pos_ids": integers(5, 6, 0)},
    }
    for kind, where in places.items():
        for name in (f"apply_{kind}", f"apply_llama31_{kind}"):
            found[name] = of(getattr(rope, name), q=q, k=k, **where)
            found[f"{name}_inplace"] = of(getattr(rope, f"{name}_inplace"), "q", "k", q=q, k=k, **where)
    return found


def sampling_calls() -> dict[str, Call]:
    logits = numbers(3, 12)
    probs, drawn, filters = logits.softmax(-1), {"seed": 1, "offset": 0}, {"top_k": 3, "top_p": 0.8}
    sampling = flashinfer.sampling
    return {
        "softmax": of(sampling.softmax, logits=logits),
        "sampling_from_logits": of(sampling.sampling_from_logits, logits=logits, **drawn),
        "sampling_from_probs": of(sampling.sampling_from_probs, probs=probs, **drawn),
        "top_p_sampling_from_probs": of(sampling.top_p_sampling_from_probs, probs=probs, top_p=0.8, **drawn),
        "top_k_sampling_from_probs": of(sampling.top_k_sampling_from_probs, probs=probs, top_k=3, **drawn),
        "min_p_sampling_from_probs": of(sampling.min_p_sampling_from_probs, probs=probs, min_p=0.1, **drawn),
        "top_k_top_p_sampling_from_logits": of(
            sampling.top_k_top_p_sampling_from_logits, logits=logits, **filters, **drawn
        ),
        "top_k_top_p_sampling_from_probs": of(
            sampling.top_k_top_p_sampling_from_probs, probs=probs, **filters, **drawn
        ),
        "top_p_renorm_probs": of(sampling.top_p_renorm_probs, probs=probs, top_p=0.8),
        "top_k_renorm_probs": of(sampling.top_k_renorm_probs, probs=probs, top_k=3),
        "top_k_mask_logits": of(sampling.top_k_mask_logits, logits=logits, top_k=3),
    }


# Two sequences of 3 and 2 tokens in pages of 2.
CACHE = numbers(6, 2, 2, 2, 16, seed=1)
INDPTR, INDICES, LAST = integers(0, 2, 3), integers(4, 1, 0), integers(1, 2)


def page_calls() -> dict[str, Call]:
    page, cascade = flashinfer.page, flashinfer.cascade
    v, s = numbers(3, 2, 4, 16), numbers(3, 2, 4, seed=1)
    pair = {"v_a": v[:, 0].contiguous(), "s_a": s[:, 0].contiguous()}
    pair |= {"v_b": v[:, 1].contiguous(), "s_b": s[:, 1].contiguous()}
    pages = {"kv_indices": INDICES, "kv_indptr": INDPTR, "kv_last_page_len": LAST}
    return {
        "get_seq_lens": of(page.get_seq_lens, kv_indptr=INDPTR, kv_last_page_len=LAST, page_size=2),
        "get_batch_indices_positions": of(
            page.get_batch_indices_positions, append_indptr=integers(0, 1, 3), seq_lens=integers(3, 2), nnz=3
        ),
        "append_paged_kv_cache": of(
            page.append_paged_kv_cache,
            "paged_kv_cache",
            append_key=numbers(3, 2, 16),
            append_value=numbers(3, 2, 16, seed=2),
            batch_indices=integers(0, 1, 1),
            positions=integers(2, 0, 1),
            paged_kv_cache=CACHE,
            **pages,
        ),
        "merge_state": of(cascade.merge_state, **pair),
        "merge_state_in_place": of(
            cascade.merge_state_in_place,
            "v",
            "s",
            v=pair["v_a"],
            s=pair["s_a"],
            v_other=pair["v_b"],
            s_other=pair["s_b"],
        ),
        "merge_states": of(cascade.merge_states, v=v, s=s),
    }


def stages(wrapper: type, plan: dict[str, Any], run: dict[str, Any]) -> dict[str, Call]:
    """Calls of a wrapper that is made, planned and run, with other arguments at one of these stages."""
    workspace = torch.zeros(1 << 16, dtype=torch.uint8)
    start = {"float_workspace_buffer": workspace}

    def made(**given: Any) -> Any:
        one = wrapper(**given)
        one.plan(**plan)
        return one.run(**run)

    def planned(**given: Any) -> Any:
        one = wrapper(workspace)
        one.plan(**given)
        return one.run(**run)

    def method(name: str, **arguments: Any) -> Call:
        def call(args: tuple[Any, ...] = (), **given: Any) -> Any:
            one = wrapper(workspace)
            one.plan(**plan)
            tensors = [given.pop(each) for each in run if args]  # before further positional arguments
            return getattr(one, name)(*tensors, *args, **given)

        return Call(call, arguments)

    found = {
        "__init__": Call(made, start),
        "plan": Call(planned, plan),
        **{name: method(name, **run) for name in ("run", "forward", "forward_return_lse")},
        "workspace_size": method("workspace_size", **plan),
        "reset_workspace_buffer": method("reset_workspace_buffer", **start, int_workspace_buffer=workspace),
        "prewarm_paged_kv_stride_variant": method("prewarm_paged_kv_stride_variant"),
        "end_forward": method("end_forward"),
    }
    return {f"{wrapper.__name__}.{name}": call for name, call in found.items()}


def attention_calls() -> dict[str, Call]:
    decode, prefill = flashinfer.decode, flashinfer.prefill
    rows, keys, values = numbers(3, 4, 16), numbers(5, 2, 16, seed=1), numbers(5, 2, 16, seed=2)
    heads = {"num_qo_heads": 4, "num_kv_heads": 2}
    pages = {"indptr": INDPTR, "indices": INDICES, "last_page_len": LAST, "head_dim": 16, "page_size": 2, **heads}
    paged = {f"paged_kv_{name}": pages[name] for name in ("indptr", "indices", "last_page_len")}
    paged |= {"qo_indptr": INDPTR, "head_dim_qk": 16, "page_size": 2, **heads}
    ragged = {"qo_indptr": INDPTR, "kv_indptr": integers(0, 3, 5), "head_dim_qk": 16, **heads}
    dtype = {"q_data_type": "float32"}
    run = {"q": rows, "paged_kv_cache": CACHE}
    wrapper = decode.BatchDecodeWithPagedKVCacheWrapper
    workspace = torch.zeros(1 << 16, dtype=torch.uint8)

    def with_graph(**given: Any) -> Any:
        one = decode.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(**given)
        one.plan(**pages, **dtype)
        return one.run(rows[:2], CACHE)

    def fast(**given: Any) -> Any:
        decode.fast_decode_plan(**given)
        return given["self"].run(rows[:2], CACHE)

    planned = wrapper(workspace)
    planned.plan(**pages, **dtype)
    return {
        "single_decode_with_kv_cache": of(decode.single_decode_with_kv_cache, q=rows[0], k=keys, v=values),
        "single_prefill_with_kv_cache": of(prefill.single_prefill_with_kv_cache, q=rows, k=keys, v=values),
        **stages(wrapper, pages | dtype, run | {"q": rows[:2]}),
        **stages(prefill.BatchPrefillWithPagedKVCacheWrapper, paged | dtype, run),
        **stages(prefill.BatchPrefillWithRaggedKVCacheWrapper, ragged | dtype, {"q": rows, "k": keys, "v": values}),
        "CUDAGraphBatchDecodeWithPagedKVCacheWrapper.__init__": of(
            with_graph,
            workspace_buffer=workspace,
            indptr_buffer=integers(0, 0, 0),
            indices_buffer=integers(0, 0, 0, 0),
            last_page_len_buffer=integers(0, 0),
        ),
        "fast_decode_plan": of(fast, self=planned, **pages, **dtype),
    }


CALLS = flash_attn_calls() | row_calls() | sampling_calls() | page_calls() | attention_calls()
