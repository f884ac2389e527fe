"""The interface of checkpoint formats: a configuration, and lazily read tensors under Hugging Face names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from fastllama.layers.config import DTYPES, LlamaConfig
from fastllama.quant.weight import QuantizedWeight


class Checkpoint(ABC):
    """A Llama on disk. Opening reads headers only; weights stay in the files until `tensors` yields them."""

    path: Path
    config: LlamaConfig
    quantization: str | None = None  # of the linear layers' weights, one of `quantized.LINEARS`
    numbers_per_byte = 1  # the most parameters, as in config `num_parameters`, that a byte of the files can hold

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the weight files."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        """Every tensor, as (Hugging Face name, CPU tensor in Hugging Face's layout), one shard mapped at a time.

        A quantized weight is yielded packed, under the name that it would have unquantized. Raises
        CheckpointError when a file turns out to be damaged.
        """

    def file_of(self, name: str) -> Path:
        """The file that holds the tensor, or the folder when the format spreads it over several."""
        return self.path


def dtype_name(tensor: Tensor) -> str | None:
    """The dtype's name in a configuration, None for a dtype that a Llama cannot run in."""
    name = str(tensor.dtype).removeprefix("torch.")
    return name if name in DTYPES else None
