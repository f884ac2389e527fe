"""After an LLM is made, no request compiles a kernel or captures a graph: either stalls all running requests."""

from __future__ import annotations

import importlib
import pkgutil
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

from fastllama import LLM, LlamaConfig, SamplingParams
from fastllama.bench.models import random_model
from fastllama.kernels import triton as room

pytestmark = pytest.mark.gpu

LENGTHS = (1, 2, 16, 17, 33, 64, 65, 100, 300, 480)
CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
    eos_token_ids=(),
)


@pytest.fixture
def late(force: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records every kernel compiled and every graph captured from now on, as in a fresh process."""
    force("auto")
    for found in pkgutil.iter_modules(room.__path__, f"{room.__name__}."):
        for kernel in vars(importlib.import_module(found.name)).values():
            if isinstance(kernel, JITFunction):
                monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    noted: list[str] = []
    compile_kernel, begin = JITFunction._do_compile, torch.cuda.CUDAGraph.capture_begin

    def compiling(self: Any, *args: Any) -> Any:
        noted.append(f"{self.fn.__name__} {args[0]}")
        return compile_kernel(self, *args)

    def capturing(self: Any, *args: Any, **options: Any) -> None:
        noted.append("a graph")
        begin(self, *args, **options)

    monkeypatch.setattr(JITFunction, "_do_compile", compiling)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", capturing)
    return noted


def params(drawn: random.Random, number: int, max_tokens: int) -> SamplingParams:
    """Greedy and sampled, some with penalties, some with log-probabilities."""
    return SamplingParams(
        temperature=drawn.choice((0.0, 0.8)),
        seed=number,
        max_tokens=drawn.randint(1, max_tokens),
        repetition_penalty=drawn.choice((1.0, 1.0, 1.1)),
        logprobs=drawn.choice((None, None, 2)),
        prompt_logprobs=drawn.choice((None, None, None, 1)),
        n=drawn.choice((1, 1, 3)),
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("none", {}),
        ("none", {"kv_cache_dtype": "int8"}),
        ("none", {"deterministic": True}),
        ("none", {"speculation": "prompt_lookup"}),
        ("int4", {}),
        ("int8", {}),
        ("w8a8", {}),
    ],
    ids=str,
)
def test_no_request_compiles_or_captures(kind: str, options: dict[str, Any], late: list[str]) -> None:
    """Prompts of any length, alone and in batches of any size, up to the most that run at once."""
    drawn = random.Random(0)
    sizes = {"kv_cache_tokens": 65536, "max_model_len": 512, "max_num_seqs": 140, "max_num_batched_tokens": 700}
    model = random_model(CONFIG, kind, torch.bfloat16, torch.device("cuda", 0))
    with LLM(model, progress=False, **sizes, **options) as llm:
        assert late, "the fixture saw nothing of the warm-up"
        late.clear()
        for batch in (1, 1, 1, 2, 3, 5, 17, 40, 70, 140, 140):
            together = batch > 64  # short prompts, which soon all decode in one step
            lengths = [drawn.choice((1, 2, 3) if together else LENGTHS) for _ in range(batch)]
            prompts = [[drawn.randrange(512) for _ in range(length)] for length in lengths]
            llm.generate(prompts, [params(drawn, number, 30 if together else 5) for number in range(batch)])
            assert late == [], f"{batch} prompts of {lengths} tokens"
            llm.score([prompt for prompt in prompts if len(prompt) > 1], top_logprobs=drawn.choice((0, 2)))
            assert late == [], f"{batch} scores of {lengths} tokens"
