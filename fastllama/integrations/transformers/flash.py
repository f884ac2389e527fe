"""`attn_implementation="fastllama_flash"`: transformers' flash-attention path on the functions of our `flash_attn`.

transformers unpads, packs and batches for flash-attention by itself, for every model that has it, and takes only its
functions from outside: from `_lazy_imports`, by the name of the implementation.
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
# By its version number `generate_batch` knows, on a GPU, that a flash-attention reads a page table.
NAMES = (NAME, f"{NAME}_2")
_PAGED = "paged|"  # what transformers before 5.23 puts in front of a name within generate_batch
_SEAMS = ("_lazy_imports", "_loaded_implementation")  # of transformers 5; 4.57 keeps one implementation for all models

_known: set[type[nn.Module]] = set()  # attentions of models that have flash-attention


def register() -> None:
    """Let transformers models run on our attention, `attn_implementation="fastllama_flash"`, without a patch.

    For any model that has flash-attention in transformers and no window, soft cap or sinks, in `forward`, `generate`
    and `generate_batch`; of floating dtypes, on any device, without gradients.
    "fastllama_flash_2" is the same under a name for which `generate_batch` reads keys through a page table on a GPU,
    where for the other it gathers them at each token. Calling it again changes nothing.
    Raises ImportError for a transformers without the private names that this hangs on, as all before 5.0.
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
    """transformers' own, for a module of a model that has flash-attention. Raises ValueError for another one.

    transformers asks so of its own names alone, and one more would run without, say, T5's position biases.
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
    """`_lazy_imports` that answers for our names, too."""

    @wraps(lazy_imports)
    def imports(implementation: str | None, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        if implementation is None or implementation.removeprefix(_PAGED) not in NAMES:
            return lazy_imports(implementation, *args, **kwargs)
        padding = flash_utils._pad_input, flash_utils._unpad_input
        return flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, *padding

    imports.knows_fastllama = True  # type: ignore[attr-defined]
    return imports
