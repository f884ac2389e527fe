"""Loads a model by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastllama.errors import CheckpointError, check_choice, counted, shown
from fastllama.io.adapter import AdaptedCheckpoint, locate
from fastllama.io.checkpoint import open_checkpoint
from fastllama.io.formats.base import Checkpoint
from fastllama.layers import packing
from fastllama.layers.config import DTYPES, LlamaConfig
from fastllama.layers.loading import load_weights
from fastllama.layers.model import LlamaForCausalLM
from fastllama.layers.quantization import check_quantization
from fastllama.layers.tensor_names import is_quantized
from fastllama.layers.weights import slots
from fastllama.progress import progress_bar
from fastllama.quant.weight import QuantizedWeight


def load_model(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    quantization: str | None = None,
    progress: bool | None = None,
) -> LlamaForCausalLM:
    """Load a model in evaluation mode: "tiny", a path (Hugging Face or Meta folder, llama2.c file) or a Hub id.

    adapter: a PEFT LoRA adapter (folder or Hub id), merged into the weights in `dtype`; a model that is itself an
    adapter is merged into the base that it names. dtype: "auto" (the checkpoint's), "bfloat16", "float16" or "float32".
    quantization: as for LLM; each layer is packed as soon as its weights are loaded. A quantized checkpoint keeps its
    integers and scales.
    progress: a bar on stderr; None shows it on a terminal only. Peak memory is the packed model, one layer's weights,
    and one mapped shard; Meta's tensors are spread over all its files, which stay mapped.
    Raises FileNotFoundError, ValueError for a quantization that the model cannot have, or CheckpointError naming file
    and tensor.
    """
    check_quantization(quantization)
    checkpoint, target = open_model(model, adapter=adapter, dtype=dtype)
    built, kind = meta_model(checkpoint, target, device=torch.device(device), quantization=quantization)
    return fill(built, checkpoint, kind, device=torch.device(device), progress=progress)


def meta_model(
    checkpoint: Checkpoint, dtype: torch.dtype, *, device: torch.device, quantization: str | None
) -> tuple[LlamaForCausalLM, str | None]:
    """A checkpoint's model on the meta device, and the kind that `fill` packs its weights into (`packing.resolve`)."""
    model = LlamaForCausalLM(checkpoint.config, dtype, "meta")
    return model, packing.resolve(model, quantization, device=device, kept=checkpoint.quantization)


def fill(
    model: LlamaForCausalLM, checkpoint: Checkpoint, kind: str | None, *, device: torch.device, progress: bool | None
) -> LlamaForCausalLM:
    """Load a checkpoint's weights into its `meta_model` and pack them. Raises as load_model does."""
    pack = packing.packer(model, kind, device=device)
    tensors = _counted(checkpoint, model, progress)
    load_weights(model, tensors, file_of=checkpoint.file_of, device=device, pack=pack)
    return model.eval()


def open_model(
    model: str | Path, *, adapter: str | Path | None = None, dtype: str | torch.dtype = "auto"
) -> tuple[Checkpoint, torch.dtype]:
    """The checkpoint that load_model reads, with the adapter, and the compute dtype. Weights stay in the files."""
    path, adapter_path = locate(model, adapter)
    checkpoint = open_checkpoint(path)
    declared = checkpoint.config.num_parameters
    if declared > checkpoint.nbytes * checkpoint.numbers_per_byte:  # raise before memory is allocated
        _look_for_quantized(checkpoint)
        raise CheckpointError(
            f"{path}: the configuration declares {declared:,} numbers, but the weight files have {checkpoint.nbytes:,} "
            "bytes; do they belong together?"
        )
    target = resolve_dtype(dtype, checkpoint.config)
    return (checkpoint if adapter_path is None else AdaptedCheckpoint(checkpoint, adapter_path, target)), target


def _look_for_quantized(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where files too small for the declared parameters are broken or quantized."""
    for name, _ in checkpoint.tensors():
        if is_quantized(name):
            raise CheckpointError(
                f"{checkpoint.file_of(name)}: tensor {shown(name)} is of a quantized weight, and the model's "
                "config.json does not specify its quantization"
            )


def resolve_dtype(dtype: str | torch.dtype, config: LlamaConfig) -> torch.dtype:
    """The compute dtype. "auto" is the checkpoint's on every device, float32 where it specifies none."""
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    check_choice("dtype", name, ("auto", *DTYPES))
    resolved = getattr(torch, (config.dtype or "float32") if name == "auto" else name)
    assert isinstance(resolved, torch.dtype)
    return resolved


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that `device` names; "auto" is cuda where there is one. Raises ValueError if it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {device!r}; legal: 'auto', 'cpu', 'cuda', 'cuda:0' ...") from None
    check_choice("device type", resolved.type, ("cpu", "cuda"))
    count = torch.cuda.device_count()
    if resolved.type == "cuda" and (resolved.index or 0) >= count:
        seen = counted(count, "CUDA device")
        raise ValueError(f"device is {str(device)!r}, and torch sees {seen}; legal here: 'cpu' or a device it sees")
    return resolved


def _counted(
    checkpoint: Checkpoint, model: LlamaForCausalLM, progress: bool | None
) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """The checkpoint's tensors, with a progress bar in bytes of the model's dtype."""
    names, itemsize = slots(checkpoint.config).keys(), model.dtype.itemsize
    total = model.num_parameters * itemsize
    with progress_bar("Loading weights", progress, total=total, unit="B", unit_scale=True) as bar:
        for name, tensor in checkpoint.tensors():
            yield name, tensor
            if name in names:
                bar.update(tensor.shape.numel() * itemsize)
