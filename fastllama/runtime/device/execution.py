"""Steps in flight on the device: the forward pass and sampling are launched, the tokens not yet read."""

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
    """Results of a step, or of a part of one: prompt log-probabilities, and the tokens that are being sampled."""

    prompt_logprobs: list[tuple[Sequence, int, list[TokenLogprob]]]
    draws: sampler.PendingTokens


class Launched(NamedTuple):
    """A step in flight, in parts where it raised as a whole, and the requests for which it raised."""

    step: Step
    parts: list[Computed]
    failures: dict[Request, Exception]

    @property
    def whole(self) -> bool:
        """Whether it runs as it was scheduled."""
        return len(self.parts) == 1 and not self.failures

    @property
    def may_be_followed(self) -> bool:
        """Whether the next step can run before these tokens are known: logits processors and bad words want them."""
        return self.whole and not any(
            seq.request.params.host_bound for chunk in self.step.chunks for seq in chunk.samples
        )

    def read(self) -> list[sampler.SampledToken]:
        """Wait for the sampled tokens and return them."""
        return [drawn for part in self.parts for drawn in part.draws.read()]


def launch(runner: Runner, step: Step, *, before: Launched) -> Launched:
    """Launch a step's forward pass and sampling behind a step that has not been read. Raises what these raise."""
    return Launched(step, [_compute(runner, before.parts[0].draws, step)], {})


def launch_parts(runner: Runner, step: Step) -> Launched:
    """Launch a step's forward pass and sampling, in parts where they raise: see isolation.py."""
    return Launched(step, *run_parts(step, partial(_compute, runner, None)))


def _compute(runner: Runner, before: sampler.PendingTokens | None, step: Step) -> Computed:
    logits = runner.run(step, before)
    return Computed(sampler.prompt_logprobs(logits), sampler.start(logits))
