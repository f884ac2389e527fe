"""The run that made the packaged model: every number in one place."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig


@dataclass(frozen=True)
class Phase:
    """A stretch of training: `tokens` seen in rows of `length`, `batch` of them a step.

    `optimizer` ("adamw" or "muon") steps the matrices at the peak `rate`; AdamW always steps embeddings and norms.
    When a phase begins, Gaussian noise of deviation `embedding_noise` is added to the embeddings: names occur alike and
    so stay nearly the same vector, and what cannot be told apart cannot be copied.
    """

    tokens: int
    length: int
    batch: int
    optimizer: str
    rate: float
    embedding_rate: float
    embedding_noise: float = 0.0

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
    phases: tuple[Phase, ...] = (
        Phase(1_433_600, 512, 4, "adamw", 2e-3, 2e-3),
        Phase(512_000, 128, 16, "adamw", 2e-3, 2e-3),
        Phase(204_800, 128, 16, "adamw", 2e-3, 2e-3, embedding_noise=0.06),
        Phase(614_400, 256, 16, "muon", 1e-3, 5e-4),
        Phase(409_600, 512, 8, "muon", 1e-3, 5e-4),
        Phase(204_800, 1024, 4, "muon", 1e-3, 5e-4),
    )
    warmup_steps: int = 100
    decay_steps: int = 150  # at the end, along a cosine
    final_share: float = 0.02  # of the rates, at the last step
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    threads: int = 2
    log_steps: int = 10
    checkpoint_steps: int = 50

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
