"""What every checkpoint format offers: a configuration, and its tensors under Hugging Face names, lazily."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from fastllama.layers.config import DTYPES, LlamaConfig
from fastllama.quant.weight import QuantizedWeight


class Checkpoint(ABC):
    """A Llama on disk. Opening reads headers only; weights stay in the files until `tensors` reaches them."""

    path: Path
    config: LlamaConfig
    quantization: str | None = None  # what its linear layers' weights are quantized in, one of `quantized.LINEARS`
    numbers_per_byte = 1  # at most; of a config's `num_parameters`

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the weight files."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        """Every tensor, as (Hugging Face name, CPU tensor in Hugging Face's layout), one shard mapped at a time.

        A weight that is quantized comes as it is, under the name that it would have unquantized. Raises
        CheckpointError when a file turns out to be damaged.
        """

    def file_of(self, name: str) -> Path:
        """The file that holds the tensor, or the folder when the format spreads it over several."""
        return self.path


def dtype_name(tensor: Tensor) -> str | None:
    """The dtype as a configuration spells it, None where a Llama cannot run in it."""
    name = str(tensor.dtype).removeprefix("torch.")
    return name if name in DTYPES else None
