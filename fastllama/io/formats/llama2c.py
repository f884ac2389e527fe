"""llama2.c's .bin files (karpathy/llama2.c, export.py): version 0 without a magic, 1 in fp32, 2 in int8 groups.

One header, then the tensors of each kind over all layers, back to back; rotary pairs interleaved, as Meta's.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastllama.errors import CheckpointError
from fastllama.io.formats.base import Checkpoint
from fastllama.io.formats.interleaved import LAYER_NAMES, half_split, rotary_heads
from fastllama.io.formats.recognise import what_is
from fastllama.layers.config import LlamaConfig

_MAGIC = 0x616B3432  # "ak42"
_FIELDS = struct.Struct("<7i")  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len
_HEADER = struct.Struct("<Ii7iBi")  # magic, version, the seven fields, shared classifier, group size
_HEADER_SIZE = 256
_ATTENTION = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
_MLP = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


@dataclass(frozen=True)
class _Kind:
    """`count` consecutive tensors of one shape; `name` has a placeholder for the layer, None for skipped data."""

    name: str | None
    shape: tuple[int, ...]
    count: int
    group: int | None = None  # elements of int8 that share one fp32 scale; None: fp32

    @property
    def nbytes(self) -> int:
        """Bytes of one tensor."""
        size = math.prod(self.shape)
        return 4 * size if self.group is None else size + 4 * (size // self.group)


class Llama2cCheckpoint(Checkpoint):
    """One memory-mapped file; int8 tensors are converted to fp32 when they are yielded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            head = file.read(_HEADER_SIZE)
        what = what_is(path)
        if path.suffix in (".safetensors", ".pth", ".pt", ".json") or (what or "").startswith("PyTorch"):
            raise CheckpointError(f"{path} is one file of a model; give the folder that holds it and its configuration")
        try:
            self._start, self.config, self._kinds = _read_header(head)
            self._size = self._start + sum(kind.count * kind.nbytes for kind in self._kinds)
            size = path.stat().st_size
            trouble = f"has {size} bytes, expected {self._size} by its header; it is truncated or not a llama2.c file"
            trouble = "" if size == self._size else trouble
        except struct.error:
            trouble = f"has {len(head)} bytes, too few for a llama2.c header"
        except (ValueError, TypeError) as error:
            trouble = f"does not begin with a llama2.c header ({error})"
        if trouble and what not in (None, "a llama2.c file"):
            trouble = f"is {what}"
        if trouble:
            raise CheckpointError(f"{path} {trouble}")

    @property
    def nbytes(self) -> int:
        return self._size

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        data = torch.from_file(str(self.path), shared=False, size=self._size, dtype=torch.uint8)
        start = self._start
        for kind in self._kinds:
            for layer in range(kind.count):
                if kind.name is not None:
                    name = kind.name.format(layer)
                    tensor = _decode(data[start : start + kind.nbytes], kind)
                    heads = rotary_heads(name, self.config)
                    yield name, tensor if heads is None else half_split(tensor, heads, f"{self.path}: tensor {name}")
                start += kind.nbytes


def _read_header(head: bytes) -> tuple[int, LlamaConfig, list[_Kind]]:
    """The offset of the weights, the configuration, the order of the tensors. ValueError for an invalid header."""
    version, group = 0, None
    if int.from_bytes(head[:4], "little") != _MAGIC:
        *fields, vocab, length = _FIELDS.unpack_from(head)
        tied, vocab = vocab > 0, abs(vocab)  # a negative vocabulary marks a separate classifier
    else:
        _, version, *fields, vocab, length, shared, group = _HEADER.unpack_from(head)
        if version not in (1, 2):
            raise ValueError(f"version {version}; legal: 0, 1, 2")
        if shared > 1:
            raise ValueError(f"shared classifier flag {shared}; legal: 0, 1")
        tied = bool(shared)
    dim, inner, layers, heads, kv_heads = fields
    if heads < 1 or dim % heads:
        raise ValueError(f"dim {dim} and {heads} heads")
    # Neither rope_theta nor norm_eps is stored: run.c has 10000 and 1e-5 built in.
    config = LlamaConfig(
        vocab, dim, inner, layers, heads, kv_heads, dim // heads, length, tie_word_embeddings=tied, dtype="float32"
    )
    return (_HEADER_SIZE if version else _FIELDS.size), config, _order(version, config, group if version == 2 else None)


def _order(version: int, config: LlamaConfig, group: int | None) -> list[_Kind]:
    hidden, inner, q, kv = config.hidden_size, config.intermediate_size, config.q_size, config.kv_size
    shapes = dict(zip(_ATTENTION, [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)], strict=True))
    shapes |= dict(zip(_MLP, [(inner, hidden), (hidden, inner), (inner, hidden)], strict=True))
    table = (config.vocab_size, hidden)
    if group is not None and (group < 1 or any(math.prod(shape) % group for shape in (*shapes.values(), table))):
        raise ValueError(f"group size {group}; legal: a divisor of every matrix's size")

    def per_layer(name: str) -> _Kind:
        hf_name, count = f"model.layers.{{}}.{LAYER_NAMES[name][0]}.weight", config.num_hidden_layers
        return _Kind(hf_name, shapes[name], count, group) if name in shapes else _Kind(hf_name, (hidden,), count)

    attention, mlp = [per_layer(name) for name in _ATTENTION], [per_layer(name) for name in _MLP]
    first_norm, second_norm = per_layer("attention_norm"), per_layer("ffn_norm")
    last_norm = _Kind("model.norm.weight", (hidden,), 1)
    embedding = _Kind("model.embed_tokens.weight", table, 1, group)
    if version == 0:
        cos_and_sin = _Kind(None, (config.max_position_embeddings, config.head_dim // 2), 2)
        order = [embedding, first_norm, *attention, second_norm, *mlp, last_norm, cos_and_sin]
    else:
        order = [first_norm, second_norm, last_norm, embedding, *attention, *mlp]
    return order if config.tie_word_embeddings else [*order, _Kind("lm_head.weight", table, 1, group)]


def _decode(raw: Tensor, kind: _Kind) -> Tensor:
    """fp32 tensor of `kind.shape` from its bytes; int8 groups are value * scale."""
    if kind.group is None:
        return raw.view(torch.float32).view(kind.shape)
    size = math.prod(kind.shape)
    scales = raw[size:].clone().view(torch.float32)  # a copy is aligned, the file need not be
    return (raw[:size].view(torch.int8).view(-1, kind.group) * scales[:, None]).view(kind.shape)
