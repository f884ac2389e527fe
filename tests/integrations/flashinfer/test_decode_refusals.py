"""FlashInfer's decode wrapper refuses illegal plans and runs, and they change nothing."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

from fastllama.integrations.flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper, fast_decode_plan
from tests.integrations.flashinfer.batches import Batch, bounds, check, workspace
from tests.integrations.flashinfer.test_decode import csr, wrapper

GIVEN = ("indptr", "indices", "last_page_len")
LEGAL: dict[str, Any] = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 8, "page_size": 4, "q_data_type": "float64"}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"indptr": bounds([2, 1, 1])}, ValueError, r"last_page_len has shape \[2\]; legal: \[3\]"),
        ({"indptr": bounds([2, 9])}, ValueError, r"indptr is \[0, 2, 11\], ending at 11; legal: .* to at most 4"),
        ({"indptr": bounds([2, -1])}, ValueError, "ascending from 0"),
        ({"indptr": bounds([2, 2]).float()}, TypeError, "indptr has dtype"),
        ({"indices": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, "indices has shape"),
        ({"indices": torch.zeros(4)}, TypeError, "indices has dtype"),
        ({"last_page_len": bounds([9])}, ValueError, r"last_page_len\[0\] is 0; legal: 1 to the page size, 4"),
        ({"last_page_len": bounds([9]) + 1}, ValueError, r"last_page_len\[1\] is 10; legal: 1 to the page size, 4"),
        ({"page_size": 0}, ValueError, "page_size is 0"),
        ({"num_qo_heads": 5}, ValueError, "num_kv_heads is 2; legal: a divisor of num_qo_heads, 5"),
        ({"head_dim": 0}, ValueError, "head_dim is 0"),
        ({"q_len_per_req": 0}, ValueError, "q_len_per_req is 0"),
        ({"q_data_type": "halb"}, ValueError, "q_data_type is 'halb'"),
        ({"o_data_type": "float16"}, NotImplementedError, "o_data_type is torch.float16"),
        ({"pos_encoding_mode": "ALIBI"}, NotImplementedError, "pos_encoding_mode is 'ALIBI'"),
        ({"window_left": 4}, NotImplementedError, "window_left is 4"),
        ({"window_right": 1}, NotImplementedError, "window_right is 1"),
        ({"logits_soft_cap": 30.0}, NotImplementedError, "logits_soft_cap is 30.0"),
        *[
            ({name: value}, TypeError, f"{name} is {value}; legal: an integer of at least 1")
            for name in ("num_qo_heads", "num_kv_heads", "head_dim", "page_size", "q_len_per_req")
            for value in (True, 4.0, None)
        ],
        *[({name: [0, 2, 4]}, TypeError, f"{name} is .*; legal: a tensor") for name in GIVEN],
        *[
            ({name: torch.zeros(3, dtype=torch.int32, device="meta")}, ValueError, f"{name} is on meta")
            for name in GIVEN
        ],
        ({"q_data_type": "int8"}, TypeError, "q_data_type is torch.int8; legal: torch.bfloat16, "),
        ({"kv_data_type": torch.int16}, TypeError, "kv_data_type is torch.int16; legal: torch.float64, torch.int8"),
        ({"kv_data_type": "float32"}, TypeError, "kv_data_type is torch.float32; legal: torch.float64, "),
        ({"sm_scale": "x"}, TypeError, "sm_scale is 'x'; legal: a finite number"),
        ({"sm_scale": math.nan}, ValueError, "sm_scale is nan; legal: a finite number"),
        ({"sm_scale": torch.ones(1)}, NotImplementedError, "sm_scale is a tensor"),
        (
            {"global_override_indptr_cpu": [0, 2, 4]},
            TypeError,
            r"global_override_indptr_cpu is \[0, 2, 4\]; legal: a tensor",
        ),
        ({"global_override_indptr_cpu": bounds([2, 2]).float()}, TypeError, "global_override_indptr_cpu has dtype"),
    ],
)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_after_an_illegal_plan_the_one_before_stands(
    changed: Any, error: type[Exception], message: str, graph: bool
) -> None:
    batch = Batch([7, 5])
    buffers = [torch.zeros(size, dtype=torch.int32) for size in (3, 8, 2)] if graph else []
    q, decode = batch.queries([1, 1]), BatchDecodeWithPagedKVCacheWrapper(workspace(), "NHD", graph, False, *buffers)
    decode.plan(*csr(batch), **LEGAL)
    other = Batch([3, 9])  # of as many pages, which the illegal plan would have written
    given = dict(zip(GIVEN, csr(other), strict=True))
    plan = partial(fast_decode_plan, decode) if "global_override_indptr_cpu" in changed else decode.plan
    with pytest.raises(error, match=message):
        plan(**{**given, **LEGAL, **changed})
    check(decode.run_return_lse(q, batch.cache), batch.expected(q, [1, 1]))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": torch.zeros(3, 4, 8, dtype=torch.float64)}, ValueError, r"q has shape .*; legal: \[2 \* Q, 4, 8\]"),
        (
            {"q": torch.zeros(2, 4, 8)},
            TypeError,
            "q has dtype torch.float32; legal: torch.float64, the plan's q_data_type",
        ),
        ({"paged_kv_cache": torch.zeros(9, 2, 4, 2, 8)}, TypeError, "k has dtype torch.float32.*kv_data_type"),
        ({"paged_kv_cache": torch.zeros(9, 2, 2, 2, 8, dtype=torch.float64)}, ValueError, "k_pages has shape"),
        ({"args": True}, NotImplementedError, "args is"),
        ({"window_left": 3}, NotImplementedError, "window_left is 3"),
        ({"sinks": torch.zeros(4)}, NotImplementedError, "sinks is a tensor"),
        ({"kv_cache_sf": torch.zeros(4)}, NotImplementedError, "kv_cache_sf is a tensor"),
        ({"skip_softmax_threshold_scale_factor": 1.0}, NotImplementedError, "skip_softmax_threshold_scale_factor"),
        ({"q_scale": torch.ones(1)}, NotImplementedError, "q_scale is a tensor"),
        ({"k_scale": torch.ones(1)}, NotImplementedError, "k_scale is a tensor"),
        ({"q_len_per_req": 2}, ValueError, "q_len_per_req is 2; legal: 1"),
        ({"q": None}, TypeError, "q is None; legal: a tensor"),
        ({"paged_kv_cache": ("a", "b")}, TypeError, r"paged_kv_cache\[0\] is 'a'; legal: a tensor"),
        ({"paged_kv_cache": (1, 2, 3)}, TypeError, "paged_kv_cache is of type tuple"),
        ({"k_scale": "x"}, TypeError, "k_scale is 'x'; legal: a finite number"),
        ({"v_scale": math.inf}, ValueError, "v_scale is inf; legal: a finite number"),
        ({"out": [1]}, TypeError, r"out is \[1\]; legal: a tensor"),
        ({"out": torch.zeros(2, 4, 7, dtype=torch.float64)}, ValueError, "out has shape"),
        ({"lse": torch.zeros(2, 3, dtype=torch.float64)}, ValueError, "lse_out has shape"),
    ],
)
def test_an_illegal_run_writes_nothing(changed: Any, error: type[Exception], message: str) -> None:
    batch, decode = Batch([7, 5]), wrapper()
    decode.plan(*csr(batch), **LEGAL)
    out, lse = torch.full((2, 4, 8), 7.0, dtype=torch.float64), torch.full((2, 4), 7.0, dtype=torch.float64)
    given = {"q": batch.queries([1, 1]), "paged_kv_cache": batch.cache, "out": out, "lse": lse}
    given |= {name: value for name, value in changed.items() if name != "args"}
    q, cache = given.pop("q"), given.pop("paged_kv_cache")
    with pytest.raises(error, match=message):
        decode.run(q, cache, *(["one more"] if "args" in changed else []), **given)
    assert (out == 7).all()
    assert (lse == 7).all()


def test_a_run_needs_a_plan() -> None:
    batch = Batch([3])
    with pytest.raises(RuntimeError, match=r"^BatchDecodeWithPagedKVCacheWrapper.run was called before plan$"):
        wrapper().run(batch.queries([1]), batch.cache)


def test_a_wrapper_is_not_made_of_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="kv_layout is 'HDN'"):
        wrapper(kv_layout="HDN")
    with pytest.raises(NotImplementedError, match="jit_args"):
        wrapper(jit_args=["name"])
    with pytest.raises(TypeError, match="float_workspace_buffer is None"):
        BatchDecodeWithPagedKVCacheWrapper(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "message"), [({"page_size": 0}, "page_size is 0"), ({"num_kv_heads": 3}, "num_kv_heads is 3")]
)
def test_a_workspace_is_measured_of_legal_sizes(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapper().workspace_size(*csr(Batch([7, 5])), **{**LEGAL, **changed})
