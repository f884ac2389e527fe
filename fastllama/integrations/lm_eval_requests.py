"""Converts lm-eval's requests to scored prompts and sampling parameters. Does not import lm-eval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastllama.errors import brief, counted
from fastllama.runtime.params import SamplingParams

# Synonyms of max_tokens in tasks, in lm-eval's order of precedence.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class ScoredPrompt:
    """Token ids [T], scored from position `start` on, for LLM.score."""

    token_ids: list[int]
    start: int


def scored_pair(context: Sequence[int], continuation: Sequence[int], max_length: int) -> ScoredPrompt:
    """A context and the continuation to score, as one prompt of max_length + 1 tokens at most, cut on the left.

    The last token is scored but not fed, so that the model's input has max_length tokens, as in lm-eval's `hf` model.
    Raises ValueError for a continuation of no tokens, or of more than max_length.
    """
    if not 1 <= len(continuation) <= max_length:
        raise ValueError(
            f"a continuation has {counted(len(continuation), 'token')}; legal: 1 to {max_length}, the model's context"
        )
    token_ids = [*context, *continuation][-(max_length + 1) :]
    return ScoredPrompt(token_ids, len(token_ids) - len(continuation))


def rolling_windows(token_ids: Sequence[int], prefix: int, max_length: int) -> list[ScoredPrompt]:
    """Split a text of any length into prompts that score each of its tokens once; none for a text without tokens.

    The first window scores all its tokens after `prefix`; each later one scores up to max_length more, and the last is
    filled up with already scored tokens as context. Source: lm-eval's get_rolling_token_windows with context_len=1.
    """
    windows = []
    for begin in range(0, len(token_ids), max_length):
        end = min(begin + max_length, len(token_ids))
        text = [prefix, *token_ids[:end]] if begin == 0 else list(token_ids[end - max_length - 1 : end])
        windows.append(ScoredPrompt(text, len(text) - (end - begin)))
    return windows


def generation_params(
    options: Mapping[str, Any], default_max_tokens: int, id_of: Callable[[str], int | None]
) -> SamplingParams:
    """A task's generation_kwargs as sampling parameters.

    Names are lm-eval's (until, max_gen_toks and its synonyms, do_sample) and those of SamplingParams. As in lm-eval,
    decoding is greedy unless a temperature above 0 is given without do_sample=False.
    id_of: the id of a text that is one special token, else None: such a text never appears in an answer, so it becomes
    a stop token id.
    Raises TypeError for an unknown name, ValueError for an illegal value.
    """
    left = {name: value for name, value in options.items() if value is not None}
    lengths = [left.pop(name) for name in _LENGTHS if name in left]
    temperature = left.pop("temperature", 0.0)
    if not left.pop("do_sample", True):
        temperature = 0.0
    if (beams := left.pop("num_beams", 1)) != 1:
        raise ValueError(f"num_beams of a task's generation_kwargs is {brief(beams)}; legal: 1")
    stop = stop_strings(left.pop("until", ()))
    ids = {text: id_of(text) for text in stop}
    return SamplingParams(
        max_tokens=lengths[0] if lengths else default_max_tokens,
        temperature=temperature,
        stop=[text for text in stop if ids[text] is None],
        stop_token_ids=[token_id for token_id in ids.values() if token_id is not None],
        **left,
    )


def stop_strings(until: str | Sequence[str]) -> list[str]:
    """The texts of `until`, one or several; empty texts are dropped."""
    if isinstance(until, str):
        until = [until]
    if not isinstance(until, Sequence) or not all(isinstance(text, str) for text in until):
        raise TypeError(f"until of a task's generation_kwargs is {brief(until)}; legal: a text or a list of texts")
    return [text for text in until if text]


def fitting_context(token_ids: Sequence[int], max_tokens: int, max_length: int) -> list[int]:
    """A context cut on the left to leave room for max_tokens. Raises ValueError where there is none."""
    if max_tokens >= max_length:
        raise ValueError(
            f"max_gen_toks is {max_tokens}; legal: less than max_length, {max_length} tokens of prompt and answer"
        )
    return list(token_ids[-(max_length - max_tokens) :])
