"""Durations and token rates of a request."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fastllama.errors import counted
from fastllama.runtime.outputs import RequestOutput


@dataclass(frozen=True)
class Timings:
    """Counts of tokens, seconds, tokens per second (None where nothing was timed).

    prompt_s ends with the first token. The prompt's rate leaves out tokens found in the prefix cache; the answer's rate
    leaves out each sample's first token, which the prompt's last step produces. drafted_tokens counts the draft tokens
    of speculative decoding, accepted_tokens those of them that became part of the answer.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    prompt_s: float
    decode_s: float
    prompt_tokens_per_s: float | None
    decode_tokens_per_s: float | None

    @classmethod
    def of(cls, output: RequestOutput) -> Timings:
        """The timings of a finished request."""
        metrics = output.metrics
        assert metrics.finish_time is not None
        first = metrics.first_token_time or metrics.finish_time
        prompt_s, decode_s = first - metrics.arrival_time, metrics.finish_time - first
        fresh = metrics.num_prompt_tokens - metrics.num_cached_tokens
        decoded = metrics.num_generated_tokens - len(output.outputs)
        return cls(
            prompt_tokens=metrics.num_prompt_tokens,
            cached_tokens=metrics.num_cached_tokens,
            generated_tokens=metrics.num_generated_tokens,
            drafted_tokens=metrics.num_draft_tokens,
            accepted_tokens=metrics.num_accepted_tokens,
            prompt_s=prompt_s,
            decode_s=decode_s,
            prompt_tokens_per_s=fresh / prompt_s if prompt_s > 0 else None,
            decode_tokens_per_s=decoded / decode_s if decode_s > 0 and decoded > 0 else None,
        )

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    def describe(self) -> str:
        """One line of statistics."""
        cached = f" ({self.cached_tokens} cached)" if self.cached_tokens else ""
        prompt = f"prompt: {counted(self.prompt_tokens, 'token')}{cached}{_rate(self.prompt_tokens_per_s)}"
        drafts = f"; drafted {self.drafted_tokens}, accepted {self.accepted_tokens}" if self.drafted_tokens else ""
        return (
            f"{prompt}; generated: {counted(self.generated_tokens, 'token')}{_rate(self.decode_tokens_per_s)}{drafts}"
        )


def _rate(rate: float | None) -> str:
    return "" if rate is None else f", {rate:,.1f} tokens/s"
