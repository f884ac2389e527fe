"""`attn_implementation="fastllama_flash"`: transformers' flash-attention path on our `flash_attn` functions.

transformers itself unpads, packs and batches for flash-attention, for every model that supports it, and gets only the
functions from `_lazy_imports`, by the name of the implementation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import transformers
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from fastllama.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

NAME = "fastllama_flash"
# `generate_batch` uses page tables on a GPU for flash-attention names with a version number.
NAMES = (NAME, f"{NAME}_2")
_PAGED = "paged|"  # prefix of a name within generate_batch, in transformers before 5.23
_SEAMS = ("_lazy_imports", "_loaded_implementation")  # of transformers 5; 4.57 keeps one implementation for all models

_known: set[type[nn.Module]] = set()  # attention classes of models with flash-attention


def register() -> None:
    """Register our attention for unpatched transformers models, as `attn_implementation="fastllama_flash"`.

    For any model that has flash-attention in transformers and no window, soft cap or sinks, in `forward`, `generate`
    and `generate_batch`; floating dtypes, any device, no gradients.
    "fastllama_flash_2" is the same under a name for which `generate_batch` reads keys through a page table on a GPU;
    for the other it gathers them at each token. Calling it again has no effect.
    Raises ImportError for a transformers without the required private names, as all before 5.0.
    """
    missing = [name for name in _SEAMS if not hasattr(flash_utils, name)]
    if missing or not callable(flash_utils._lazy_imports):
        raise ImportError(
            f"transformers {transformers.__version__} has no {flash_utils.__name__}.{(missing or _SEAMS)[0]}, by which "
            f'attn_implementation="{NAME}" gets its functions; legal: 5.17 to 5.24, as tested'
        )
    if not getattr(flash_utils._lazy_imports, "knows_fastllama", False):
        flash_utils._lazy_imports = _with_ours(flash_utils._lazy_imports)
    for name in NAMES:
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, flash_attention_mask)
    if hasattr(flash_utils, "lazy_import_paged_flash_attention"):
        from transformers.integrations.flash_paged import paged_attention_forward

        for name in NAMES:
            AttentionInterface.register(f"{_PAGED}{name}", paged_attention_forward)


def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """transformers' flash-attention, for modules of models that support it. Raises ValueError for others.

    transformers checks this for its own names only; with ours, T5 would run without its position biases.
    """
    if type(module) not in _known:
        _check_model(type(module))
    return flash_attention_forward(module, *args, **kwargs)


def _check_model(attention_class: type[nn.Module]) -> None:
    home = sys.modules[attention_class.__module__]
    models = [
        value
        for value in vars(home).values()
        if isinstance(value, type) and issubclass(value, PreTrainedModel) and value.__module__ == home.__name__
    ]
    if models and not any(model._supports_flash_attn for model in models):
        raise ValueError(
            f'attn_implementation is "{NAME}"; legal for {models[0].__name__}, which has no flash-attention in '
            'transformers: "eager", or "sdpa" where it has that'
        )
    _known.add(attention_class)


def _with_ours(lazy_imports: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Wrap `_lazy_imports` to return our functions for our names."""

    @wraps(lazy_imports)
    def imports(implementation: str | None, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        if implementation is None or implementation.removeprefix(_PAGED) not in NAMES:
            return lazy_imports(implementation, *args, **kwargs)
        padding = flash_utils._pad_input, flash_utils._unpad_input
        return flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, *padding

    imports.knows_fastllama = True  # type: ignore[attr-defined]
    return imports
