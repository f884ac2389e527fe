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
    phases: tuple[Phase, ...] = (Phase(819_200, 256, 8), Phase(921_600, 512, 4), Phase(307_200, 1024, 2))
    learning_rate: float = 5e-3  # of the matrices, by Muon
    embedding_rate: float = 2e-3  # of the embeddings and norms, by AdamW
    final_share: float = 0.02  # of the learning rates, at the last step
    warmup_steps: int = 50
    decay_share: float = 0.6  # of the steps, at the end: trapezoid schedule with a cosine fall
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
            initializer_range=self.hidden_size**-0.5,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
