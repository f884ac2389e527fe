"""`attn_implementation="fastllama_flash"`: transformers' flash-attention path on the functions of our `flash_attn`.

transformers unpads, packs and batches for flash-attention by itself, for every model, and takes only its functions from
outside: by `_lazy_imports` from 5.0 on, whose answers are kept by name; before, once for all models of a process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import transformers
from transformers import AttentionInterface
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from fastllama.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

NAME = "fastllama_flash"
# By its version number `generate_batch` knows, on a GPU, that a flash-attention reads a page table.
NAMES = (NAME, f"{NAME}_2")
_PAGED = "paged|"  # what 5.17 to 5.22 put in front of a name within generate_batch
_HELD = ("_flash_fn", "_flash_varlen_fn", "_pad_fn", "_unpad_fn", "_process_flash_kwargs_fn")  # by 4.57


def register() -> None:
    """Let transformers models run on our attention, `attn_implementation="fastllama_flash"`, without a patch.

    For any model that has flash-attention in transformers and no window, soft cap or sinks, in `forward`, `generate`
    and, from transformers 5.17 on, `generate_batch`; of floating dtypes, on any device, without gradients.
    "fastllama_flash_2" is the same function under a name for which `generate_batch` reads keys through a page table on
    a GPU, where for the other it gathers them at each token. Calling it again changes nothing.
    Raises ImportError for a transformers that keeps flash-attention's functions elsewhere: the hook is private.
    """
    names = ("_lazy_imports", "_lazy_define_process_function")
    missing = [name for name in names if not callable(getattr(flash_utils, name, None))]
    if missing:
        raise ImportError(
            f"transformers {transformers.__version__} has no {flash_utils.__name__}.{missing[0]}, by which "
            f'attn_implementation="{NAME}" gets its functions; legal: 4.57 to 5.24, as tested'
        )
    if not hasattr(flash_utils, "_loaded_implementation"):
        _register(_as_before_5(flash_attention_forward))
        return
    _register(flash_attention_forward)
    if not getattr(flash_utils._lazy_imports, "knows_fastllama", False):
        flash_utils._lazy_imports = _with_ours(flash_utils._lazy_imports)
    if hasattr(flash_utils, "lazy_import_paged_flash_attention"):
        from transformers.integrations.flash_paged import paged_attention_forward

        for name in NAMES:
            AttentionInterface.register(f"{_PAGED}{name}", paged_attention_forward)


def _register(forward: Callable[..., Any]) -> None:
    for name in NAMES:
        AttentionInterface.register(name, forward)
        AttentionMaskInterface.register(name, flash_attention_mask)


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


def _as_before_5(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`flash_attention_forward` of 4.57 with our functions where it looks for its own, for as long as it runs."""
    kwargs_of = flash_utils._lazy_define_process_function(flash_attn_varlen_func)
    padding = flash_utils._pad_input, flash_utils._unpad_input
    ours = flash_attn_func, flash_attn_varlen_func, *padding, kwargs_of

    @wraps(forward)
    def forward_on_ours(*args: Any, **kwargs: Any) -> Any:
        held = [getattr(flash_utils, name) for name in _HELD]
        try:
            _hold(ours)
            return forward(*args, **kwargs)
        finally:
            _hold(held)

    return forward_on_ours


def _hold(functions: Any) -> None:
    for name, function in zip(_HELD, functions, strict=True):
        setattr(flash_utils, name, function)
