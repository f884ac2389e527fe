"""The run that made the packaged model: every number in one place. The same config gives the same model."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig


@dataclass(frozen=True)
class Phase:
    """A stretch of training: `tokens` seen in sequences of `length`, `batch` of them a step."""

    tokens: int
    length: int
    batch: int

    @property
    def steps(self) -> int:
        return self.tokens // (self.length * self.batch)


@dataclass(frozen=True)
class TinyConfig:
    """Data, tokenizer, model shape and schedule. Token counts define the run, not wall time."""

    seed: int = 20240
    vocab_size: int = 2048
    tokenizer_documents: int = 6000
    hidden_size: int = 256
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    intermediate_size: int = 768
    num_hidden_layers: int = 5
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    phases: tuple[Phase, ...] = (Phase(5_900_000, 512, 4), Phase(1_100_000, 1024, 2))
    learning_rate: float = 2e-3
    final_share: float = 0.02  # of the learning rate, at the last step
    warmup_steps: int = 100
    decay_share: float = 0.5  # of the steps, at the end: trapezoid schedule with a cosine fall
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    threads: int = 2
    log_steps: int = 20
    checkpoint_steps: int = 200

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def llama(self) -> LlamaConfig:
        """The model's shape as transformers writes it; Llama 2's constants, tied embeddings."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
            rms_norm_eps=self.rms_norm_eps,
            rope_theta=self.rope_theta,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
