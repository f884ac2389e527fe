"""An LLM that is made and run under a setting of torch answers as without it, to the last bit of its log-probabilities.

Loading, quantization, a batch of prompts of one and of many tokens, samples and greedy answers, penalties, speculation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import fastllama
from fastllama import LLM, SamplingParams
from tests.rounds import exhaustive
from tests.torch_settings import SETTINGS, Setting, default_settings

torch.set_num_threads(1)

TINY = Path(fastllama.__file__).parent / "assets" / "tiny"
LONG = 'Tom and Mia went to the lake. "Look," said Tom, "a boat! A red boat, and a dog is in it. ' * 2
PROMPTS = ["Once upon a time", LONG, LONG + "The old"]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=6, logprobs=3, prompt_logprobs=1),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, max_tokens=6, seed=1, logprobs=2, n=2),
    SamplingParams(max_tokens=6, seed=2, logprobs=0, repetition_penalty=1.2, presence_penalty=0.5, logit_bias={5: 2.0}),
]
MODELS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32", "quantization": None},
    "bf16": {"dtype": "bfloat16", "quantization": None},
    "bf12": {"dtype": "bfloat16", "quantization": "bf12"},
    "int4, fp16": {"dtype": "float16", "quantization": "int4"},
    "int8": {"dtype": "float32", "quantization": "int8"},
    "w8a8": {"dtype": "float32", "quantization": "w8a8"},
    "int8 cache": {"dtype": "float32", "quantization": None, "kv_cache_dtype": "int8"},
    "speculation": {"dtype": "float32", "quantization": None, "speculation": "prompt_lookup"},
    "deterministic": {"dtype": "float32", "quantization": None, "deterministic": True},
}
TOGETHER = ("default dtype bf16", "default device meta", "autocast bf16", "matmul precision medium")
SIZES: dict[str, Any] = {
    "device": "cpu",
    "kv_cache_tokens": 1024,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
    "progress": False,
}


@contextmanager
def together() -> Iterator[None]:
    with ExitStack() as stack:
        for name in TOGETHER:
            stack.enter_context(SETTINGS[name]())
        yield


# One that does what several do, and in the full round each alone.
CASES: Mapping[str, Setting] = {"together": together, **SETTINGS}

pytestmark = pytest.mark.skipif(
    not (TINY / "model.safetensors").is_file(), reason="the bundled model's weights are not here"
)


def answers(options: dict[str, Any], outside: Callable[[], Any] = nullcontext) -> Any:
    """Tokens, texts and log-probabilities of a model made and run within a setting."""
    with outside(), LLM("tiny", **SIZES, **options) as llm:
        outputs = llm.generate(PROMPTS, PARAMS)
    return [
        (out.prompt_logprobs, *((each.token_ids, each.text, each.logprobs) for each in out.outputs)) for out in outputs
    ]


@pytest.fixture(scope="module")
def plain() -> dict[tuple[str, str], Any]:
    """Answers without a setting, by backend and model."""
    return {}


@pytest.mark.parametrize("setting", ["together", *map(exhaustive, SETTINGS)])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_setting_changes_an_answer(
    backend: str, model: str, setting: str, plain: dict[tuple[str, str], Any], force: Callable[[str], None]
) -> None:
    force(backend)
    expected = plain.get((backend, model)) or plain.setdefault((backend, model), answers(MODELS[model]))
    before = default_settings()
    assert answers(MODELS[model], CASES[setting]) == expected
    assert default_settings() == before


def test_a_model_that_was_made_outside_may_run_inside() -> None:
    with LLM("tiny", **SIZES, dtype="float32") as llm:

        def run() -> list[Any]:
            return [output.outputs for output in llm.generate(PROMPTS, PARAMS)]

        run()  # later ones find the prompts in the cache, and compute fewer rows at once
        expected = run()
        for name, setting in CASES.items():
            with setting():
                found = run()
            assert found == expected, name
