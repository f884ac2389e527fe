"""On a GPU a patched model's decode steps reuse compiled kernels: no token compiles one of its own."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import fastllama
from fastllama.kernels.dispatch.op import OPS
from fastllama.testing.recorder import Launch, record
from tests.integrations.models import CACHE, llama, pair
from tests.integrations.quantized import quantized
from tests.kernels.triton.launches import on

pytestmark = pytest.mark.compile

SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}
STEPS = 64
FIRST = 256 - STEPS // 2  # so that on the way the cache doubles and lists of keys get wider


def launches_of(run: Callable[[], object]) -> list[Launch]:
    """The kernels that are compiled while something runs; nothing is computed."""
    with ExitStack() as stack:
        target = stack.enter_context(on("sm_90"))
        for op in OPS.values():
            if op.has_triton:
                stack.enter_context(op.bound_to(torch.device("cpu"), op.launcher("cuda")))
        launches = stack.enter_context(record(target))
        run()
    return launches


def kernels_of(model: Any, steps: int, **kwargs: Any) -> dict[str, set[str]]:
    """The specializations that each kernel is compiled for while `generate` takes so many tokens."""
    ids = torch.randint(3, 97, (2, FIRST))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    kwargs |= {"attention_mask": mask, "max_new_tokens": steps, "do_sample": False, "eos_token_id": None}
    found = defaultdict(set)
    for launch in launches_of(lambda: model.generate(ids, **kwargs)):
        found[launch.kernel].add(str(launch))
    return found


def given(model: Any, cache: str) -> dict[str, Any]:
    if cache == "ours":
        return {}
    if cache == "static":
        return {CACHE: StaticCache(config=model.config, max_cache_len=FIRST + STEPS)}  # another length, another stride
    filled = DynamicCache(config=model.config)  # an empty one would become ours
    like = torch.zeros(2, 2, 1, 64, dtype=torch.bfloat16)
    for index in range(model.config.num_hidden_layers):
        filled.update(like, like, index)
    return {CACHE: filled}


@pytest.mark.parametrize("cache", ["ours", "static", "of transformers"])
def test_what_three_tokens_compile_is_enough_for_all(cache: str) -> None:
    _, patched = pair(torch.bfloat16, **SIZES)
    short, long = (kernels_of(patched, steps, **given(patched, cache)) for steps in (3, STEPS))
    assert long == short
    own = {name: len(keys) for name, keys in long.items() if name.startswith(("attention", "rope"))}
    assert any(name.startswith("attention_decode") for name in own)
    assert {name: count for name, count in own.items() if count > 2} == {}


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_a_token_takes_four_matmuls_a_layer_of_a_quantized_model(kind: str) -> None:
    model = quantized(llama(torch.bfloat16, **SIZES), kind)
    fastllama.patch(model, strict=True)
    with torch.inference_mode():
        found = Counter(launch.kernel for launch in launches_of(lambda: model(torch.ones(1, 1, dtype=torch.long))))
    layers = model.config.num_hidden_layers
    (matmuls,) = (count for name, count in found.items() if name.startswith("matmul"))
    assert matmuls == 4 * layers
    assert found.total() == (4 + 2) * layers + 1  # with rotation, attention, and the last norm
