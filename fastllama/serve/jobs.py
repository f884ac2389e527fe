"""A legal request: what the engine runs of it, and how the answer is to look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastllama.runtime.params import SamplingParams


@dataclass(frozen=True)
class PromptIds:
    """One prompt of a request, as the engine takes it; text: of a completion's prompt, for `echo`."""

    token_ids: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True)
class Job:
    """What `translate` makes of a request, and `render` needs of it beside the deltas.

    kind: which endpoint's. model: the name that responses give. prompts: each runs with the same params,
    whose max_tokens is None where the answer may reach the end of the context.
    stream, include_usage: as the client asks. continues_text: the answer's text goes on with the prompt's; else it is
    one of its own, as the answer to a conversation is. echo: the prompt is shown before the answer. show_tokens: False
    where max_tokens is 0: the one token that is drawn is not shown. logprobs: how many of the likeliest tokens are
    reported beside each token; None for no report. user: a hash of who asks, for the access log; None where nobody is
    named.
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
        """Of all prompts together."""
        return sum(len(prompt.token_ids) for prompt in self.prompts)
