"""An argument that is no tensor is refused by its name, in every function of FlashInfer's that takes one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastllama.integrations import flashinfer
from tests.integrations.signatures.calls import CALLS, Call

NOT_READ = {
    "append_paged_kv_cache-kv_last_page_len",
    "BatchDecodeWithPagedKVCacheWrapper.workspace_size-last_page_len",
}
NOT_THERE = "BatchPrefillWithRaggedKVCacheWrapper.workspace_size"


def tensors() -> list[Any]:
    """Each function or method of FlashInfer's with each tensor that its call in calls.py has."""
    found = {
        f"{name}-{argument}": (call, argument)
        for name, call in CALLS.items()
        for argument, value in call.arguments.items()
        if isinstance(value, torch.Tensor) and hasattr(flashinfer, name.split(".")[0]) and name != NOT_THERE
    }
    return [pytest.param(*each, id=name) for name, each in found.items() if name not in NOT_READ]


@pytest.mark.parametrize("value", [None, [1.0], 3], ids=["None", "list", "number"])
@pytest.mark.parametrize(("call", "argument"), tensors())
def test_what_is_no_tensor_is_refused_by_its_name(call: Call, argument: str, value: Any) -> None:
    """Arguments of the wrapper that is always in graph mode are named as its base class names them."""
    with pytest.raises((TypeError, ValueError), match=rf"^(float_|paged_kv_)?{argument} is .*; legal"):
        call.run(**{**call.arguments, argument: value})


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("rmsnorm", "out"),
        ("silu_and_mul", "out"),
        ("merge_state_in_place", "mask"),
        ("get_batch_indices_positions", "batch_indices"),
        ("get_batch_indices_positions", "positions"),
        ("sampling_from_probs", "indices"),
        *[
            (f"Batch{kind}KVCacheWrapper.run", argument)
            for kind in ("DecodeWithPaged", "PrefillWithPaged", "PrefillWithRagged")
            for argument in ("out", "lse")
        ],
    ],
)
def test_so_is_what_may_be_left_out(name: str, argument: str) -> None:
    with pytest.raises(TypeError, match=rf"^{argument} is \[1.0\]; legal: a tensor"):
        CALLS[name].run(**{**CALLS[name].arguments, argument: [1.0]})


@pytest.mark.parametrize(
    ("name", "argument"), [("single_decode_with_kv_cache", "k"), ("single_prefill_with_kv_cache", "v")]
)
def test_keys_of_another_number_of_dimensions_are_refused_in_either_layout(name: str, argument: str) -> None:
    call = CALLS[name]
    for layout in ("NHD", "HND"):
        with pytest.raises(ValueError, match=rf"^{argument} has shape \[5\]; legal: \["):
            call.run(**{**call.arguments, argument: torch.zeros(5, dtype=torch.float32), "kv_layout": layout})
