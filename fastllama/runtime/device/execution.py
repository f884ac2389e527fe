"""Launches steps on the device: the forward pass and sampling, whose tokens are read later."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from fastllama.runtime.device import sampler
from fastllama.runtime.device.runner import Runner
from fastllama.runtime.outputs import TokenLogprob
from fastllama.runtime.planning.isolation import run_parts
from fastllama.runtime.planning.sequence import Request, Sequence
from fastllama.runtime.planning.step import Step


class Computed(NamedTuple):
    """Results of a step, or of a part of one: prompt log-probabilities, and the tokens being sampled."""

    prompt_logprobs: list[tuple[Sequence, int, list[TokenLogprob]]]
    tokens: sampler.PendingTokens


class Launched(NamedTuple):
    """A step in flight, split into parts if it raised as a whole, and the requests for which it raised."""

    step: Step
    parts: list[Computed]
    failures: dict[Request, Exception]

    @property
    def whole(self) -> bool:
        """Whether it runs as scheduled, neither split nor reduced."""
        return len(self.parts) == 1 and not self.failures

    @property
    def may_be_followed(self) -> bool:
        """Whether the next step can run before these are on the host: logits processors and bad words need them."""
        return self.whole and not any(
            seq.request.params.host_bound for chunk in self.step.chunks for seq in chunk.samples
        )

    def read(self) -> list[sampler.SampledToken]:
        """Wait for the sampled tokens and return them."""
        return [token for part in self.parts for token in part.tokens.read()]


def launch(runner: Runner, step: Step, *, before: Launched) -> Launched:
    """Launch a step's forward pass and sampling after an unread step. Raises what they raise."""
    return Launched(step, [_compute(runner, before.parts[0].tokens, step)], {})


def launch_parts(runner: Runner, step: Step) -> Launched:
    """Launch a step's forward pass and sampling, split where they raise: see isolation.py."""
    return Launched(step, *run_parts(step, partial(_compute, runner, None)))


def _compute(runner: Runner, before: sampler.PendingTokens | None, step: Step) -> Computed:
    logits = runner.run(step, before)
    return Computed(sampler.prompt_logprobs(logits), sampler.start(logits))
