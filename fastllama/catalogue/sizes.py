"""The sizes of a Llama that determine the shapes of its ops."""

from __future__ import annotations

from dataclasses import dataclass

from fastllama.layers.config import LlamaConfig

TOY_CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


@dataclass(frozen=True)
class LlamaSizes:
    """name: "toy", or one of LlamaConfig's presets."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, name: str) -> LlamaSizes:
        """The sizes of the toy or a preset. Raises ValueError for another name."""
        config = config_of(name)
        return cls(
            name,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.vocab_size,
        )

    @property
    def short(self) -> str:
        """ "7B" of "llama-2-7b"."""
        return self.name.rsplit("-", 1)[-1].upper()

    @property
    def attention(self) -> tuple[int, int, int]:
        """Numbers of query and key heads, and the head dimension."""
        return self.heads, self.kv_heads, self.head_dim

    @property
    def qkv(self) -> tuple[int, int]:
        """Features and columns of the fused query, key and value projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim, self.hidden

    @property
    def gate_up(self) -> tuple[int, int]:
        """Features and columns of the fused gate and up projection, the largest weight of a layer."""
        return 2 * self.intermediate, self.hidden

    @property
    def down(self) -> tuple[int, int]:
        """Features and columns of the down projection."""
        return self.hidden, self.intermediate


def config_of(name: str) -> LlamaConfig:
    """The complete configuration of `LlamaSizes.of(name)`."""
    return TOY_CONFIG if name == "toy" else LlamaConfig.preset(name)


TOY = LlamaSizes.of("toy")
LLAMA_2 = tuple(LlamaSizes.of(f"llama-2-{size}") for size in ("7b", "70b", "13b"))  # by importance
