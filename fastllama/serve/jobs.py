"""A validated request: what the engine runs, and how to render the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastllama.runtime.params import SamplingParams


@dataclass(frozen=True)
class PromptIds:
    """One prompt of a request, as token ids; text: the prompt of a completion, for `echo`."""

    token_ids: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True)
class Job:
    """A validated request, made by translate.py; render.py uses it with the deltas.

    kind: the endpoint. model: the name in responses. prompts: each runs with the same params, whose max_tokens is None
    if the answer may reach the end of the context.
    stream, include_usage: as requested. continues_text: whether the answer's text continues the prompt's; False for a
    text of its own, as in a conversation. echo: shows the prompt before the answer. show_tokens: False if max_tokens is
    0, where the one token that is sampled is hidden. logprobs: how many of the likeliest tokens to report beside each
    token; None for no report. user: a hash of the user that the client names, for the access log; None without.
    """

    kind: Literal["chat", "completion"]
    model: str
    prompts: tuple[PromptIds, ...]
    params: SamplingParams
    stream: bool = False
    include_usage: bool = False
    continues_text: bool = True
    echo: bool = False
    show_tokens: bool = True
    logprobs: int | None = None
    user: str | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Number of tokens of all prompts together."""
        return sum(len(prompt.token_ids) for prompt in self.prompts)
