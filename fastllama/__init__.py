"""Fast Llama inference with kernels written only in Triton, checked against a reference."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Resolved on first use: `import fastllama` touches no device and imports neither torch nor Triton.
_HOME = {
    "LLM": "fastllama.runtime.llm",
    "AsyncEngine": "fastllama.runtime.serving.async_engine",
    "SamplingParams": "fastllama.runtime.params",
    "RequestOutput": "fastllama.runtime.outputs",
    "CompletionOutput": "fastllama.runtime.outputs",
    "RequestDelta": "fastllama.runtime.outputs",
    "ScoreOutput": "fastllama.runtime.outputs",
    "LlamaConfig": "fastllama.layers.config",
    "LlamaForCausalLM": "fastllama.layers.model",
    "load_model": "fastllama.io.load",
    "quantize": "fastllama.layers.quantizing",
    "save_model": "fastllama.io.save",
    "load_tokenizer": "fastllama.io.tokenizer",
    "from_transformers": "fastllama.integrations.transformers.memory",
    "patch": "fastllama.integrations.transformers.patch",
    "unpatch": "fastllama.integrations.transformers.patch",
    "PatchReport": "fastllama.integrations.transformers.patch",
    "FastLlamaConfig": "fastllama.integrations.transformers.quantizer",
}
__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "FastLlamaConfig",
    "LlamaConfig",
    "LlamaForCausalLM",
    "PatchReport",
    "RequestDelta",
    "RequestOutput",
    "SamplingParams",
    "ScoreOutput",
    "__version__",
    "from_transformers",
    "load_model",
    "load_tokenizer",
    "patch",
    "quantize",
    "save_model",
    "unpatch",
]

if TYPE_CHECKING:
    from fastllama.integrations.transformers.memory import from_transformers
    from fastllama.integrations.transformers.patch import PatchReport, patch, unpatch
    from fastllama.integrations.transformers.quantizer import FastLlamaConfig
    from fastllama.io.load import load_model
    from fastllama.io.save import save_model
    from fastllama.io.tokenizer import load_tokenizer
    from fastllama.layers.config import LlamaConfig
    from fastllama.layers.model import LlamaForCausalLM
    from fastllama.layers.quantizing import quantize
    from fastllama.runtime.llm import LLM
    from fastllama.runtime.outputs import CompletionOutput, RequestDelta, RequestOutput, ScoreOutput
    from fastllama.runtime.params import SamplingParams
    from fastllama.runtime.serving.async_engine import AsyncEngine


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'fastllama' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
