"""The same checkpoint in transformers, as a reference that reads the configuration independently."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllama.errors import ExtraRequiredError, brief, summary, why_unusable
from fastllama.io.adapter import AdaptedCheckpoint
from fastllama.io.formats.base import Checkpoint
from fastllama.io.formats.llama2c import Llama2cCheckpoint
from fastllama.io.formats.meta import MetaCheckpoint

# transformers cannot open the first two, and does not merge adapters into the weights, as we do.
_REFUSED = {
    MetaCheckpoint: "a checkpoint in Meta's format",
    Llama2cCheckpoint: "a llama2.c file",
    AdaptedCheckpoint: "an adapter",
}


class TransformersReference:
    """transformers' model of a Hugging Face folder, in `dtype` on `device`; a second copy of the weights in memory.

    model: the user's name of the checkpoint, for messages. Raises ExtraRequiredError without transformers, and
    ValueError for an adapter, another format than Hugging Face's, or a failure of transformers, with its reason.
    """

    def __init__(self, model: str | Path, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        if why_unusable("transformers"):
            raise ExtraRequiredError("against='transformers'", "transformers", "hf")
        if kind := _REFUSED.get(type(checkpoint)):
            raise ValueError(
                f"model is {str(model)!r}, {kind}; legal with against='transformers': a whole model as a Hugging Face "
                "folder or Hub id"
            )
        if checkpoint.quantization is not None and (why := why_unusable("compressed_tensors")):
            raise ValueError(
                f"model is {str(model)!r}, whose weights are in {checkpoint.quantization}: transformers loads them by "
                f"compressed-tensors, which cannot be used here: {why}; pip install compressed-tensors"
            )
        import transformers

        self.name = f"transformers {transformers.__version__}"
        with _quiet():
            try:
                loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                    checkpoint.path, dtype=dtype, trust_remote_code=False, output_loading_info=True
                )
            except Exception as error:
                raise ValueError(f"model is {str(model)!r}, which {self.name} cannot load: {summary(error)}") from error
        built, found = loaded
        if missing := sorted(found["missing_keys"]):
            raise ValueError(
                f"model is {str(model)!r}, in which {self.name} does not find {brief(missing)}: it would run with "
                "random weights there"
            )
        self._model: Any = built.to(device).eval()

    @torch.inference_mode()
    def forward(self, ids: Tensor, length: int) -> list[Tensor]:
        """The residual stream [T, hidden_size] after each layer, then the logits [T, vocab_size], of ids [T].

        length: number of tokens to feed, at least T: dynamic RoPE scaling depends on it, ours on max_model_len. Ids
        appended for it are masked by causality.
        """
        seen: list[Tensor] = []

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen.append(output)

        count = ids.shape[0]
        handles = [layer.register_forward_hook(hook) for layer in self._model.model.layers]
        try:
            with _quiet():
                logits = self._model(F.pad(ids, (0, length - count))[None], use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return [each[0, :count] for each in (*seen, logits)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' progress bars, log and warnings; the report covers what matters."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # stderr too: progress bars of compressed-tensors cannot be disabled.
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
